"""Small graphs as patterns: tracing a function of ops, finding it in a graph, writing it into one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from llmc.passes import graph as G


def trace(function: Callable[..., Any]) -> Graph:
    """The graph of a function of ops. Its parameters become placeholders."""
    traced = Graph()
    tracer = GraphAppendingTracer(traced)
    proxies = [Proxy(traced.placeholder(name), tracer) for name in inspect.signature(function).parameters]
    result = function(*proxies)
    assert isinstance(result, Proxy), "a pattern returns one value made by ops"
    traced.output(result.node)
    return traced


def match(pattern: Graph, root: Node) -> list[Any] | None:
    """What the pattern's parameters stand for if `root` is the pattern's result, else None.

    Values inside the match may have no reader outside of it; the result may have any.
    """
    (wanted_root,) = next(iter(reversed(pattern.nodes))).args
    bound: dict[Node, Any] = {}

    def fits(wanted: Any, found: Any) -> bool:
        if not isinstance(wanted, Node):
            return _same_argument(wanted, found, fits)
        if wanted in bound:
            return bound[wanted] is found
        if wanted.op != "placeholder" and not (
            G.is_op(found, wanted.target) and _same_argument(_arguments(wanted), _arguments(found), fits)
        ):
            return False
        bound[wanted] = found
        return True

    if not fits(wanted_root, root):
        return None
    inside = {found for wanted, found in bound.items() if wanted.op != "placeholder"}
    if any(user not in inside for node in inside - {root} for user in node.users):
        return None
    return [bound[p] for p in pattern.nodes if p.op == "placeholder"]


def _arguments(node: Node) -> dict[str, Any]:
    """A call's arguments by name, defaults filled in, so that f(x), f(x, 1) and f(x, alpha=1) compare equal."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {"args": node.args, "kwargs": node.kwargs}
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named |= {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    return named | node.kwargs


def _same_argument(wanted: Any, found: Any, fits: Callable[[Any, Any], bool]) -> bool:
    if isinstance(wanted, Node):
        return fits(wanted, found)
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict) and wanted.keys() == found.keys() and all(_same_argument(v, found[k], fits) for k, v in wanted.items())
        )
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(found, (list, tuple)) and len(wanted) == len(found) and all(map(_same_argument, wanted, found, [fits] * len(wanted)))
        )
    return type(wanted) is type(found) and bool(wanted == found)


def instantiate(gm: GraphModule, replacement: Graph, values: list[Any]) -> Node:
    """Write a traced graph at the insertion point, its parameters standing for `values`. Returns the result's node."""
    parameters = [n for n in replacement.nodes if n.op == "placeholder"]
    written: dict[Node, Any] = dict(zip(parameters, values, strict=True))
    for node in replacement.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: written[n])
            written[node] = G.call(gm, node.target, args, kwargs)
        elif node.op == "output":
            result: Node = written[node.args[0]]
            return result
    raise AssertionError("a traced graph without output")
