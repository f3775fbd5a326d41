from torch import Tensor

from llmc.passes.common_subexpressions import CommonSubexpressions
from tests.passes.modules import Attention, attention_case
from tests.passes.support import assert_golden, assert_same_answers, capture, seeded, unchanged


def twice(x: Tensor) -> Tensor:
    return x.view(2, -1).cos() + x.view(2, -1).cos() * x.view(-1, 2).t().sum(1, keepdim=True)


def nearly(x: Tensor) -> Tensor:
    """1, 1.0 and True are equal as keys, and other arguments."""
    return (x + 1) * (x + 1.0) - x.sum(0, True) + x.sum(0, False)


def test_graph_matches_golden() -> None:
    assert_golden(CommonSubexpressions(), capture(twice, seeded(8)))


def test_answers_stay_the_same() -> None:
    assert_same_answers(CommonSubexpressions(), capture(twice, seeded(8)))


def test_leaves_different_arguments_alone() -> None:
    assert unchanged(CommonSubexpressions(), capture(nearly, seeded(3, 3)))


class WithCacheReads(Attention):
    """The cache is read before and after attention writes to it: two values."""

    def forward(
        self, x: Tensor, slots: Tensor, tables: Tensor, seq_lens: Tensor, starts: Tensor, k_cache_0: Tensor, v_cache_0: Tensor
    ) -> Tensor:
        before = k_cache_0.sum()
        return super().forward(x, slots, tables, seq_lens, starts, k_cache_0, v_cache_0) * (k_cache_0.sum() - before)


def test_leaves_reads_of_a_written_cache_alone() -> None:
    assert unchanged(CommonSubexpressions(), attention_case(WithCacheReads()))
