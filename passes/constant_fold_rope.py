"""Look rotary cosines and sines up instead of computing them in every step.

Before:   cos(positions * inv_freq) * scaling, and the same with sin, rounded to the model's dtype
After:    index_select(table, 0, positions), one table for cos and one for sin
Applies:  each row depends on its own position alone, frequencies are known at compile time, the table is not too large
Why:      a dozen small ops per step become two lookups; the table is made by the very ops it replaces, so no bit moves
Order:    after no-op-elimination, which frees the chain of casts; nothing after it looks for sin or cos
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.row_wise import row_dimension, row_inputs

aten = torch.ops.aten

POSITIONS = "positions"
_VIEWS = {aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.transpose.int, aten.expand.default, aten.permute.default}


@dataclass(frozen=True)
class ConstantFoldRope(Pass):
    name: ClassVar[str] = "constant-fold-rope"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    max_table_bytes: int = 256 << 20  # per table; 128 Ki positions of 256 columns in fp32 are 128 MiB

    def requires(self, gm: GraphModule) -> str | None:
        return None if G.placeholder(gm, POSITIONS) else f"an input called {POSITIONS}"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        positions = G.placeholder(gm, POSITIONS)
        assert positions is not None
        cone = _depending_on(gm, positions)
        matches = 0
        refusals: Counter[str] = Counter()
        for root in list(_roots(cone)):
            reject = self.applies(root, positions, cone, ctx)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            _replace(gm, root, positions, ctx)
            matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies(self, root: Node, positions: Node, cone: set[Node], ctx: PassContext) -> Reject | None:
        """Whether `root` can become a lookup by position."""
        upstream = _upstream(root)
        unknown = [n.target for n in upstream if G.is_constant(n) and ctx.weights[str(n.target)].value is None]
        if unknown:
            return Reject("frequencies are not known at compile time", unknown)
        if any(_bound(n, positions, ctx.max_positions) is None for n in upstream if _is_size(n)):
            return Reject("it reads a size other than the number of tokens", root.name)
        dim = row_dimension(G.val(root), G.val(positions).shape[0])
        if dim is None or any(s != 1 for s in G.val(root).shape[:dim]):
            return Reject("positions are not the leading dimension", tuple(G.val(root).shape))
        if any(isinstance(s, torch.SymInt) for s in G.val(root).shape[dim + 1 :]):
            return Reject("the width is not fixed", tuple(G.val(root).shape))
        reject = _row_by_row(root, dim, positions, cone)
        if reject is not None:
            return reject
        table_bytes = ctx.max_positions * prod(G.val(root).shape[dim + 1 :]) * G.val(root).element_size()
        if table_bytes > self.max_table_bytes:
            return Reject("the table is too large", f"{table_bytes} bytes")
        return None


def _depending_on(gm: GraphModule, positions: Node) -> set[Node]:
    """Tensors computed from positions, constants and sizes alone."""
    cone: set[Node] = {positions}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not _is_tensor(node):
            continue
        tensors = [n for n in node.all_input_nodes if _is_tensor(n)]
        if any(n in cone for n in tensors) and all(n in cone or _upstream_is_constant(n) for n in tensors):
            cone.add(node)
    return cone


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _upstream(node: Node) -> set[Node]:
    """Everything a value is computed from, itself included. Sizes are leaves: where a size was read does not matter."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend([] if _is_size(current) else current.all_input_nodes)
    return seen


def _bound(size: Node, positions: Node, num_positions: int) -> int | None:
    """The value of a size when there are `num_positions` tokens; None if it is another symbol's."""
    value = G.val(size)
    if G.same_size(value, G.val(positions).shape[0]):
        return num_positions
    return value if isinstance(value, int) else None


def _upstream_is_constant(node: Node) -> bool:
    return all(n.op in ("get_attr", "call_function") for n in _upstream(node))


def _roots(cone: set[Node]) -> Iterator[Node]:
    """Values of the cone that the rest of the graph reads and that come from a sine or cosine, views at the end taken off."""
    seen: set[Node] = set()
    for node in sorted(cone):
        if all(user in cone for user in node.users):
            continue
        while G.is_op(node, *_VIEWS):
            node = G.args_of(node)[0]
        if node not in seen and any(G.is_op(n, aten.cos.default, aten.sin.default) for n in _upstream(node)):
            seen.add(node)
            yield node


def _row_by_row(root: Node, dim: int, positions: Node, cone: set[Node]) -> Reject | None:
    """Walk from the root to the positions; every step must keep rows apart."""
    pending, seen = [(root, dim)], set()
    while pending:
        node, at = pending.pop()
        if (node, at) in seen or node is positions:
            continue
        seen.add((node, at))
        rows = row_inputs(node, at)
        if isinstance(rows, Reject):
            return Reject("a row depends on other positions than its own", rows.detail)
        if any(n in cone and n not in {value for value, _ in rows} for n in node.all_input_nodes):
            return Reject("a row depends on other positions than its own", str(node.target))
        pending.extend(rows)
    return None


def _evaluate(root: Node, positions: Node, ctx: PassContext) -> torch.Tensor:
    """`root` for positions 0, 1, ..., max_positions - 1, by the graph's own ops on real tensors."""
    values: dict[Node, Any] = {positions: torch.arange(ctx.max_positions, dtype=G.val(positions).dtype)}
    for node in sorted(_upstream(root)):
        if G.is_constant(node):
            values[node] = ctx.weights[str(node.target)].value
        elif _is_size(node):
            values[node] = _bound(node, positions, ctx.max_positions)
        elif node is not positions:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    result: torch.Tensor = values[root]
    return result


def _replace(gm: GraphModule, root: Node, positions: Node, ctx: PassContext) -> None:
    with torch.no_grad():
        rows = _evaluate(root, positions, ctx)
    leading = next(i for i, s in enumerate(G.val(root).shape) if G.same_size(s, G.val(positions).shape[0]))
    table = rows.reshape(ctx.max_positions, *rows.shape[leading + 1 :]).contiguous()
    kind = "cos" if any(G.is_op(n, aten.cos.default) for n in _upstream(root)) else "sin"
    name = ctx.weights.add_computed(f"rope.{kind}_table", table)
    with gm.graph.inserting_before(root):
        found = G.call(gm, aten.index_select.default, (G.constant(gm, ctx.weights, name), 0, positions))
        for _ in range(leading):
            found = G.call(gm, aten.unsqueeze.default, (found, 0))
    G.substitute(gm, root, found)
