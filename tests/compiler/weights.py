"""Give a captured graph its real weights, by evaluating recipes the plain way: the independent check of what the packer does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.fx import GraphModule

from llmc.compiler.canonical import set_tensor
from llmc.compiler.model import ModelSource
from llmc.kernels.packing import pack
from llmc.passes.weights import Constant


def load_constants(source: ModelSource, constants: Mapping[str, Constant]) -> dict[str, Tensor]:
    """Every constant as a real tensor."""
    handles = {file: safe_open(source.path / file, "pt") for file in {t.file for t in source.tensors.values()}}

    def read(name: str) -> Tensor:
        return handles[source.tensors[name].file].get_tensor(name)

    return {name: c.value if c.value is not None else evaluate(c.recipe, read) for name, c in constants.items()}


def evaluate(recipe: Mapping[str, Any], read: Any) -> Tensor:
    """One recipe, in torch."""
    op = recipe["op"]
    if op == "source":
        return read(recipe["name"])
    if op in ("concat", "stack"):
        parts = [evaluate(part, read) for part in recipe["inputs"]]
        return torch.stack(parts) if op == "stack" else torch.cat(parts, recipe["axis"])
    inner = evaluate(recipe["input"], read)
    if op == "cast":
        return inner.to(getattr(torch, recipe["dtype"]))
    if op == "transpose":
        return inner.permute(recipe["axes"]).contiguous()
    if op == "pack":
        return _packed(inner)
    raise AssertionError(f"unknown recipe op {op}")


def _packed(weight: Tensor) -> Tensor:
    if weight.dim() > 2:
        return torch.stack([_packed(part) for part in weight])
    if weight.dtype == torch.bfloat16:
        return torch.from_numpy(pack(weight.contiguous().view(torch.uint16).numpy())).view(torch.bfloat16)
    return torch.from_numpy(pack(weight.contiguous().numpy()))


def with_weights(graph: GraphModule, tensors: Mapping[str, Tensor]) -> GraphModule:
    """A copy of the graph that runs: fake constants replaced by real ones."""
    root = torch.nn.Module()
    for name in dict.fromkeys(str(n.target) for n in graph.graph.nodes if n.op == "get_attr"):
        set_tensor(
            root, name, torch.nn.Parameter(tensors[name], requires_grad=False) if tensors[name].is_floating_point() else tensors[name]
        )
    return GraphModule(root, graph.graph)
