"""quantize-linear: its graph, the answers of the dequantised weights, how near those are to the plain ones, what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmc.errors import PassError
from llmc.kernels.quantized_linear.reference import dequantize
from llmc.passes import graph as G
from llmc.passes.graph import is_op
from llmc.passes.lower_experts import LowerExperts
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.quantize_linear import QuantizeLinear
from tests.passes.support import Case, assert_close, assert_golden, capture, fill, quantize, seeded, unchanged
from tests.passes.test_lower_linear import tied


class Experts(nn.Module):
    """A linear, then one expert per row."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.weight = nn.Linear(24, 24), nn.Parameter(torch.empty(3, 40, 24))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(self.weight[ids], self.proj(x).unsqueeze(2)).squeeze(2)


def lowered(case: Case) -> Case:
    return case.apply(LowerLinear(), LowerExperts())[0]


def dequantized(case: Case, bits: dict[str, int]) -> Case:
    """The case with each named matrix [N, K] replaced by what its quantised form stands for."""
    sources = dict(case.sources)
    for name, width in bits.items():
        w = sources[name].t() if "conv" in name else sources[name]
        found = dequantize(*quantize(w, width, 32), *w.shape, 32)
        sources[name] = found.t() if "conv" in name else found
    return Case(case.gm, case.ctx, sources, case.args)


def test_graph_matches_golden() -> None:
    assert_golden(QuantizeLinear(bits=4), lowered(tied()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_are_those_of_the_dequantised_weights(dtype: torch.dtype, bits: int) -> None:
    case = lowered(tied(dtype))
    after, (report,) = case.apply(QuantizeLinear(bits=bits))
    assert report.result.matches == 4
    plain = dequantized(case, {"proj.weight": bits, "conv_weight": bits, "wte.weight": 8})  # the head keeps 8 bits, and is the embedding
    assert_close(plain.run(), after.run(), QuantizeLinear())


@pytest.mark.parametrize("group", [32, 64, 4096])
def test_a_group_ends_with_the_row(group: int) -> None:
    after, _ = lowered(tied()).apply(QuantizeLinear(group=group))
    calls = [G.args_of(n) for n in after.gm.graph.nodes if G.is_op(n, "llmc.quantized_linear.default")]
    found = {str(args[1].target): (after.ctx.weights[str(args[2].target)].shape[1], args[5]) for args in calls}
    width = {name: int(G.val(args[0]).shape[-1]) for args in calls for name in [str(args[1].target)]}
    assert len(found) > 1
    for name, (scales, used) in found.items():
        assert used == min(group, -(-width[name] // 32) * 32) and scales == -(-width[name] // used)


def test_eight_bits_lie_near_the_plain_answer() -> None:
    case = lowered(tied())
    expected, found = (c.run()[0] for c in (case, case.apply(QuantizeLinear())[0]))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_tensors_are_integers_with_scales_held_once() -> None:
    after, _ = lowered(tied()).apply(QuantizeLinear(bits=4))
    held = {name: after.ctx.weights[name].dtype for name in after.ctx.weights}
    assert held == {
        "wte.quantized_weight": torch.int8, "wte.scales_weight": torch.float32,
        "proj.quantized_weight": torch.uint8, "proj.scales_weight": torch.float32, "proj.bias": torch.float32,
        "quantized_transposed_conv_weight": torch.uint8, "scales_transposed_conv_weight": torch.float32, "conv_bias": torch.float32,
    }  # fmt: skip
    assert not any(is_op(n, "llmc.linear.default", "llmc.embedding.default") for n in after.gm.graph.nodes)


def test_keeps_experts_and_says_so() -> None:
    case = lowered(capture(fill(Experts()), seeded(6, 24), torch.tensor([0, 2, 1, 1, 0, 2])))
    after, (report,) = case.apply(QuantizeLinear())
    assert (report.result.matches, dict(report.result.refusals)) == (1, {"experts have no quantised kernel": 1})
    assert any(is_op(n, "llmc.grouped_linear.default") for n in after.gm.graph.nodes)


def test_requires_lowered_linears() -> None:
    with pytest.raises(PassError, match="requires what the graph lacks: an llmc.linear"):
        unchanged(QuantizeLinear(), tied())
    assert "is not quantised" in str(QuantizeLinear().ensures(lowered(tied()).gm))
