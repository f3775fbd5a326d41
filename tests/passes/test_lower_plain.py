"""Matmuls of GPU graphs: weights stay as the checkpoint holds them."""

import torch
from torch import Tensor, nn

from llmc.passes.lower_plain_experts import LowerPlainExperts
from llmc.passes.lower_plain_linear import LowerPlainLinear
from tests.passes.modules import GatedMLP, mlp_case
from tests.passes.support import Case, assert_golden, assert_same_answers, capture, fill, rejects, seeded, unchanged


class Experts(nn.Module):
    """Each row times its expert's matrix, stored [E, N, K] or turned."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.weight = nn.Parameter(torch.empty(3, 8, 12) if turned else torch.empty(3, 12, 8))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        chosen = self.weight[ids]
        return torch.bmm(x.unsqueeze(1), chosen).squeeze(1) if self.turned else torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)


def experts_case(turned: bool) -> Case:
    return capture(fill(Experts(turned)), seeded(5, 8), torch.tensor([2, 0, 0, 1, 2]), dynamic={"x": {0: "R"}, "ids": {0: "R"}})


class StoredTurned(nn.Module):
    """A weight [K, N], as GPT-2 holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(24, 40)), nn.Parameter(torch.empty(40))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x[0], self.weight)


def test_graphs_match_goldens() -> None:
    assert_golden(LowerPlainLinear(), mlp_case(GatedMLP()))
    assert_golden(LowerPlainExperts(), experts_case(turned=True))


def test_answers_stay_the_same() -> None:
    for module in (GatedMLP(gate_bias=True), StoredTurned()):
        assert_same_answers(LowerPlainLinear(), mlp_case(module))
    for turned in (False, True):
        assert_same_answers(LowerPlainExperts(), experts_case(turned))


def test_says_why_it_refuses() -> None:
    case = capture(fill(nn.Linear(8, 8), torch.float64), seeded(2, 8, dtype=torch.float64))
    assert rejects(LowerPlainLinear(), case) == ["no kernel for these dtypes"]


def test_each_leaves_the_others_matmuls_alone() -> None:
    assert unchanged(LowerPlainExperts(), mlp_case(GatedMLP()))
