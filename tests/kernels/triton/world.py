"""What the Triton tests share: the device, poisoned results, tolerances."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import tests.kernels.triton_interpreter  # noqa: F401

# Largest error relative to the largest magnitude in the reference: a few units of the last place of the type.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)


def random(*sizes: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values, the same for the same torch seed whatever the device."""
    return (torch.randn(*sizes) * scale).to(dtype).to(DEVICE)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `new_empty` and `torch.empty` give with NaN (integers: a huge negative number), so that an unwritten result shows."""
    make, make_new = torch.empty, Tensor.new_empty

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else max(-(2**30), torch.iinfo(x.dtype).min))

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(make(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda self, *a, **k: poison(make_new(self, *a, **k))),
    ):
        yield


def assert_close(found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Same sizes, dtype and, within the dtype's tolerance times `factor`, values; `expected` may be of higher precision."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert not found.isnan().any(), "a result was not written, or a NaN was read"
    if not found.numel():
        return
    wide, truth = found.double().cpu(), expected.double().cpu()
    error, magnitude = (wide - truth).abs().max().item(), max(truth.abs().max().item(), 1e-3)
    assert error <= factor * TOLERANCE[found.dtype] * magnitude, f"error {error} of {magnitude}"


def same_bits(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> bool:
    """Bit for bit equal, NaN and signed zeros included."""
    pairs = [(a, b)] if isinstance(a, Tensor) and isinstance(b, Tensor) else list(zip(a, b, strict=True))
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        x.shape == y.shape and torch.equal(x.contiguous().view(views[x.itemsize]), y.contiguous().view(views[y.itemsize])) for x, y in pairs
    )
