"""paged_attention in Triton: parity with the reference, and one row's bits under every way to compute it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from llmc.kernels.launch import H200, Device
from llmc.kernels.paged_attention import paged_attend_reference, paged_attention_reference
from llmc.kernels.paged_attention.triton_impl import (
    paged_attend,
    paged_attend_reason,
    paged_attention,
    paged_attention_reason,
    segment_length,
    work_for,
)
from llmc.kernels.paged_attention.tuning import decode_candidates, prefill_candidates
from tests.kernels.paged_attention_world import Batch, Shape, World

from .world import DEVICE, INTERPRETED, assert_close, poisoned, same_bits

A100 = Device(num_sms=108, shared_bytes=166912)  # its tiles are smaller than the H200's
PLAIN = Shape(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32)


def on_device(batch: Batch) -> Batch:
    tensors = {f.name: t.to(DEVICE) for f in dataclasses.fields(batch) if isinstance(t := getattr(batch, f.name), Tensor)}
    return dataclasses.replace(batch, **tensors)


def run_world(shape: Shape, steps: list[tuple[dict[str, int], int]], seed: int = 1) -> None:
    """Take the steps with the kernels and with the reference, each with caches of its own, and compare results and caches."""
    world = World(shape, seed)
    theirs = world.caches()
    if not shape.window:  # what was never written must not be read; behind a window the reference reads it, with weight 0
        theirs = [c.fill_(float("nan")) for c in theirs]
    ours = [c.clone().to(DEVICE) for c in theirs]
    for step, padding in steps:
        batch = world.batch(step, padding)
        decode = all(count <= 1 for count in step.values())
        with poisoned():
            found = on_device(batch).call(lambda *a, d=decode: paged_attention(*a, decode=d), ours)
        expected = batch.call(paged_attention_reference, theirs)
        assert_close(found, expected.nan_to_num() if padding else expected)
        if padding:
            assert not found[-padding:].any()
        assert all(same_bits(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prefill_then_decode(dtype: torch.dtype) -> None:
    shape = dataclasses.replace(PLAIN, dtype=dtype, merged_qkv=True)
    run_world(shape, [({"a": 70, "b": 3, "c": 1}, 2), ({"a": 1, "b": 1}, 1), ({"a": 1, "c": 5}, 0)])


@pytest.mark.parametrize(
    "change",
    [
        {"window": 20},
        {"window": 70, "softcap": 8.0, "query_scale": 4.0},
        {"sinks_dtype": torch.float32},
        {"sinks_dtype": torch.bfloat16, "window": 5},
        {"num_heads": 7, "num_kv_heads": 1, "head_dim": 80},
        {"num_heads": 3, "num_kv_heads": 3, "head_dim": 8, "block_size": 64},
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_variants(change: dict[str, object]) -> None:
    shape = dataclasses.replace(PLAIN, **change)  # type: ignore[arg-type]
    run_world(shape, [({"a": 90}, 0), ({"a": 1, "b": 20}, 3)])


def test_nothing_to_do() -> None:
    run_world(PLAIN, [({}, 2), ({"a": 0}, 0), ({"a": 0}, 3), ({"a": 5}, 0), ({"a": 0, "b": 1}, 0)])


def test_more_queries_than_keys() -> None:
    """Queries before position 0 see nothing; a model never asks, a padded batch might."""
    torch.manual_seed(0)
    q, cache = torch.randn(4, 4, 16), torch.randn(2, 2, 16, 16)
    tables, lens, starts = (
        torch.tensor([[[1, 0]]], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([0, 4], dtype=torch.int32),
    )
    rest = (tables, lens, starts, 0, 0, 0.25, 0, 0.0, None)
    with poisoned():
        found = paged_attend(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in (q, cache, cache, *rest)))
    assert_close(found, paged_attend_reference(q, cache, cache, *rest))
    assert not found[:2].any()


@pytest.mark.parametrize(
    ("change", "device"), [({}, H200), ({"window": 100, "softcap": 20.0}, H200), ({"sinks_dtype": torch.float32}, A100)], ids=str
)
def test_a_row_has_the_same_bits_however_it_is_computed(change: dict[str, object], device: Device) -> None:
    """Two segments of keys; decoded alone, decoded in a batch, in a mixed step, as the end of prefills of two lengths."""
    shape = dataclasses.replace(PLAIN, dtype=torch.bfloat16, **change)  # type: ignore[arg-type]
    length = 270

    def last_row(steps: list[dict[str, int]], *, decode: bool) -> Tensor:
        world = World(shape, 3)
        caches = [c.to(DEVICE) for c in world.caches()]
        for step in steps[:-1]:  # keys and values only: the kernels' own results are not used
            batch = world.batch(step)
            slots = torch.stack([batch.slot_mapping, batch.slot_mapping])
            for cache, new in zip(caches, (batch.k, batch.v), strict=True):
                cache[slots[1] // shape.block_size, :, slots[1] % shape.block_size] = new.to(DEVICE)
        batch = world.batch(steps[-1], 2)
        with poisoned():
            out = on_device(batch).call(lambda *a: paged_attention(*a, decode=decode, device=device), caches)
        return out[batch.rows["a"].stop - 1]

    alone = last_row([{"a": length - 1}, {"a": 1}], decode=True)
    assert same_bits(alone, last_row([{"a": length - 1, "b": 5, "c": 9}, {"c": 1, "b": 1, "a": 1}], decode=True))
    assert same_bits(alone, last_row([{"a": length - 1, "b": 5}, {"b": 3, "a": 1}], decode=False))
    assert same_bits(alone, last_row([{"a": length - 40, "b": 5}, {"b": 3, "a": 40}], decode=False))
    assert same_bits(alone, last_row([{"a": length - 2}, {"a": 2}], decode=False))


def test_every_way_to_launch_gives_the_same_bits() -> None:
    """What a table of measured ways may hold, over a prompt and over tokens that follow it; on a GPU every one of them."""
    shape = dataclasses.replace(PLAIN, dtype=torch.bfloat16, num_heads=4, num_kv_heads=1)
    world = World(shape, 1)
    caches = [c.to(DEVICE) for c in world.caches()]
    default = work_for(shape.head_dim, 4, shape.dtype, shape.dtype)
    for step in ({"a": 70, "b": 3}, {"a": 1, "b": 1}):
        batch = on_device(world.batch(step, 0))
        expected = batch.call(paged_attention, caches)
        ways = [*decode_candidates(default), *prefill_candidates(default, shape.head_dim)]
        for work in [w for w in ways if w.prefill_stages == w.decode_stages or w.prefill_rows == 64] if INTERPRETED else ways:
            with poisoned():
                found = batch.call(lambda *a, w=work: paged_attention(*a, work=w), caches)
            assert same_bits(found, expected), work


def test_segments_depend_on_the_longest_length_alone() -> None:
    assert [segment_length(n) for n in (16, 8192, 8193, 32768, 131072)] == [256, 256, 512, 1024, 4096]


def test_what_is_refused() -> None:
    q, cache, ints = torch.randn(2, 4, 16), torch.randn(2, 2, 16, 16), torch.zeros(3, dtype=torch.int32)
    tables = ints.view(1, 1, 3)
    rest = (tables, ints, ints, 0, 0, 1.0, 0, 0.0, None)
    assert paged_attend_reason(q, cache, cache, *rest) is None
    assert "head_dim" in str(paged_attend_reason(torch.randn(2, 4, 512), cache, cache, *rest))
    assert "multiples" in str(paged_attend_reason(torch.randn(2, 3, 16), cache, cache, *rest))
    assert "power of two" in str(paged_attend_reason(q, torch.randn(2, 2, 24, 16), cache, *rest))
    assert "one dtype" in str(paged_attend_reason(q, cache.half(), cache.half(), *rest))
    assert "without columns" in str(paged_attend_reason(q, cache, cache, tables[..., :0], *rest[1:]))
    assert "int32" in str(paged_attend_reason(q, cache, cache, tables, ints.long(), *rest[2:]))
    assert "slot_mapping int64" in str(paged_attention_reason(q, q[:, :2], q[:, :2], cache, cache, tables[0], *rest))
