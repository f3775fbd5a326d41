"""Fusions of silu(gate) * up and gelu(gate) * up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmc.passes import Pass
from llmc.passes.common_subexpressions import CommonSubexpressions
from llmc.passes.fuse_gelu_mul import FuseGeluMul
from llmc.passes.fuse_silu_mul import FuseSiluMul
from tests.passes.support import assert_golden, assert_same_answers, capture, rejects, seeded, unchanged

Product = Callable[[Tensor, Tensor], Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def tanh_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return up * F.gelu(gate, approximate="tanh")


def two(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return seeded(3, 8, dtype=dtype), seeded(3, 8, dtype=dtype, seed=1)


CASES = [(FuseSiluMul(), swiglu), (FuseSiluMul(), lambda gate, up: up * F.silu(gate)), (FuseGeluMul(), geglu), (FuseGeluMul(), tanh_geglu)]


def test_graphs_match_goldens() -> None:
    assert_golden(FuseSiluMul(), capture(swiglu, *two()))
    assert_golden(FuseGeluMul(), capture(tanh_geglu, *two()))


@pytest.mark.parametrize("applied, product", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_stay_the_same(applied: Pass, product: Product, dtype: torch.dtype) -> None:
    assert_same_answers(applied, capture(product, *two(dtype)))


@pytest.mark.parametrize("applied, act", [(FuseSiluMul(), F.silu), (FuseGeluMul(), F.gelu)])
def test_says_why_it_refuses(applied: Pass, act: Callable[[Tensor], Tensor]) -> None:
    def shared(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up + act(gate).mean()

    once, _ = capture(shared, *two()).apply(CommonSubexpressions())
    assert rejects(applied, once) == ["something else reads the activation"]
    assert rejects(applied, capture(lambda gate, up: act(gate) * up[:1], *two())) == ["gate and up differ in shape"]
    assert rejects(applied, capture(lambda gate, up: act(gate) * up, *two(torch.float64))) == ["no kernel for these dtypes"]


def test_leaves_the_other_activation_alone() -> None:
    assert unchanged(FuseSiluMul(), capture(geglu, *two()))
    assert unchanged(FuseGeluMul(), capture(swiglu, *two()))
