"""The -O0 program: the captured graph as plain JSON, for a small interpreter over torch.ops.

The format is described in docs/node_list.md, which the runtime's interpreter is written from. Equal graphs give equal bytes.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from llmc.errors import InternalError

FORMAT = 1
NAMESPACES = ("aten", "llmc")
FUNCTIONS = {
    operator.getitem: "operator.getitem",
    operator.add: "operator.add",
    operator.sub: "operator.sub",
    operator.mul: "operator.mul",
    operator.floordiv: "operator.floordiv",
}


def to_nodes(graph: GraphModule) -> dict[str, Any]:
    """Write a graph as a node list.

    Args:
        graph: as `capture` and the passes leave it: placeholders, get_attr, calls of ops and of the few functions above.

    Returns:
        A JSON object (docs/node_list.md).

    Raises:
        InternalError: the graph holds something a node list cannot say.
    """
    inputs: list[str] = []
    constants: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    outputs: list[Any] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.name)
        elif node.op == "get_attr":
            constants[node.name] = str(node.target)
        elif node.op == "call_function":
            calls.append({"name": node.name, "op": _op(node), "args": _value(node.args, node), "kwargs": _value(node.kwargs, node)})
        elif node.op == "output":
            (result,) = node.args
            results: Sequence[Any] = result if isinstance(result, (list, tuple)) else [result]
            outputs = [_value(item, node) for item in results]
        else:
            raise InternalError(f"a node list cannot hold node {node.name} of kind {node.op!r}; please report this model")
    return {"format": FORMAT, "inputs": inputs, "constants": constants, "nodes": calls, "outputs": outputs}


def to_bytes(graph: GraphModule) -> bytes:
    """The node list as canonical JSON: keys sorted, no spaces, ASCII, one newline at the end."""
    text = json.dumps(to_nodes(graph), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def constants_of(graph: GraphModule) -> dict[str, str]:
    """Node name -> constant name, as `Entry.constants` of the manifest wants it."""
    return {node.name: str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}


def _op(node: Node) -> str:
    target = node.target
    if isinstance(target, OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    if callable(target) and target in FUNCTIONS:
        return FUNCTIONS[target]
    raise InternalError(f"a node list cannot hold a call of {target!r} (node {node.name}); please report this model")


def _value(value: Any, node: Node) -> Any:
    if isinstance(value, Node):
        return {"ref": value.name}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_value(item, node) for item in value]
    if isinstance(value, dict):
        return {str(key): _value(item, node) for key, item in value.items()}
    for kind, word in ((torch.dtype, "dtype"), (torch.layout, "layout"), (torch.memory_format, "memory_format")):
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    raise InternalError(f"a node list cannot hold the argument {value!r} of node {node.name}; please report this model")
