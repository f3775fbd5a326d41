"""paged_attention: every build of the kernel against the reference, over many steps, shapes and kinds of batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.errors import InternalError
from llmc.kernels.paged_attention import fake, reference
from llmc.kernels.paged_attention.compiled import CompiledPagedAttention

from .paged_attention_world import Shape, World, kernel_fixture

kernel = kernel_fixture()

# fp32 rounding of sums over a few hundred keys; then one rounding of the result to the dtype.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1.6e-2)}


def assert_parity(kernel: CompiledPagedAttention, shape: Shape, steps: list[dict[str, int]], seed: int = 0, padding: int = 0) -> None:
    """Run the same steps through kernel and reference, each with its own caches; every result agrees, every step."""
    world = World(shape, seed)
    ours, theirs = world.caches(), world.caches()
    for step in steps:
        batch = world.batch(step, padding=padding)
        got, want = batch.call(kernel, ours), batch.call(reference, theirs)
        atol, rtol = TOLERANCE[shape.dtype]
        torch.testing.assert_close(got, want, atol=atol, rtol=rtol)
        if padding:
            assert torch.count_nonzero(got[-padding:]) == 0


PROMPTS = [{"a": 70, "b": 5, "c": 0}, {"a": 1, "b": 1}, {"d": 33, "a": 1, "c": 1}, {"d": 1}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 256, 264])
def test_head_dims(kernel: CompiledPagedAttention, head_dim: int, dtype: torch.dtype) -> None:
    assert_parity(kernel, Shape(head_dim=head_dim, dtype=dtype), PROMPTS)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 71])
def test_group_sizes(kernel: CompiledPagedAttention, group: int) -> None:
    assert_parity(kernel, Shape(num_heads=group * 2, num_kv_heads=2, head_dim=32), PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 48, 128])
def test_block_sizes(kernel: CompiledPagedAttention, block_size: int, dtype: torch.dtype) -> None:
    assert_parity(kernel, Shape(block_size=block_size, dtype=dtype), PROMPTS)


@pytest.mark.parametrize("window", [1, 7, 16, 64, 100, 300])
def test_windows_read_no_block_that_left(kernel: CompiledPagedAttention, window: int) -> None:
    """Table entries wholly behind the window are -1 in every batch of a World with a window."""
    assert_parity(kernel, Shape(window=window), [{"a": 290, "b": 40}, {"a": 1, "b": 1}, {"a": 90}, {"a": 1}])


@pytest.mark.parametrize("sinks_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0, 50.0])
def test_softcap_and_sinks(kernel: CompiledPagedAttention, softcap: float, sinks_dtype: torch.dtype | None) -> None:
    shape = Shape(softcap=softcap, sinks_dtype=sinks_dtype, window=20, query_scale=4.0)
    assert_parity(kernel, shape, PROMPTS)


def test_long_context_crosses_segments(kernel: CompiledPagedAttention) -> None:
    assert_parity(kernel, Shape(num_heads=4, num_kv_heads=1), [{"a": 700, "b": 255}, {"a": 1, "b": 1}, {"b": 1}, {"a": 70, "b": 1}])


def test_large_scores_stay_finite(kernel: CompiledPagedAttention) -> None:
    assert_parity(kernel, Shape(query_scale=60.0, dtype=torch.float32), PROMPTS)


@pytest.mark.parametrize("merged", [True, False])
def test_padding_rows_and_slices_of_merged_qkv(kernel: CompiledPagedAttention, merged: bool) -> None:
    assert_parity(kernel, Shape(merged_qkv=merged), PROMPTS, padding=3)


def test_only_padding(kernel: CompiledPagedAttention) -> None:
    """A captured size without a sequence in it: nothing is written, everything is zero."""
    world = World(Shape(), 0)
    caches = world.caches()
    out = world.batch({}, padding=4).call(kernel, caches)
    assert torch.count_nonzero(out) == 0
    assert all(torch.count_nonzero(cache) == 0 for cache in caches)


def test_no_tokens(kernel: CompiledPagedAttention) -> None:
    world = World(Shape(), 0)
    assert world.batch({}).call(kernel, world.caches()).shape == (0, 4, 64)


def test_queries_before_position_zero_are_zero(kernel: CompiledPagedAttention) -> None:
    """More query rows than keys: the first rows see nothing, sinks or not."""
    for sinks_dtype in (None, torch.float32):
        world = World(Shape(sinks_dtype=sinks_dtype), 0)
        batch = world.batch({"a": 6})
        batch.seq_lens[0] = 4
        out = batch.call(kernel, world.caches())
        assert torch.count_nonzero(out[:2]) == 0
        assert torch.count_nonzero(out[2:]) > 0


def test_what_lies_beyond_a_sequence_is_never_used(kernel: CompiledPagedAttention) -> None:
    """NaN in every unwritten place of the caches, and in later tokens of the same chunk, does not come through."""
    for block_size in (8, 16):
        world = World(Shape(block_size=block_size, window=33), 0)
        caches = [torch.full_like(cache, float("nan")) for cache in world.caches()]
        batch = world.batch({"a": 75})
        batch.k[61:], batch.v[61:] = float("nan"), float("nan")  # 61: some tile of rows holds tokens on both sides
        out = batch.call(kernel, caches)
        assert out[:61].isfinite().all()
        assert out[61:].isnan().all()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("block_tables", 10_000, "block id"),
        ("block_tables", -1, "block id"),
        ("slot_mapping", 1 << 40, "slot"),
        ("seq_lens", -1, "sequence length"),
        ("seq_lens", 1 << 20, "sequence length"),
        ("query_start_loc", 7, "query_start_loc"),
    ],
)
def test_refuses_without_writing(kernel: CompiledPagedAttention, field: str, value: int, says: str) -> None:
    world = World(Shape(), 0)
    batch, caches = world.batch({"a": 5}), world.caches()
    getattr(batch, field).fill_(value)
    with pytest.raises(InternalError, match=says):
        batch.call(kernel, caches)
    assert all(torch.count_nonzero(cache) == 0 for cache in caches)


@pytest.mark.parametrize("change", [{"window": -1}, {"softcap": -1.0}, {"scale": float("nan")}])
def test_refuses_bad_numbers(kernel: CompiledPagedAttention, change: dict[str, float]) -> None:
    world = World(Shape(), 0)
    batch = world.batch({"a": 5})
    vars(batch).update(change)
    with pytest.raises(InternalError, match="must not be negative"):
        batch.call(kernel, world.caches())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_any_steps(kernel: CompiledPagedAttention, data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    shape = Shape(
        num_heads=kv_heads * data.draw(st.integers(1, 9)),
        num_kv_heads=kv_heads,
        head_dim=8 * data.draw(st.integers(1, 20)),
        block_size=8 * data.draw(st.integers(1, 5)),
        window=data.draw(st.sampled_from([0, 0, 1, 9, 65])),
        softcap=data.draw(st.sampled_from([0.0, 10.0])),
        sinks_dtype=data.draw(st.sampled_from([None, torch.float32])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        merged_qkv=data.draw(st.booleans()),
    )
    step = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 90), max_size=4)
    steps = data.draw(st.lists(step, min_size=1, max_size=4))
    assert_parity(kernel, shape, steps, seed=data.draw(st.integers(0, 99)), padding=data.draw(st.integers(0, 2)))


def test_fake_rule_is_the_reference_s_shape() -> None:
    world = World(Shape(merged_qkv=True), 0)
    batch = world.batch({"a": 5})
    want, got = batch.call(reference, world.caches()), batch.call(fake, world.caches())
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
