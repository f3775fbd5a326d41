"""Fix a captured graph's sizes and move it, without data, to a CUDA device.

    GraphModule with symbolic sizes on the CPU  ->  GraphModule with plain integers on cuda:0, all tensors fake

The shape rules of the ops are run again on the fixed sizes; sizes that were computed in the graph become numbers and their nodes go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from llmc.artifacts.manifest import TensorSpec
from llmc.compiler.canonical import set_tensor
from llmc.compiler.cuda.cross import DEVICE
from llmc.errors import InternalError


def specialise(graph: GraphModule, inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> GraphModule:
    """Make a copy at fixed sizes. Use inside `cross_cuda`, whose device guard indexing needs.

    Args:
        graph: as captured or as the passes leave it; not changed.
        inputs: of the graph, with symbolic dimensions by name.
        sizes: value of each symbol ("T", "N", "B", "M", "NB").

    Returns:
        A module that returns a tuple; every node has its fake value in meta["val"].

    Raises:
        InternalError: a dimension names a symbol without a size.
    """
    specs = {spec.name.replace(".", "_"): spec for spec in inputs}
    mode = FakeTensorMode()
    root, copy = torch.nn.Module(), Graph()
    values: dict[Node, Any] = {}  # old node -> fake tensor, or number
    nodes: dict[Node, Any] = {}  # old node -> new node, or number

    def keep(old: Node, new: Node, value: Any) -> None:
        new.meta["val"] = value
        nodes[old], values[old] = new, value

    for old in graph.graph.nodes:
        if old.op == "placeholder":
            spec = specs[old.name]
            shape = [fixed_size(dim, sizes) for dim in spec.shape]
            with mode:
                keep(old, copy.placeholder(old.name), torch.empty(shape, dtype=getattr(torch, spec.dtype), device=DEVICE))
        elif old.op == "get_attr":
            constant: Tensor = reduce(getattr, str(old.target).split("."), graph)  # type: ignore[assignment]
            with mode:
                fake = torch.empty_strided(constant.shape, constant.stride(), dtype=constant.dtype, device=DEVICE)
            if str(old.target) not in dict(root.named_buffers()):
                set_tensor(root, str(old.target), fake)
            keep(old, copy.get_attr(str(old.target)), fake)
        elif old.op == "output":
            results = old.args[0] if isinstance(old.args[0], tuple | list) else (old.args[0],)
            copy.output(tuple(nodes[result] for result in results))
        else:
            args, kwargs = _on_device(map_arg((old.args, old.kwargs), values.__getitem__))
            with mode:
                value = old.target(*args, **kwargs)
            if isinstance(value, int | float):
                nodes[old] = values[old] = value
            else:
                args, kwargs = _on_device(map_arg((old.args, old.kwargs), nodes.__getitem__))
                keep(old, copy.call_function(old.target, args, kwargs), value)
    return GraphModule(root, copy, class_name="Step")


def fixed_size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension of a `TensorSpec` ("T", "B + 1" or a number) as a number.

    Raises:
        InternalError: its symbol has no size.
    """
    if isinstance(dim, int):
        return dim
    symbol, _, added = dim.partition(" + ")
    if symbol not in sizes:
        raise InternalError(f"dimension {dim!r} has no size; sizes are given for {', '.join(sizes)}; please report this")
    return sizes[symbol] + int(added or 0)


def _on_device(arguments: Any) -> Any:
    """The arguments of a call with every device named in them replaced."""
    if isinstance(arguments, torch.device):
        return DEVICE
    if isinstance(arguments, tuple | list):
        return type(arguments)(_on_device(item) for item in arguments)
    if isinstance(arguments, dict):
        return {key: _on_device(item) for key, item in arguments.items()}
    return arguments
