import pytest
import torch

from llmc.passes.merge_gate_up import MergeGateUp
from tests.passes.modules import GatedMLP, GatedOverTwoInputs, SquaredLinear, mlp_case
from tests.passes.support import assert_golden, assert_same_answers, rejects, unchanged


def test_graph_matches_golden() -> None:
    assert_golden(MergeGateUp(), mlp_case(GatedMLP()))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_written_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_stay_the_same(activation: str, dtype: torch.dtype) -> None:
    assert_same_answers(MergeGateUp(), mlp_case(GatedMLP(activation, True, True), dtype))


def test_says_why_it_refuses() -> None:
    assert rejects(MergeGateUp(), mlp_case(GatedMLP(gate_bias=True))) == ["some have a bias and some have none"]
    assert rejects(MergeGateUp(), mlp_case(GatedOverTwoInputs())) == ["the linears read different inputs"]
    assert rejects(MergeGateUp(), mlp_case(GatedMLP(up_width=1))) == ["gate and up differ in width"]


def test_leaves_a_linear_times_its_own_activation_alone() -> None:
    assert unchanged(MergeGateUp(), mlp_case(SquaredLinear()))
