"""Hold the weights of llmc.plain_linear as small numbers with scales. For GPUs.

Before:   llmc.plain_linear(x, w, bias); embedding(w, ids) of a tied w
After:    llmc.plain_quantized_linear(x, integers or fp8, scales, bias, group); the rows of ids of both, multiplied
Applies:  w is a matrix from the checkpoint that nothing else reads; experts, plain embeddings, norms and biases are kept
Why:      decode reads every weight once per step: half the bytes with 8 bits, nearly a quarter with 4
Order:    after lower-plain-linear, which names the weights; integers are those of quantize-linear, in another place
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
from llmc.passes.quantize_linear import quantized_name, whole_row
from llmc.passes.weights import Constant, fp8_row_scales, fp8_rows, quantize_row_scales, quantize_rows

aten = torch.ops.aten
LINEAR, _EXPERTS = "llmc.plain_linear.default", "llmc.plain_grouped_linear.default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a matrix is held: integers of 8 or 4 bits with a scale per `group` inputs, or, group None, e4m3 with a scale per row."""

    bits: int
    group: int | None

    def constants(self, matrix: Constant) -> tuple[Constant, Constant]:
        """The small numbers and their scales."""
        if self.group is None:
            return fp8_rows(matrix), fp8_row_scales(matrix)
        return quantize_rows(matrix, bits=self.bits, group=self.group), quantize_row_scales(matrix, bits=self.bits, group=self.group)


FP8 = Form(bits=8, group=None)


@dataclass(frozen=True)
class QuantizePlainLinear(Pass):
    """bits: 8 or 4. group: inputs that share a scale, or all of a row that has fewer.

    head_bits: of the last linear, whose error no later layer evens out. fp8: linears other than the last are e4m3 with a scale per row, in
    place of integers.
    """

    name: ClassVar[str] = "quantize-plain-linear"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # against the dequantised weights; what these cost is measured per compile
    bits: int = 8
    group: int = 32
    head_bits: int = 8
    fp8: bool = False

    def requires(self, gm: GraphModule) -> str | None:
        return None if any(G.is_op(n, LINEAR) for n in gm.graph.nodes) else "an llmc.plain_linear; lower-plain-linear makes them"

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        refusals: Counter[str] = Counter()
        matches = 0
        linears = [n for n in gm.graph.nodes if G.is_op(n, LINEAR) and G.is_constant(G.args_of(n)[1])]
        head = str(G.args_of(linears[-1])[1].target) if linears else ""  # the output is logits, so the last linear makes them
        refusals["experts have no quantised kernel"] += sum(G.is_op(n, _EXPERTS) for n in gm.graph.nodes)
        readers = readers_of_constants(gm)
        for name in dict.fromkeys(str(G.args_of(n)[1].target) for n in linears):
            form = self._form(ctx.weights[name], is_head=name == head)
            reason = self._reason(ctx, name, readers[name], form)
            if reason is not None:
                refusals[reason] += 1
                continue
            for node in readers[name]:
                rewrite(gm, ctx, node, name, form)
                matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=+refusals)

    def _form(self, matrix: Constant, *, is_head: bool) -> Form:
        if self.fp8 and not is_head:
            return FP8
        return Form(bits=self.head_bits if is_head else self.bits, group=min(self.group, whole_row(matrix.shape[1])))

    def _reason(self, ctx: PassContext, name: str, readers: list[Node], form: Form) -> str | None:
        """Why a weight is kept as it is, or None."""
        if ctx.weights[name].recipe["op"] == "computed":
            return "the weight is not from the checkpoint"
        lookups = [n for n in readers if G.is_op(n, aten.embedding.default)]
        if any(not G.is_op(n, LINEAR) and n not in lookups for n in readers):
            return "something else than a linear or an embedding reads the weight"
        if lookups and (form.bits != 8 or form.group is None or ctx.weights[name].shape[1] % form.group):
            return "an embedding reads the weight, in rows of no whole groups of 8 bits"
        return None


def readers_of_constants(gm: GraphModule) -> dict[str, list[Node]]:
    """Name of each constant -> the calls that read it, in order."""
    found: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), []).extend(node.users)
    return found


def rewrite(gm: GraphModule, ctx: PassContext, node: Node, name: str, form: Form) -> None:
    """Replace a linear, or an embedding, over the matrix `name` by one over its small numbers and scales."""
    matrix = ctx.weights[name]
    names = [quantized_name(name, part) for part in ("quantized", "scales")]
    if names[0] not in ctx.weights:
        for made, constant in zip(names, form.constants(matrix), strict=True):
            ctx.weights.add(made, constant)
    group = form.group or whole_row(matrix.shape[1])
    with gm.graph.inserting_before(node):
        held, scales = (G.constant(gm, ctx.weights, made) for made in names)
        if G.is_op(node, LINEAR):
            x, _, bias = G.args_of(node)
            new = G.call(gm, overload("plain_quantized_linear"), (x, held, scales, bias, group))
        else:
            assert form.group is not None
            new = _looked_up(gm, held, scales, G.args_of(node)[1], group)
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
