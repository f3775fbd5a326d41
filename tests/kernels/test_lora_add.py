"""The compiled lora_add against its reference: rows without an adapter keep their bits, and a row has the same bits in every batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.errors import InternalError
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.lora_add import reference
from llmc.kernels.native import NativeKernels
from llmc.passes import TOLERANCES
from tests.kernels.paged_attention_world import kernel_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANK, SLOTS = 6, 3  # a rank that is no multiple of the kernel's tile


@pytest.fixture(scope="module", params=[level.name for level in runnable_levels()[:1] + runnable_levels()[-1:]])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    return NativeKernels(build_kernels(request.param, kernel_cache(tmp_path_factory)).kernels_so, num_threads=2)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layout(k: int, sizes: list[int], adapted: list[bool]) -> tuple[list[int], int]:
    """Offsets of the parts and the length of a pool row, with a gap before the first part."""
    offsets, end = [], 5
    for size, has in zip(sizes, adapted, strict=True):
        offsets.append(end if has else -1)
        end += RANK * (k + size) if has else 0
    return offsets, end + 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, k, sizes", [(1, 64, [48]), (7, 17, [33]), (70, 128, [64, 16, 21]), (37, 40, [7, 130]), (0, 16, [16])])
def test_agrees_with_the_reference(
    native: NativeKernels, dtype: torch.dtype, pool_dtype: torch.dtype, rows: int, k: int, sizes: list[int]
) -> None:
    offsets, length = layout(k, sizes, [index != 1 for index in range(len(sizes))])
    pool = (numbers(SLOTS, length, dtype=torch.float32) * 0.2).to(pool_dtype)
    y, x = numbers(rows, sum(sizes), dtype=dtype, seed=1), numbers(rows, 2 * k, dtype=dtype, seed=2)[:, :k]
    slots = torch.randint(-1, SLOTS, (rows,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    found, expected = native.lora_add(y, x, slots, pool, RANK, sizes, offsets), reference(y, x, slots, pool, RANK, sizes, offsets)
    within = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=within.rtol, atol=within.atol)
    assert torch.equal(found[slots < 0], y[slots < 0]), "a row without adapter keeps its bits"
    if len(sizes) > 1:
        unadapted = slice(sizes[0], sizes[0] + sizes[1])
        assert torch.equal(found[:, unadapted], y[:, unadapted]), "so does a part that has none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(native: NativeKernels, dtype: torch.dtype) -> None:
    k, sizes = 300, [200, 72]
    offsets, length = layout(k, sizes, [True, True])
    pool = numbers(SLOTS, length, dtype=dtype)
    y, x = numbers(90, sum(sizes), dtype=dtype, seed=1), numbers(90, k, dtype=dtype, seed=2)
    slots = torch.tensor([0] * 40 + [-1, 1] * 10 + [2] * 30, dtype=torch.int32)
    together = native.lora_add(y, x, slots, pool, RANK, sizes, offsets)
    for row in (0, 3, 33, 40, 41, 59, 60, 89):
        alone = native.lora_add(y[row : row + 1], x[row : row + 1], slots[row : row + 1], pool, RANK, sizes, offsets)
        assert torch.equal(alone[0], together[row])
    one_thread = NativeKernels.__new__(NativeKernels)
    one_thread.library, one_thread.num_threads = native.library, 1
    assert torch.equal(one_thread.lora_add(y, x, slots, pool, RANK, sizes, offsets), together), "threads change no bit"


def test_an_empty_slot_adds_nothing(native: NativeKernels) -> None:
    y, x = numbers(5, 48, dtype=torch.float32), numbers(5, 20, dtype=torch.float32, seed=1)
    pool, slots = torch.zeros(SLOTS, RANK * 68), torch.tensor([0, 1, -1, 2, 0], dtype=torch.int32)
    assert torch.equal(native.lora_add(y, x, slots, pool, RANK, [48], [0]), y)


@pytest.mark.parametrize(
    "change",
    [
        {"slots": torch.tensor([0, 3], dtype=torch.int32)},
        {"slots": torch.tensor([-2, 0], dtype=torch.int32)},
        {"sizes": [47]},
        {"offsets": [1]},
        {"offsets": [-2]},
        {"rank": 0},
    ],
    ids=str,
)
def test_refuses_what_would_read_elsewhere(native: NativeKernels, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "y": numbers(2, 48, dtype=torch.float32),
        "x": numbers(2, 20, dtype=torch.float32),
        "slots": torch.tensor([0, 2], dtype=torch.int32),
        "pool": torch.zeros(SLOTS, RANK * 68),
        "rank": RANK,
        "sizes": [48],
        "offsets": [0],
    }
    native.lora_add(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="refused its arguments"):
        native.lora_add(**{**arguments, **change})  # type: ignore[arg-type]
