import pytest
import torch
from torch import Tensor, nn

from llmc.passes.lower_experts import LowerExperts
from tests.passes.support import Case, assert_golden, assert_same_answers, capture, fill, rejects, seeded, unchanged


class Experts(nn.Module):
    """Gathered expert matrices, as captured: [E, N, K] times a column, then a row times [E, K, N]."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.shared, self.up, self.down = shared, nn.Parameter(torch.empty(3, 20, 12)), nn.Parameter(torch.empty(3, 20, 12))

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        up = self.up[expert_ids]
        h = torch.bmm(up, x.unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(h.unsqueeze(1), self.down[expert_ids]).squeeze(1)
        return h + up.sum() + self.down.sum() if self.shared else h


class RowsPerExpert(nn.Module):
    """A batch of rows per gathered matrix, not one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 20, 12))

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        return torch.bmm(self.up[expert_ids], x)


def experts(module: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    args = (seeded(5, 12, dtype=dtype), torch.tensor([2, 0, 0, 1, 2]))
    return capture(fill(module, dtype), *args, dynamic={"x": {0: "R"}, "expert_ids": {0: "R"}})


def test_graph_matches_golden() -> None:
    assert_golden(LowerExperts(), experts(Experts()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_stay_the_same(dtype: torch.dtype) -> None:
    assert_same_answers(LowerExperts(), experts(Experts(), dtype))


def test_says_why_it_refuses() -> None:
    assert rejects(LowerExperts(), experts(Experts(shared=True))) == [
        "something else reads the gathered weights",
        "something else than an expert matmul reads the weights",
    ]
    case = capture(fill(RowsPerExpert()), seeded(5, 12, 4), torch.tensor([2, 0, 0, 1, 2]))
    assert rejects(LowerExperts(), case) == ["not one row per gathered matrix"]


def test_leaves_products_of_activations_alone() -> None:
    assert unchanged(LowerExperts(), capture(lambda x: torch.bmm(x, x.transpose(1, 2)), seeded(2, 4, 4)))
