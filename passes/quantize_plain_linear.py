"""Hold the weights of llmc.plain_linear as small integers with a scale per group of inputs. For GPUs.

Before:   llmc.plain_linear(x, w, bias); embedding(w, ids) of a tied w
After:    llmc.plain_quantized_linear(x, integers, scales, bias, group); the rows of ids of both, multiplied
Applies:  w is a matrix from the checkpoint that nothing else reads; experts, plain embeddings, norms and biases are kept
Why:      decode reads every weight once per step: half the bytes with 8 bits, nearly a quarter with 4
Order:    after lower-plain-linear, which names the weights; the numbers are those of quantize-linear, in another place
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import Numerics, Pass, PassContext, PassResult
from llmc.passes.quantize_linear import quantized_name
from llmc.passes.weights import quantize_row_scales, quantize_rows

aten = torch.ops.aten
_LINEAR, _EXPERTS = "llmc.plain_linear.default", "llmc.plain_grouped_linear.default"


@dataclass(frozen=True)
class QuantizePlainLinear(Pass):
    """bits: 8 or 4. group: inputs that share a scale. head_bits: of the last linear, whose error no later layer evens out."""

    name: ClassVar[str] = "quantize-plain-linear"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # against the dequantised weights; what these cost is measured per compile
    bits: int = 8
    group: int = 32
    head_bits: int = 8

    def requires(self, gm: GraphModule) -> str | None:
        return None if any(G.is_op(n, _LINEAR) for n in gm.graph.nodes) else "an llmc.plain_linear; lower-plain-linear makes them"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        refusals: Counter[str] = Counter()
        matches = 0
        linears = [n for n in gm.graph.nodes if G.is_op(n, _LINEAR) and G.is_constant(G.args_of(n)[1])]
        head = str(G.args_of(linears[-1])[1].target) if linears else ""  # the output is logits, so the last linear makes them
        refusals["experts have no quantised kernel"] += sum(G.is_op(n, _EXPERTS) for n in gm.graph.nodes)
        readers = _readers(gm)
        for name in dict.fromkeys(str(G.args_of(n)[1].target) for n in linears):
            reason = self._reason(ctx, name, readers[name], self.head_bits if name == head else self.bits)
            if reason is not None:
                refusals[reason] += 1
                continue
            for node in readers[name]:
                _rewrite(gm, ctx, node, name, self.head_bits if name == head else self.bits, self.group)
                matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=+refusals)

    def _reason(self, ctx: PassContext, name: str, readers: list[Node], bits: int) -> str | None:
        """Why a weight is kept as it is, or None."""
        if ctx.weights[name].recipe["op"] == "computed":
            return "the weight is not from the checkpoint"
        lookups = [n for n in readers if G.is_op(n, aten.embedding.default)]
        if any(not G.is_op(n, _LINEAR) and n not in lookups for n in readers):
            return "something else than a linear or an embedding reads the weight"
        if lookups and (bits != 8 or ctx.weights[name].shape[1] % self.group):
            return "an embedding reads the weight, in rows of no whole groups of 8 bits"
        return None


def _readers(gm: GraphModule) -> dict[str, list[Node]]:
    """Name of each constant -> the calls that read it, in order."""
    found: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), []).extend(node.users)
    return found


def _rewrite(gm: GraphModule, ctx: PassContext, node: Node, name: str, bits: int, group: int) -> None:
    names = [quantized_name(name, part) for part in ("quantized", "scales")]
    for made, make in zip(names, (quantize_rows, quantize_row_scales), strict=True):
        if made not in ctx.weights:
            ctx.weights.add(made, make(ctx.weights[name], bits=bits, group=group))
    with gm.graph.inserting_before(node):
        integers, scales = (G.constant(gm, ctx.weights, made) for made in names)
        if G.is_op(node, _LINEAR):
            x, _, bias = G.args_of(node)
            new = G.call(gm, overload("plain_quantized_linear"), (x, integers, scales, bias, group))
        else:
            new = _looked_up(gm, integers, scales, G.args_of(node)[1], group)
    G.substitute(gm, node, new)


def _looked_up(gm: GraphModule, integers: Node, scales: Node, ids: Node, group: int) -> Node:
    """Rows of int8 [V, K] times their scales [V, K / group], in fp32, rounded once: the bits of the dequantised matrix."""
    shape = [*(_size(gm, ids, place) for place in range(len(G.val(ids).shape)))]

    def wide(constant: Node, *last: int) -> Node:
        rows = G.call(gm, aten.index.Tensor, (constant, [ids]))
        return G.call(gm, aten.view.default, (G.call(gm, aten.to.dtype, (rows, torch.float32)), [*shape, *last]))

    columns, dtype = int(G.val(integers).shape[1]), G.val(scales).dtype
    product = G.call(gm, aten.mul.Tensor, (wide(integers, columns // group, group), wide(scales, columns // group, 1)))
    flat = G.call(gm, aten.view.default, (product, [*shape, columns]))
    return G.call(gm, aten.to.dtype, (flat, dtype))


def _size(gm: GraphModule, node: Node, place: int) -> Any:
    """A dimension of a value: its number, or a call that asks for it."""
    size = G.val(node).shape[place]
    return size if isinstance(size, int) else G.call(gm, aten.sym_size.int, (node, place))
