"""A layer of experts in GPU graphs: sorted once, both matmuls by tile, weighed and summed by one op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.passes.combine_experts import CombineExperts
from llmc.passes.lower_plain_experts import LowerPlainExperts
from llmc.passes.sort_experts import SortExperts
from tests.passes.support import Case, assert_close, assert_golden, assert_same_answers, capture, fill, rejects, seeded, unchanged

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER = 5, 2, 3, 8, 12


class Layer(nn.Module):
    """Up, a square, down, and perhaps a bias behind each; as transformers' batched experts write it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN)), nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.up_bias, self.down_bias = ((nn.Parameter(torch.empty(EXPERTS, n)) if bias else None) for n in (INNER, HIDDEN))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, flat = x.repeat_interleave(CHOICES, dim=0), ids.reshape(-1)
        y = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1)
        y = y + self.up_bias[flat] if self.up_bias is not None else y
        y = y * y
        y = torch.bmm(self.down[flat], y.unsqueeze(-1)).squeeze(-1)
        y = y + self.down_bias[flat] if self.down_bias is not None else y
        return (y * weights.reshape(-1).unsqueeze(-1)).view(-1, CHOICES, HIDDEN).sum(1).to(x.dtype)


class Elsewhere(nn.Module):
    """Weighted rows that something else reads."""

    def forward(self, y: Tensor, weights: Tensor) -> Tensor:
        weighted = (y * weights.reshape(-1).unsqueeze(-1)).view(-1, CHOICES, HIDDEN)
        return weighted.sum(1) + weighted[:, 0]


class SomeTokens(nn.Module):
    """The last layer, of which only the rows that need logits are read."""

    def forward(self, y: Tensor, weights: Tensor) -> Tensor:
        weighted = (y * weights.reshape(-1).unsqueeze(-1)).view(-1, CHOICES, HIDDEN)
        return weighted[torch.tensor([4, 1])].sum(1)


class Wider(nn.Module):
    """A sum that stays in fp32 while the rows are bf16."""

    def forward(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y * weights.reshape(-1).unsqueeze(-1)).view(-1, CHOICES, HIDDEN).sum(1)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[2, 0], [0, 1], [1, 2], [2, 1], [0, 2]])
    return seeded(TOKENS, HIDDEN, dtype=dtype), seeded(TOKENS, CHOICES, seed=1).softmax(1), ids


def layer_case(bias: bool = False, dtype: torch.dtype = torch.float32, *, open_size: bool = False) -> Case:
    shapes = {name: {0: "T"} for name in ("x", "weights", "ids")} if open_size else None
    return capture(fill(Layer(bias), dtype), *arguments(dtype), dynamic=shapes)


def rows_case(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    return capture(module, seeded(TOKENS * CHOICES, HIDDEN, dtype=dtype), seeded(TOKENS, CHOICES, seed=1))


def test_graphs_match_goldens() -> None:
    lowered, _ = layer_case(bias=True).apply(LowerPlainExperts())
    assert_golden(SortExperts(), lowered)
    assert_golden(CombineExperts(), layer_case(open_size=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_answers_stay_the_same(bias: bool, dtype: torch.dtype) -> None:
    case = layer_case(bias, dtype)
    lowered, _ = case.apply(LowerPlainExperts())
    assert_same_answers(SortExperts(), lowered)
    assert_same_answers(CombineExperts(), case)
    whole, reports = case.apply(LowerPlainExperts(), CombineExperts(), SortExperts())
    assert [report.result.matches for report in reports] == [2, 1, 2]
    assert_close(case.run(), whole.run(), CombineExperts())


def test_the_rows_of_some_tokens_are_taken_behind_the_sum() -> None:
    assert_same_answers(CombineExperts(), rows_case(SomeTokens()))


def test_both_matmuls_share_one_sort_and_rows_are_not_repeated() -> None:
    lowered, _ = layer_case(bias=True).apply(LowerPlainExperts())
    text = lowered.apply(SortExperts())[0].text()
    assert [text.count(f"= {op}(") for op in ("llmc.moe_sort", "llmc.moe_linear", "repeat_interleave", "index.Tensor")] == [1, 2, 0, 0]


def test_says_why_it_refuses() -> None:
    lowered, _ = layer_case(open_size=True).apply(LowerPlainExperts())
    assert rejects(SortExperts(), lowered) == ["the sizes are open"] * 2
    assert rejects(CombineExperts(), rows_case(Elsewhere())) == ["something else reads the weighted rows"]
    assert rejects(CombineExperts(), rows_case(Wider(), torch.bfloat16)) == ["the sum is not brought back to the dtype of the rows"]


def test_leave_other_sums_alone() -> None:
    assert unchanged(CombineExperts(), capture(lambda x: x.sum(1), seeded(3, 4, 5)))
    assert unchanged(SortExperts(), layer_case())
