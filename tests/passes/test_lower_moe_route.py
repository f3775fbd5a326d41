"""The choice of experts in GPU graphs: two spellings become one op."""

import pytest
import torch
from torch import Tensor, nn

from llmc.passes.lower_moe_route import LowerMoeRoute
from tests.passes.support import Case, assert_golden, assert_same_answers, capture, rejects, seeded, unchanged


def both(weights: Tensor, ids: Tensor) -> Tensor:
    """Weights and ids in one result."""
    return torch.cat([weights, ids.to(weights.dtype)], 1)


class SoftmaxFirst(nn.Module):
    """Qwen3-MoE and Mixtral: of all experts, then divided by the sum of the chosen."""

    def forward(self, logits: Tensor) -> Tensor:
        weights, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), 2)
        return both(weights / weights.sum(-1, keepdim=True), ids)


class SoftmaxAfter(nn.Module):
    """gpt-oss: of the chosen alone."""

    def forward(self, logits: Tensor) -> Tensor:
        values, ids = torch.topk(logits, 3, dim=-1)
        return both(torch.softmax(values, dim=1, dtype=values.dtype), ids)


class Bare(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        values, ids = torch.topk(logits, 2)
        return both(values, ids)


class Smallest(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        values, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), 2, largest=False)
        return both(values, ids)


class Shared(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        scores = torch.softmax(logits, -1, dtype=torch.float32)
        values, ids = torch.topk(scores, 2)
        return torch.cat([both(values, ids), scores], 1)


def case(module: nn.Module) -> Case:
    return capture(module, seeded(5, 8), dynamic={"logits": {0: "T"}})


def test_graphs_match_golden() -> None:
    assert_golden(LowerMoeRoute(), case(SoftmaxFirst()))


@pytest.mark.parametrize("module", [SoftmaxFirst(), SoftmaxAfter()])
def test_answers_stay_the_same(module: nn.Module) -> None:
    assert_same_answers(LowerMoeRoute(), case(module))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Bare(), "no softmax before or after the choice"),
        (Smallest(), "not the largest of the last dimension"),
        (Shared(), "something else reads the softmax"),
    ],
)
def test_says_why_it_refuses(module: nn.Module, reason: str) -> None:
    assert rejects(LowerMoeRoute(), case(module)) == [reason]


def test_leaves_a_softmax_alone() -> None:
    assert unchanged(LowerMoeRoute(), case(nn.Softmax(-1)))
