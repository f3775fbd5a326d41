import pytest

from llmc.passes.merge_qkv import MergeQKV
from tests.passes.modules import Attention, AttentionOverOneLinear, AttentionOverTwoInputs, attention_case
from tests.passes.support import assert_golden, assert_same_answers, rejects, unchanged


def test_graph_matches_golden() -> None:
    assert_golden(MergeQKV(), attention_case(Attention()))


@pytest.mark.parametrize("bias", [False, True])
def test_answers_stay_the_same(bias: bool) -> None:
    assert_same_answers(MergeQKV(), attention_case(Attention((bias, bias, bias))))


def test_weights_and_biases_become_one_recipe_each() -> None:
    after, _ = attention_case(Attention((True, True, True))).apply(MergeQKV())
    assert sorted(after.ctx.weights) == ["qkv_merged.bias", "qkv_merged.weight"]
    assert [r["name"] for r in after.ctx.weights["qkv_merged.bias"].recipe["inputs"]] == ["q_proj.bias", "k_proj.bias", "v_proj.bias"]


def test_says_why_it_refuses_mixed_biases() -> None:
    assert rejects(MergeQKV(), attention_case(Attention((True, False, True)))) == ["some have a bias and some have none"]


def test_says_why_it_refuses_different_inputs() -> None:
    assert rejects(MergeQKV(), attention_case(AttentionOverTwoInputs())) == ["the linears read different inputs"]


def test_leaves_one_linear_alone() -> None:
    assert unchanged(MergeQKV(), attention_case(AttentionOverOneLinear()))
