from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmc.passes.no_op_elimination import NoOpElimination
from tests.passes.support import Case, assert_golden, assert_same_answers, capture, rejects, seeded, unchanged

aten = torch.ops.aten


def noise(x: Tensor) -> Tensor:
    """Everything export leaves behind: casts to the same dtype, views of the same shape, dropout, detach, slices of all."""
    y = nn.functional.dropout(x.to(torch.float32).contiguous(), 0.5, training=False)
    y = (y.view(y.shape) + 1).type_as(x).detach()
    return (y[:, 0:].expand(y.shape) * 2).clone()


def case_of(function: Callable[..., Any], *args: Tensor, dtype: torch.dtype = torch.float32) -> Case:
    return capture(function, *(args or (seeded(4, 6, dtype=dtype),)))


def test_graph_matches_golden() -> None:
    assert_golden(NoOpElimination(), case_of(noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_stay_the_same(dtype: torch.dtype) -> None:
    assert_same_answers(NoOpElimination(), case_of(noise, dtype=dtype))


def test_says_why_it_keeps_a_copy_that_is_returned() -> None:
    case = case_of(lambda x: x.clone())
    assert rejects(NoOpElimination(), case) == ["an output would share memory with an input"]


def test_leaves_real_work_alone() -> None:
    assert unchanged(NoOpElimination(), case_of(lambda x: x.to(torch.bfloat16).t().contiguous()[1:].reshape(-1)))


def test_erases_assertions() -> None:
    case = case_of(lambda x: x + 1)
    x, add = list(case.gm.graph.nodes)[:2]
    with case.gm.graph.inserting_before(add):
        case.gm.graph.call_function(aten._assert_tensor_metadata.default, (x,), {"dtype": torch.float32})
    assert NoOpElimination().ensures(case.gm) is not None
    after, _ = case.apply(NoOpElimination())
    assert len(after.gm.graph.nodes) == 3 and NoOpElimination().ensures(after.gm) is None
