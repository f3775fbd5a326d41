import pytest
import torch

from llmc.passes.constant_fold_rope import ConstantFoldRope
from tests.passes.modules import LearnedRope, LengthRope, OuterProductRope, Rope, SineOfData, rope_case
from tests.passes.support import assert_golden, assert_same_answers, rejects, unchanged


def test_graph_matches_golden() -> None:
    assert_golden(ConstantFoldRope(), rope_case(Rope(torch.bfloat16), torch.bfloat16))


@pytest.mark.parametrize("kind", [Rope, OuterProductRope])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 11, 40])
def test_answers_stay_the_same(kind: type[Rope], dtype: torch.dtype, tokens: int) -> None:
    assert_same_answers(ConstantFoldRope(), rope_case(kind(dtype), dtype, tokens), torch_ops=True)


def test_tables_are_computed_constants_of_every_position() -> None:
    after, _ = rope_case(Rope()).apply(ConstantFoldRope())
    assert sorted(after.ctx.weights) == ["rope.cos_table", "rope.sin_table"]
    cos = after.ctx.weights["rope.cos_table"]
    assert cos.recipe == {"op": "computed", "key": "rope.cos_table"} and cos.shape == (64, 8)
    assert after.ctx.weights.computed["rope.cos_table"] is cos.value


@pytest.mark.parametrize(
    "kind, reason",
    [(LengthRope, "a row depends on other positions than its own"), (LearnedRope, "frequencies are not known at compile time")],
)
def test_says_why_it_refuses(kind: type[Rope], reason: str) -> None:
    assert set(rejects(ConstantFoldRope(), rope_case(kind()))) == {reason}


def test_says_why_it_refuses_a_large_table() -> None:
    assert rejects(ConstantFoldRope(max_table_bytes=1000), rope_case(Rope())) == ["the table is too large"] * 2


def test_leaves_other_sines_alone() -> None:
    assert unchanged(ConstantFoldRope(), rope_case(SineOfData()))
