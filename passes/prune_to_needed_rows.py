"""Select the rows whose logits are wanted as early as possible.

Before:   index(norm(residual + mlp(...)), [None, logits_indices]), all of the last layer computed for every token
After:    the same ops over index(attention, ...) and index(residual, ...), right after the last layer's attention
Applies:  through ops that are row-wise (passes/row_wise.py) and whose results nobody else reads
Why:      in prefill, o_proj, MLP and the final norm of the last layer run on a few rows instead of thousands
Order:    after no-op-elimination; before the merges, so that it sees plain linears (it also knows splits, for merged checkpoints)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.row_wise import SIZED, row_inputs

aten = torch.ops.aten

INDICES = "logits_indices"


@dataclass(frozen=True)
class PruneToNeededRows(Pass):
    name: ClassVar[str] = "prune-to-needed-rows"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, gm: GraphModule) -> str | None:
        return None if G.placeholder(gm, INDICES) else f"an input called {INDICES}"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        indices = G.placeholder(gm, INDICES)
        assert indices is not None
        matches = 0
        refusals: Counter[str] = Counter()
        for selection in [n for n in indices.users if _selected_dimension(n, indices) is not None]:
            reject = self._push_up(gm, selection, indices)
            if reject is None:
                matches += 1
            else:
                refusals[reject.reason] += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def _push_up(self, gm: GraphModule, selection: Node, indices: Node) -> Reject | None:
        """Move one selection above everything that can do without the other rows."""
        source = G.args_of(selection)[0]
        dim = _selected_dimension(selection, indices)
        assert isinstance(source, Node) and dim is not None
        moved, frontier = _cone(gm, selection, source, dim)
        if not moved:
            rows = row_inputs(source, dim) if source.op == "call_function" else Reject("the selection stands on an input already")
            return rows if isinstance(rows, Reject) else Reject("all rows are read elsewhere too", source.name)
        old_size = G.val(source).shape[dim]
        selected: dict[Node, Node] = {}
        for node, at in frontier.items():
            with G.insert_after(gm.graph, _later(gm, node, indices)):
                selected[node] = G.call(gm, aten.index.Tensor, (node, [None] * at + [indices]))
        size = None
        for node, at in moved.items():
            for old, new in selected.items():
                node.replace_input_with(old, new)
            if node.target in SIZED and G.same_size(_size(G.args_of(node)[1][at]), old_size):
                if size is None:
                    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
                        size = G.call(gm, aten.sym_size.int, (indices, 0))
                sizes = [size if i == at else s for i, s in enumerate(G.args_of(node)[1])]
                node.update_arg(1, sizes)
        selection.replace_all_uses_with(source)
        gm.graph.erase_node(selection)
        G.repropagate(gm, set(moved) | set(source.users))
        return None


def _selected_dimension(node: Node, indices: Node) -> int | None:
    """The dimension along which `node` picks the rows `indices`, if that is all it does."""
    if G.is_op(node, aten.index.Tensor):
        picks = list(G.args_of(node)[1])
        if picks and picks[-1] is indices and all(p is None for p in picks[:-1]):
            return len(picks) - 1
    if G.is_op(node, aten.index_select.default) and G.args_of(node)[2] is indices:
        dim: int = G.args_of(node)[1]
        return dim + len(G.val(node).shape) if dim < 0 else dim
    return None


def _cone(gm: GraphModule, selection: Node, source: Node, dim: int) -> tuple[dict[Node, int], dict[Node, int]]:
    """(nodes that can work on the needed rows alone, nodes whose rows must be selected for them), with the rows' dimension."""
    wanted: dict[Node, int] = {source: dim}
    moved: dict[Node, int] = {}
    refused: set[Node] = set()
    for node in reversed(list(gm.graph.nodes)):
        if node not in wanted or node in refused:
            continue
        rows = row_inputs(node, wanted[node]) if node.op == "call_function" else Reject("an input")
        private = all(user is selection or user in moved for user in node.users)
        if isinstance(rows, Reject) or not private:
            continue
        if any(wanted.get(value, at) != at for value, at in rows):
            continue  # one value read with its rows in two places; select this node's result instead
        moved[node] = wanted[node]
        wanted |= dict(rows)
    frontier = {node: at for node, at in wanted.items() if node not in moved}
    return _without_split_parts(moved, frontier)


def _without_split_parts(moved: dict[Node, int], frontier: dict[Node, int]) -> tuple[dict[Node, int], dict[Node, int]]:
    """A list of tensors (a split that stays above) cannot be indexed: its parts become the frontier."""
    for node in [n for n in frontier if isinstance(G.val(n), (list, tuple))]:
        del frontier[node]
        for part in [n for n in moved if node in n.all_input_nodes]:
            frontier[part] = moved.pop(part)
    return moved, frontier


def _later(gm: GraphModule, a: Node, b: Node) -> Node:
    """Whichever of two nodes comes later in the graph."""
    return b if a < b else a


def _size(value: Any) -> Any:
    return G.val(value)
