"""Give each of several ranks an equal part of every attention and every gated MLP.

Before:   y = linear(attention(linear(x, wq), linear(x, wk), linear(x, wv)), wo); y = linear(act(linear(x, wg)) * linear(x, wu), wd)
After:    rows of wq, wk, wv, wg, wu and columns of wo, wd are the rank's own, caches hold its heads; y = all_reduce(linear(..), ranks)
Applies:  attention: query and KV heads divide by the ranks, one linear behind each of q, k, v and one after; the compiler wants all.
          MLP: a linear of pointwise work on linears of one input, whose width divides; one that does not is computed whole by every rank
Why:      each rank holds and reads its part of the weights and of the KV cache; two sums per layer pass between them
Order:    before the merges, which then merge the parts; after no-op-elimination. The graph is the same for all ranks, the recipes of
          its constants say {"op": "shard"}, of which `of_rank` makes a rank's own. Embedding and output projection stay whole
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.merging import linears_behind
from llmc.passes.weights import Constant, Recipe

aten = torch.ops.aten

_POINTWISE = (
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.mul.Tensor,
    aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
_SHAPING = (
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.contiguous.default,
    aten.clone.default, aten.flatten.using_ints, aten._unsafe_view.default,
)  # fmt: skip


@dataclass(frozen=True)
class ShardTensorParallel(Pass):
    name: ClassVar[str] = "shard-tensor-parallel"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # a row of wo and wd is summed in as many parts as there are ranks
    changes_inputs: ClassVar[bool] = True  # the caches hold the rank's own heads
    ranks: int = 2

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches = 0
        refusals: Counter[str] = Counter()
        for attention in [n for n in gm.graph.nodes if G.is_op(n, G.ATTENTION)]:
            before = [linears_behind(value) for value in G.args_of(attention)[:3]]
            after = _linear_after(attention)
            reject = self.applies_to_attention(attention, before, after, ctx)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            assert after is not None
            self._split(gm, ctx, [found[0] for found in before], after)
            self._split_caches(attention)
            matches += 1
        for down in [n for n in gm.graph.nodes if G.is_op(n, aten.linear.default)]:
            columns = _mlp_linears(down)
            if not columns:
                continue
            reject = self._cannot_split(columns, down, ctx)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            self._split(gm, ctx, columns, down)
            matches += 1
        if matches:
            G.erase_dead(gm)
            G.repropagate(gm, [n for n in gm.graph.nodes if n.op == "call_function"])
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies_to_attention(self, attention: Node, before: list[list[Node]], after: Node | None, ctx: PassContext) -> Reject | None:
        """Whether an attention can be divided."""
        if any(len(found) != 1 for found in before) or after is None:
            return Reject("not one aten.linear behind each of q, k and v, and one after", [[n.name for n in found] for found in before])
        query, key = (G.val(value).shape for value in G.args_of(attention)[:2])
        if query[1] % self.ranks or key[1] % self.ranks:
            return Reject("query or KV heads do not divide by the ranks", (query[1], key[1]))
        if G.argument(attention, 14, "sinks") is not None:
            return Reject("attention with sinks is not divided", attention.name)
        return self._cannot_split([found[0] for found in before], after, ctx)

    def _cannot_split(self, columns: list[Node], row: Node, ctx: PassContext) -> Reject | None:
        for linear in [*columns, row]:
            weight, bias = G.args_of(linear)[1], G.argument(linear, 2, "bias")
            if not G.is_constant(weight) or not (bias is None or G.is_constant(bias)):
                return Reject("a weight is computed in the graph", linear.name)
            if sum(n.op == "get_attr" and n.target == weight.target for n in linear.graph.nodes) > 1 or len(weight.users) > 1:
                return Reject("a weight has another reader", str(weight.target))
            if G.val(weight).shape[1 if linear is row else 0] % self.ranks:
                return Reject("a width does not divide by the ranks", (str(weight.target), tuple(G.val(weight).shape)))
        return None

    def _split(self, gm: GraphModule, ctx: PassContext, columns: list[Node], row: Node) -> None:
        """The columns' weights by rows, the row's by columns, and a sum behind it; a bias of the row is added once, to the sum."""
        for linear in columns:
            weight, bias = G.args_of(linear)[1], G.argument(linear, 2, "bias")
            constants = [self._own(gm, ctx, linear, weight, 0)]
            if bias is not None:
                constants.append(self._own(gm, ctx, linear, bias, 0))
            linear.args = (linear.args[0], *constants)
        bias = G.argument(row, 2, "bias")
        x, weight = G.args_of(row)[:2]
        row.args = (x, self._own(gm, ctx, row, weight, 1))
        with gm.graph.inserting_after(row):
            total = gm.graph.call_function(overload("all_reduce"), (row, self.ranks))
        total.meta["val"] = G.val(row)
        last = total
        if bias is not None:
            with gm.graph.inserting_after(total):
                last = gm.graph.call_function(aten.add.Tensor, (total, bias))
            last.meta["val"] = G.val(row)
        row.replace_all_uses_with(last, delete_user_cb=lambda user: user is not total)

    def _own(self, gm: GraphModule, ctx: PassContext, user: Node, read: Node, axis: int) -> Node:
        name = str(read.target)
        module, _, parameter = name.rpartition(".")
        own = ctx.weights.add(f"{module}.shard_{parameter}", shard(ctx.weights[name], axis, self.ranks))
        with gm.graph.inserting_before(user):
            return G.constant(gm, ctx.weights, own)

    def _split_caches(self, attention: Node) -> None:
        for cache in G.args_of(attention)[3:5]:
            value = G.val(cache)
            with value.fake_mode:
                blocks, heads, *tile = value.shape
                cache.meta["val"] = torch.empty((blocks, heads // self.ranks, *tile), dtype=value.dtype, device="cpu")


def shard(constant: Constant, axis: int, ranks: int) -> Constant:
    """A rank's equal part of a constant along `axis`, which rank's is left open."""
    shape = list(constant.shape)
    shape[axis] //= ranks
    recipe = {"op": "shard", "axis": axis, "ranks": ranks, "size": constant.shape[axis], "input": constant.recipe}
    return Constant(recipe=recipe, dtype=constant.dtype, shape=tuple(shape))


def is_sharded(recipe: Recipe) -> bool:
    """Whether a recipe gives each rank its own."""
    if recipe["op"] == "shard":
        return True
    return any(is_sharded(child) for child in (*recipe.get("inputs", ()), *([recipe["input"]] if "input" in recipe else ())))


def of_rank(recipe: Recipe, rank: int) -> Recipe:
    """A recipe with its shards those of `rank`, in the ops that an artifact knows."""
    if recipe["op"] == "shard":
        part = recipe["size"] // recipe["ranks"]
        whole = of_rank(recipe["input"], rank)
        return {"op": "slice", "axis": recipe["axis"], "start": rank * part, "stop": (rank + 1) * part, "input": whole}
    if "input" in recipe:
        return {**recipe, "input": of_rank(recipe["input"], rank)}
    if "inputs" in recipe:
        return {**recipe, "inputs": [of_rank(child, rank) for child in recipe["inputs"]]}
    return recipe


def _linear_after(attention: Node) -> Node | None:
    """The linear that takes attention's result, reshaped alone; None if something else does."""
    node = attention
    while len(node.users) == 1:
        (node,) = node.users
        if G.is_op(node, aten.linear.default):
            return node
        if not G.is_op(node, *_SHAPING):
            return None
    return None


def _mlp_linears(down: Node) -> list[Node]:
    """The linears of one input that `down`'s is made of by pointwise work that nobody else reads; none if it is not so."""
    found: list[Node] = []
    pending = [G.args_of(down)[0]]
    while pending:
        node = pending.pop()
        if len(node.users) != 1:
            return []
        if G.is_op(node, aten.linear.default):
            found.append(node)
        elif G.is_op(node, *_POINTWISE):
            pending.extend(node.all_input_nodes)
        else:
            return []
    return found if len({G.args_of(n)[0] for n in found}) == 1 else []
