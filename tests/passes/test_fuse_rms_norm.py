import pytest
import torch

from llmc.passes.fuse_rms_norm import FuseRmsNorm
from tests.passes.fusion_modules import NarrowNorm, Norm, NormOverRows, NormWithoutWeight, norm_case
from tests.passes.support import assert_golden, assert_same_answers, rejects, unchanged


@pytest.mark.parametrize("convention", ["llama", "gemma", "gpt_oss"])
def test_graph_matches_golden(convention: str) -> None:
    assert_golden(FuseRmsNorm(), norm_case(Norm(convention), torch.bfloat16), convention)


@pytest.mark.parametrize("convention", ["llama", "gemma", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_stay_the_same(convention: str, dtype: torch.dtype) -> None:
    assert_same_answers(FuseRmsNorm(), norm_case(Norm(convention), dtype))


def test_says_why_it_refuses() -> None:
    assert rejects(FuseRmsNorm(), norm_case(NarrowNorm(), torch.bfloat16)) == ["the squares are not summed in fp32"]
    assert rejects(FuseRmsNorm(), norm_case(NormWithoutWeight())) == ["no weight follows, or something else reads the quotient"]


def test_leaves_a_mean_over_rows_alone() -> None:
    assert unchanged(FuseRmsNorm(), norm_case(NormOverRows()))
