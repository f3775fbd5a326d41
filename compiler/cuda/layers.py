"""Cut a graph at fixed sizes into layers, and find those that are equal but for their weights and caches.

    GraphModule at fixed sizes  ->  [Part, ...], in order; parts with one key are compiled once and stamped

A node belongs to the layer whose constants or cache it reads. One that reads none goes as late as its readers allow, so that what
passes between two layers is the residual stream and the rotary tables, not the halves of a norm.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from llmc.errors import InternalError

_LAYER_OF_CONSTANT = re.compile(r"\.(\d+)\.")  # the first number inside a dotted name: model.layers.3.mlp..., transformer.h.3...
_LAYER_OF_CACHE = re.compile(r"[kv]_cache_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One piece of a graph, on its own.

    graph: placeholders are `inputs` in order, constants are called c0, c1, ...; it returns a tuple.
    inputs, outputs: nodes of the whole graph. constants: the whole graph's name of c0, c1, ...
    key: equal for parts that are the same program.
    """

    graph: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    constants: tuple[str, ...]
    key: str


def cut(graph: GraphModule) -> list[Part]:
    """Cut a graph into parts that together are it, each part after those it reads from.

    Args:
        graph: as `specialise` gives it.
    """
    part_of = _assign(graph)
    members: dict[int, list[Node]] = {}
    for node in graph.graph.nodes:
        if node in part_of:
            members.setdefault(part_of[node], []).append(node)
    return [_part(members[number], part_of, number) for number in sorted(members)]


def _assign(graph: GraphModule) -> dict[Node, int]:
    """The part of every call. Parts are numbered by layer; what follows the last layer has a number of its own."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    own = {node: _own_layer(node) for node in calls}
    earliest: dict[Node, int] = {}
    for node in calls:
        before = [earliest[n] for n in node.all_input_nodes if n in earliest]
        layer = own[node]
        earliest[node] = max([*before, 0 if layer is None else layer])
    end = max(earliest.values(), default=0) + 1
    latest: dict[Node, int] = {}
    for node in reversed(calls):
        readers = [latest[user] for user in node.users if user in latest]
        latest[node] = earliest[node] if own[node] is not None or _writes(node) else min(readers, default=end)
    for node in calls:
        if node.target is operator.getitem and node.args[0] in latest:
            latest[node] = latest[node.args[0]]  # only tensors pass between layers, not lists of them
    return latest


def _own_layer(node: Node) -> int | None:
    """The last layer whose constants or cache a call reads itself; None if it reads none."""
    found = []
    for n in node.all_input_nodes:
        name = str(n.target)
        match = _LAYER_OF_CONSTANT.search(name) if n.op == "get_attr" else _LAYER_OF_CACHE.fullmatch(name)
        if match is not None and n.op != "call_function":
            found.append(int(match.group(1)))
    return max(found, default=None)


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _part(nodes: Sequence[Node], part_of: Mapping[Node, int], number: int) -> Part:
    inputs, constants = _reads(nodes)
    outputs = tuple(n for n in nodes if any(part_of.get(user) != number for user in n.users))
    if any(not isinstance(n.meta["val"], Tensor) for n in (*inputs, *outputs)):
        raise InternalError(f"layers hand each other something else than tensors ({outputs}); please report this model")
    root, copy, made = torch.nn.Module(), Graph(), {}
    text = [f"in {_described(n)}" for n in inputs]
    for place, node in enumerate(inputs):
        made[node] = copy.placeholder(_input_name(node, place))
        made[node].meta["val"] = node.meta["val"]
    for place, reads in enumerate(constants.values()):
        root.register_buffer(f"c{place}", reads[0].meta["val"])
        text.append(f"constant {_described(reads[0])}")
        for read in reads:
            made[read] = copy.get_attr(f"c{place}")
            made[read].meta["val"] = read.meta["val"]
    names = {new: f"%{index}" for index, new in enumerate(made.values())}
    for node in nodes:
        args, kwargs = _without_layer(node), dict(node.kwargs)
        new = copy.call_function(node.target, map_arg(args, made.__getitem__), map_arg(kwargs, made.__getitem__))  # type: ignore[arg-type]
        new.meta["val"] = node.meta["val"]
        made[node] = new
        names[new] = f"%{len(names)}"
        text.append(f"{names[new]} = {node.target} {_text(new.args, names)} {_text(new.kwargs, names)} {_described(node)}")
    copy.output(tuple(made[n] for n in outputs))
    text.append(f"return {[names[made[n]] for n in outputs]}")
    return Part(
        graph=GraphModule(root, copy, class_name="Layer"),
        inputs=tuple(inputs),
        outputs=outputs,
        constants=tuple(constants),
        key=hashlib.sha256("\n".join(text).encode()).hexdigest(),
    )


def _reads(nodes: Sequence[Node]) -> tuple[list[Node], dict[str, list[Node]]]:
    """What a part reads from outside, in order of first use: values, and constants by name with the nodes that read them."""
    inside = set(nodes)
    inputs: dict[Node, None] = {}
    constants: dict[str, list[Node]] = {}
    for node in nodes:
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                same = constants.setdefault(str(read.target), [])
                if read not in same:
                    same.append(read)
            elif read not in inside:
                inputs[read] = None
    return list(inputs), constants


def _input_name(node: Node, place: int) -> str:
    """Caches are told by their names."""
    match = _LAYER_OF_CACHE.fullmatch(str(node.target)) if node.op == "placeholder" else None
    return f"{str(node.target)[0]}_cache_{place}" if match else f"in_{place}"


def _without_layer(node: Node) -> tuple[Any, ...]:
    """A call's arguments; an op's `layer` is for names alone and would tell equal layers apart."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "llmc":
        return node.args
    names = [argument.name for argument in node.target._schema.arguments]
    return tuple(0 if names[place] == "layer" else value for place, value in enumerate(node.args))


def _described(node: Node) -> str:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {list(value.stride())} {value.storage_offset()}"
    return str([f"{v.dtype} {list(v.shape)} {list(v.stride())}" for v in value])


def _text(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_text(item, names) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item, names)}' for key, item in value.items())}}}"
    return repr(value)
