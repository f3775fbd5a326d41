"""The launches of every GPU kernel at typical sizes, over fake tensors: what a cross compile check builds and a report can list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .launch import Launch
from .registry import choose

BF16, F32 = torch.bfloat16, torch.float32


def launches_of(op: str, *args: Any) -> list[Launch]:
    """The launches, in order, that the chosen implementation of `op` makes for these (fake) arguments."""
    found: list[Launch] = []
    choose(op, *args).call(*args, launch=found.append)
    return found


def catalogue() -> dict[str, list[Launch]]:
    """Case name -> launches."""
    with FakeTensorMode():
        return {name: launches_of(op, *args) for name, (op, args) in _cases(torch.empty).items()}


def _cases(empty: Callable[..., Tensor]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    def t(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
        return empty(*sizes, dtype=dtype)

    gate, up = t(8, 2 * 14336).split(14336, dim=1)
    cases: dict[str, tuple[str, tuple[Any, ...]]] = {
        "rms_norm": ("rms_norm", (t(8, 4096), t(4096), 1e-6, 0.0, True)),
        "rms_norm widest": ("rms_norm", (t(8, 16384), t(16384), 1e-6, 1.0, False)),
        "rms_norm fp32": ("rms_norm", (t(8, 1024, dtype=F32), t(1024, dtype=F32), 1e-6, 0.0, True)),
        "add_rms_norm": ("add_rms_norm", (t(8, 4096), t(8, 4096), t(4096), 1e-6, 0.0, True)),
        "silu_mul": ("silu_mul", (gate, up)),
        "gelu_mul": ("gelu_mul", (gate, up, True)),
        "gelu_mul exact": ("gelu_mul", (gate, up, False)),
    }
    return cases
