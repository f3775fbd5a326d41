"""What the tests of linear, embedding and grouped_linear share: packed tensors, and the kernels of every level this machine can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.native import NativeKernels
from llmc.kernels.packing import pack

from .paged_attention_world import kernel_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Against the same sum in fp64: half a unit of the result's last place, and for fp32 what K roundings of a running sum may add.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}


def native_fixture() -> Any:
    """A fixture: the matmul kernels built for each level this machine can run, one thread per call unless a test sets more."""

    @pytest.fixture(scope="session", params=[level.name for level in runnable_levels()])
    def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
        return NativeKernels(build_kernels(request.param, kernel_cache(tmp_path_factory)).kernels_so, num_threads=1)

    return native


def packed(w: Tensor) -> Tensor:
    """W [N, K] or [E, N, K] in the packed layout."""
    if w.dim() == 3:
        return torch.stack([packed(expert) for expert in w])
    if w.dtype == torch.bfloat16:
        return torch.from_numpy(pack(w.contiguous().view(torch.uint16).numpy())).view(torch.bfloat16)
    return torch.from_numpy(pack(w.contiguous().numpy()))


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y: Tensor, exact: Tensor, k: int) -> None:
    """y against fp64 `exact`, the error measured in units of what a sum of k products of unit size may reach."""
    worst = ((y.double() - exact).abs() / (exact.abs() + k**0.5)).max().item() if y.numel() else 0.0
    assert worst <= TOLERANCE[y.dtype], f"relative error {worst:.2e} over {TOLERANCE[y.dtype]:.1e}"
