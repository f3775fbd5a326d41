"""Hand every matmul with a weight to llmc.linear, the weight packed for it.

Before:   linear(x, w, bias); addmm(bias, x, w) and mm(x, w) with w [K, N] or transposed in the graph; embedding(w, ids) of a tied w
After:    llmc.linear(x, packed w, bias, N); llmc.embedding(ids, packed w, K)
Applies:  w is a constant of x's dtype (fp32, bf16 or fp16); nothing but linears and embeddings reads it
Why:      the kernel reads weights at memory speed in its own layout, and gives a row the same bits in every batch
Order:    last of the exact list: merges and pruning match plain linears
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.weights import pack, transpose

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
EXPERTS = (aten.bmm.default, aten._grouped_mm.default)
MATMULS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, *EXPERTS)


@dataclass(frozen=True)
class Weight:
    """A weight as a matmul reads it. `transposed`: stored [K, N], as opposed to a linear's [N, K]."""

    read: Node
    transposed: bool


@dataclass(frozen=True)
class LowerLinear(Pass):
    name: ClassVar[str] = "lower-linear"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # sums in another order than the BLAS that aten.linear calls

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        matches = 0
        refusals: Counter[str] = Counter()
        for node in [n for n in gm.graph.nodes if G.is_op(n, *MATMULS)]:
            if not weights_read(node):
                continue
            reject = self.applies(node)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            self.lower(gm, ctx, node)
            matches += 1
        G.erase_dead(gm)
        matches += self.lower_embeddings(gm, ctx)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)

    def applies(self, node: Node) -> Reject | None:
        """Whether llmc.linear can take a matmul that reads a weight."""
        if (reject := refuse_matmul(node)) is not None:
            return reject
        _, weight, _ = operands(node)
        assert weight is not None
        if any(_other_use(read) for read in _reads(node.graph, weight.read)):
            return Reject("something else than a linear or an embedding reads the weight", weight.read.target)
        return None

    def lower(self, gm: GraphModule, ctx: PassContext, node: Node) -> None:
        """Replace a matmul that `applies` allows."""
        _lower(gm, ctx, node)

    def lower_embeddings(self, gm: GraphModule, ctx: PassContext) -> int:
        """Replace the lookups in weights that matmuls read. Returns how many."""
        return _lower_tied_embeddings(gm, ctx)

    def ensures(self, gm: GraphModule) -> str | None:
        for node in gm.graph.nodes:
            if G.is_op(node, *MATMULS) and weights_read(node) and self.applies(node) is None:
                return f"{node.name} ({node.target}) still multiplies with a plain weight"
        return None


def refuse_matmul(node: Node) -> Reject | None:
    """Why no linear of ours can take a matmul that reads a weight, whatever form the weight is held in."""
    if G.is_op(node, *EXPERTS):
        return Reject("a matmul per expert", node.name)
    x, weight, bias = operands(node)
    if weight is None or len(G.val(weight.read).shape) != 2:
        return Reject("the weight is not the right operand, or not a matrix", node.name)
    dtypes = [G.val(v).dtype for v in (x, weight.read, bias) if v is not None]
    if dtypes[0] not in G.KERNEL_DTYPES or len(set(dtypes)) > 1:
        return Reject("no kernel for these dtypes", dtypes)
    if bias is not None and len(G.val(bias).shape) != 1:
        return Reject("the bias is not a vector", tuple(G.val(bias).shape))
    if any(node.kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta")):
        return Reject("a scaled addmm", node.name)
    return None


def weights_read(node: Node) -> list[Node]:
    """The matrices (or stacks of them) among a matmul's operands that are constants, transposed in the graph or not."""
    return [w.read for a in node.args if (w := _weight(a)) is not None and len(G.val(w.read).shape) >= 2]


def _weight(value: Any) -> Weight | None:
    """A constant read directly or through transposes of its last two dimensions; [.., K, N] order counts as transposed."""
    flips = 0
    while G.is_op(value, *_TRANSPOSES):
        flips += 1
        value = G.args_of(value)[0]
    return Weight(value, transposed=flips % 2 == 0) if G.is_constant(value) else None


def operands(node: Node) -> tuple[Any, Weight | None, Any]:
    """x, the weight and the bias of a matmul."""
    if node.target is aten.linear.default:
        weight = _weight(G.args_of(node)[1])
        as_linear = None if weight is None else Weight(weight.read, transposed=not weight.transposed)
        return G.args_of(node)[0], as_linear, G.argument(node, 2, "bias")
    if node.target is aten.addmm.default:
        return G.args_of(node)[1], _weight(G.args_of(node)[2]), G.args_of(node)[0]
    return G.args_of(node)[0], _weight(G.args_of(node)[1]), None


def _reads(graph: Any, read: Node) -> list[Node]:
    return [n for n in graph.nodes if n.op == "get_attr" and n.target == read.target]


def _other_use(read: Node) -> bool:
    """Whether anything but matmuls (through transposes) and embeddings uses a weight; packing it would then hold it twice."""
    for user in read.users:
        if G.is_op(user, *_TRANSPOSES):
            if _other_use(user):
                return True
        elif not G.is_op(user, *MATMULS, aten.embedding.default, "llmc.linear.default", "llmc.plain_linear.default"):
            return True
    return False


def packed_name(name: str, transposed: bool) -> str:
    """What the packed form of a constant is called: the same module, its last part marked."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{'packed_transposed' if transposed else 'packed'}_{last}"


def _lower(gm: GraphModule, ctx: PassContext, node: Node) -> None:
    x, weight, bias = operands(node)
    assert weight is not None
    name = str(weight.read.target)
    entry = transpose(ctx.weights[name], (1, 0)) if weight.transposed else ctx.weights[name]
    packed = packed_name(name, weight.transposed)
    if packed not in ctx.weights:
        ctx.weights.add(packed, pack(entry))
    with gm.graph.inserting_before(node):
        new = G.call(gm, overload("linear"), (x, G.constant(gm, ctx.weights, packed), bias, entry.shape[0]))
    G.substitute(gm, node, new)


def _lower_tied_embeddings(gm: GraphModule, ctx: PassContext) -> int:
    """Read embeddings from the packed weight where a linear reads the same one, so that a tied weight is held once."""
    matches = 0
    for node in [n for n in gm.graph.nodes if G.is_op(n, aten.embedding.default)]:
        table, ids = G.args_of(node)[:2]
        packed = packed_name(str(table.target), transposed=False) if G.is_constant(table) else ""
        if packed not in ctx.weights:
            continue
        with gm.graph.inserting_before(node):
            read = G.constant(gm, ctx.weights, packed)
            new = G.call(gm, overload("embedding"), (ids, read, ctx.weights[str(table.target)].shape[1]))
        G.substitute(gm, node, new)
        matches += 1
    if matches:
        G.erase_dead(gm)
    return matches
