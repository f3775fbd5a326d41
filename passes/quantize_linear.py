"""Hold the weights of llmc.linear as small integers with a scale per group of inputs.

Before:   llmc.linear(x, packed w, bias, N); llmc.embedding(ids, packed w, K) of a tied w
After:    llmc.quantized_linear(x, quantised w, scales, bias, N, group); llmc.quantized_embedding(ids, quantised w, scales, K, group)
Applies:  the packed weight is a matrix from the checkpoint; experts, plain embeddings, norms and biases are kept
Why:      decode reads every weight once per step: half the bytes with 8 bits, nearly a quarter with 4
Order:    after lower-linear, whose packed weights it replaces
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult
from llmc.passes.weights import quantize, quantize_scales

LINEAR, EMBEDDING, EXPERTS = "llmc.linear.default", "llmc.embedding.default", "llmc.grouped_linear.default"


@dataclass(frozen=True)
class QuantizeLinear(Pass):
    """bits: 8 or 4. group: inputs that share a scale, or all of a row that has fewer.

    head_bits: of the last linear, whose error no later layer evens out.
    """

    name: ClassVar[str] = "quantize-linear"
    # Against the graph on the dequantised weights, which is what a compile's canaries run on. What the integers themselves cost is no
    # matter of rounding: it is measured per compile, as perplexity and KL divergence.
    numerics: ClassVar[Numerics] = Numerics.CLOSE
    bits: int = 8
    group: int = 32
    head_bits: int = 8

    def requires(self, gm: GraphModule) -> str | None:
        return None if any(G.is_op(n, LINEAR, EXPERTS) for n in gm.graph.nodes) else "an llmc.linear; lower-linear makes them"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        linears = [n for n in gm.graph.nodes if G.is_op(n, LINEAR)]
        head = str(G.args_of(linears[-1])[1].target) if linears else ""  # the output is logits, so the last linear makes them
        return rewrite_all(gm, ctx, lambda weight: (self.head_bits if weight == head else self.bits, self.group))

    def ensures(self, gm: GraphModule) -> str | None:
        left = [n.name for n in gm.graph.nodes if G.is_op(n, LINEAR, EMBEDDING)]
        return f"{left[0]} still reads a weight that is not quantised" if left else None


def rewrite_all(gm: GraphModule, ctx: PassContext, choose: Callable[[str], tuple[int, int] | str]) -> PassResult:
    """Have every linear and embedding read integers and scales where `choose`, asked for each packed weight by its name, gives bits and a
    group; else it says why not. Experts stay: they have no quantised kernel."""
    refusals: Counter[str] = Counter()
    matches = 0
    linears = [n for n in gm.graph.nodes if G.is_op(n, LINEAR)]
    shapes = {str(G.args_of(n)[1].target): (int(G.args_of(n)[3]), int(G.val(G.args_of(n)[0]).shape[-1])) for n in linears}
    for node in [n for n in gm.graph.nodes if G.is_op(n, LINEAR, EMBEDDING, EXPERTS)]:
        weight = str(G.args_of(node)[1].target)
        chosen = "experts have no quantised kernel" if G.is_op(node, EXPERTS) else choose(weight)
        if isinstance(chosen, str):
            refusals[chosen] += 1
            continue
        _rewrite(gm, ctx, node, shapes[weight], *chosen)
        matches += 1
    if matches:
        G.erase_dead(gm)
    return PassResult(changed=matches > 0, matches=matches, refusals=refusals)


def _rewrite(gm: GraphModule, ctx: PassContext, node: Node, shape: tuple[int, int], bits: int, group: int) -> None:
    """Replace a linear or embedding over a packed weight of `shape` [N, K] by the one over its integers and scales."""
    first, weight, *rest = G.args_of(node)
    packed = ctx.weights[str(weight.target)]
    group = min(group, whole_row(shape[1]))
    names = tuple(quantized_name(str(weight.target), part) for part in ("quantized", "scales"))
    for name, make in zip(names, (quantize, quantize_scales), strict=True):
        if name not in ctx.weights:
            ctx.weights.add(name, make(packed, bits=bits, group=group, shape=shape))
    op = "quantized_linear" if G.is_op(node, LINEAR) else "quantized_embedding"
    with gm.graph.inserting_before(node):
        reads = [G.constant(gm, ctx.weights, name) for name in names]
        new = G.call(gm, overload(op), (first, *reads, *rest, group))
    G.substitute(gm, node, new)


def whole_row(columns: int) -> int:
    """The smallest group that holds a row of so many inputs: groups are multiples of 32."""
    return -(-columns // 32) * 32


def quantized_name(packed: str, part: str) -> str:
    """What the integers ("quantized") or the "scales" of a packed constant are called."""
    path, dot, last = packed.rpartition(".")
    return f"{path}{dot}{part}_{last.removeprefix('packed_')}"
