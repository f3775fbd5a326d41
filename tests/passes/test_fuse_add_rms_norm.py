import pytest
import torch

from llmc.passes.fuse_add_rms_norm import FuseAddRmsNorm
from llmc.passes.fuse_rms_norm import FuseRmsNorm
from tests.passes.fusion_modules import Norm, Residual, norm_case, residual_case
from tests.passes.support import Case, assert_golden, assert_same_answers, rejects, unchanged


def normed(case: Case) -> Case:
    """The case after the pass that makes the norms."""
    return case.apply(FuseRmsNorm())[0]


def test_graph_matches_golden() -> None:
    assert_golden(FuseAddRmsNorm(), normed(residual_case(Residual())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_keep_every_bit(dtype: torch.dtype) -> None:
    assert_same_answers(FuseAddRmsNorm(), normed(residual_case(Residual(), dtype)))


def test_says_why_it_refuses() -> None:
    both, (report,) = normed(residual_case(Residual(broadcast=True))).apply(FuseAddRmsNorm())
    assert (report.result.matches, dict(report.result.refusals)) == (1, {"the summands differ in shape or dtype": 1})
    assert both.text().count("llmc.add_rms_norm(") == 1


def test_says_why_it_refuses_a_scaled_sum() -> None:
    class Scaled(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.add(x, x, alpha=2))

    assert rejects(FuseAddRmsNorm(), normed(norm_case(Scaled()))) == ["not a plain sum of two tensors"]


def test_leaves_a_norm_of_something_else_alone() -> None:
    assert unchanged(FuseAddRmsNorm(), normed(norm_case(Norm())))
