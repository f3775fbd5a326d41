"""paged_attention: the bits of a row are those of its sequence alone, however it was batched, chunked, placed or threaded."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmc.kernels.paged_attention.compiled import CompiledPagedAttention

from .paged_attention_world import Shape, World, kernel_fixture

kernel = kernel_fixture()
LENGTH = 300  # crosses chunks of 64 and a segment of 256 keys


def rows_of(kernel: CompiledPagedAttention, shape: Shape, steps: list[dict[str, int]], block_seed: int = 0) -> dict[str, Tensor]:
    """Run steps; per sequence, its output rows in order of position."""
    world = World(shape, seed=1, block_seed=block_seed)
    caches = world.caches()
    found: dict[str, list[Tensor]] = {}
    for step in steps:
        batch = world.batch(step)
        out = batch.call(kernel, caches)
        for name, rows in batch.rows.items():
            found.setdefault(name, []).append(out[rows])
    return {name: torch.cat(parts) for name, parts in found.items()}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def chunks(cuts: list[int]) -> list[dict[str, int]]:
    """Steps of sequence a that end at the given positions and at LENGTH."""
    return [{"a": after - before} for before, after in pairwise([0, *sorted(set(cuts) - {0, LENGTH}), LENGTH])]


SHAPES = [
    Shape(),
    Shape(head_dim=128, num_heads=8, num_kv_heads=1, dtype=torch.float32),
    Shape(head_dim=80, num_heads=6, num_kv_heads=2, dtype=torch.float16),
    Shape(head_dim=40, num_heads=7, num_kv_heads=1),
    Shape(num_heads=3, num_kv_heads=3, window=70, softcap=20.0, sinks_dtype=torch.float32),
    Shape(num_heads=10, num_kv_heads=2, window=129, head_dim=24, dtype=torch.float32),
    Shape(block_size=24, head_dim=32),
    Shape(head_dim=96, num_heads=16, num_kv_heads=2),  # enough heads of a group for tiles in decode too, where a processor has them
]
shapes = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"d{s.head_dim}-h{s.num_heads}.{s.num_kv_heads}-b{s.block_size}-w{s.window}"
)


@shapes
@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 65, 299])
def test_chunked_as_whole(kernel: CompiledPagedAttention, shape: Shape, chunk: int) -> None:
    whole = rows_of(kernel, shape, [{"a": LENGTH}])["a"]
    assert_same_bits(rows_of(kernel, shape, chunks(list(range(0, LENGTH, chunk))))["a"], whole)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_extreme_values_chunked_as_whole(kernel: CompiledPagedAttention, head_dim: int, chunk: int) -> None:
    """Products and sums below the smallest normal number, and infinite values from some position on."""
    shape = Shape(extreme=True, head_dim=head_dim)
    whole = rows_of(kernel, shape, [{"a": LENGTH}])["a"]
    assert whole[:220].isfinite().all()
    assert not whole[220:].isfinite().all()
    assert_same_bits(rows_of(kernel, shape, chunks(list(range(0, LENGTH, chunk))))["a"], whole)


@shapes
def test_alone_as_in_a_batch_of_eight(kernel: CompiledPagedAttention, shape: Shape) -> None:
    """Prompts of other lengths around it, then decode with sequences that come, stay empty and go."""
    lengths = {"a": 270, "b": 3, "c": 64, "d": 0, "e": 111, "f": 1, "g": 257, "h": 30}
    together = rows_of(kernel, shape, [lengths, *(dict.fromkeys("hgfedcba"[i:], 1) for i in range(6)), {"a": 5, "e": 1}])
    for name in "ahe":
        count = len(together[name])
        assert_same_bits(together[name], rows_of(kernel, shape, [{name: count}])[name])


@shapes
def test_block_ids_leave_no_trace(kernel: CompiledPagedAttention, shape: Shape) -> None:
    steps = [{"a": 270, "b": 20}, {"a": 1, "b": 1}]
    assert_same_bits(rows_of(kernel, shape, steps, block_seed=5)["a"], rows_of(kernel, shape, steps, block_seed=6)["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_size_leaves_no_trace(kernel: CompiledPagedAttention, dtype: torch.dtype) -> None:
    steps = [{"a": 270}, {"a": 1}]
    want = rows_of(kernel, Shape(dtype=dtype), steps)["a"]
    for block_size in (8, 24, 32, 128):
        assert_same_bits(rows_of(kernel, Shape(dtype=dtype, block_size=block_size), steps)["a"], want)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
def test_threads_leave_no_trace(kernel: CompiledPagedAttention, shape: Shape) -> None:
    """Decode at a long context is split over segments once there are more threads than heads to share out."""
    steps = [{"a": 390}, {"a": 1}, {"a": 1, "b": 70}, {"a": 1, "b": 1}]
    want = rows_of(kernel, shape, steps)
    for threads in (2, 5):
        kernel.num_threads = threads
        try:
            got = rows_of(kernel, shape, steps)
        finally:
            kernel.num_threads = 1
        for name, rows in want.items():
            assert_same_bits(got[name], rows)


@pytest.mark.parametrize("threads", [2, 3])
def test_split_decode_over_many_segments(kernel: CompiledPagedAttention, threads: int) -> None:
    shape = Shape(num_heads=4, num_kv_heads=1, head_dim=128)
    steps = [{"a": 1100}, {"a": 1}, {"a": 1}, {"a": 3}]
    want = rows_of(kernel, shape, steps)["a"]
    kernel.num_threads = threads
    try:
        got = rows_of(kernel, shape, steps)["a"]
    finally:
        kernel.num_threads = 1
    assert_same_bits(got, want)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, LENGTH - 1), max_size=12), which=st.integers(0, len(SHAPES) - 1))
def test_any_chunking(kernel: CompiledPagedAttention, cuts: list[int], which: int) -> None:
    whole = rows_of(kernel, SHAPES[which], [{"a": LENGTH}])["a"]
    assert_same_bits(rows_of(kernel, SHAPES[which], chunks(cuts))["a"], whole)
