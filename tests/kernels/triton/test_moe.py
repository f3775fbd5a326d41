"""The mixture-of-experts ops in Triton: parity, agreement with Hugging Face's formulas, one token's bits in every batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.kernels.moe import reference as R
from llmc.kernels.moe.triton_impl import moe_combine, moe_linear, moe_route, moe_route_reason, moe_sort, moe_sort_reason

from .world import DEVICE, DTYPES, assert_close, poisoned, random, same_bits


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# softmax_first, renormalise, wide: Qwen3-MoE with and without norm_topk_prob, Mixtral, gpt-oss
VARIANTS = [(True, True, False), (True, False, False), (True, True, True), (False, False, False)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_route(dtype: torch.dtype, variant: tuple[bool, bool, bool]) -> None:
    for tokens, experts, top_k in ((0, 4, 2), (1, 1, 1), (5, 8, 2), (3, 60, 6), (4, 128, 8), (2, 3, 3)):
        logits = random(tokens, experts, dtype=dtype)
        with poisoned():
            weights, ids = moe_route(logits, top_k, *variant)
        expected, expected_ids = R.moe_route_reference(logits, top_k, *variant)
        assert torch.equal(ids, expected_ids) and weights.dtype == (torch.float32 if variant[2] else dtype)
        assert_close(weights, expected)


def test_route_of_equals_and_odd_rows() -> None:
    logits = torch.tensor([[1.0, 3, 3, 3, 0], [float("-inf")] * 4 + [0], [float("nan"), 5, 5, 1, 1]]).to(DEVICE)
    _, ids = moe_route(logits, 3, True, True, False)
    assert ids.tolist() == R.moe_route_reference(logits, 3, True, True, False)[1].tolist() == [[1, 2, 3], [4, 0, 1], [1, 2, 3]]


def test_route_is_what_the_models_do() -> None:
    logits = random(6, 16).cpu()
    values, ids = torch.topk(logits.softmax(-1, dtype=torch.float32), 4, dim=-1)  # Qwen3-MoE, Mixtral
    ours, our_ids = R.moe_route_reference(logits, 4, True, True, False)
    assert torch.equal(our_ids, ids) and torch.allclose(ours, values / values.sum(-1, keepdim=True), rtol=1e-6)
    values, ids = torch.topk(logits, 4, dim=-1)  # gpt-oss
    ours, our_ids = R.moe_route_reference(logits, 4, False, False, False)
    assert torch.equal(our_ids, ids) and torch.allclose(ours, values.softmax(1), rtol=1e-6)


def ids_for(tokens: int, top_k: int, experts: int) -> Tensor:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k, dtype=torch.int64)
    ids[tokens // 2 :, 0] = experts - 1  # some experts with many rows, some perhaps with none
    return ids.to(DEVICE)


@pytest.mark.parametrize("tokens, top_k, experts, tile", [(0, 2, 4, 16), (1, 2, 5, 16), (9, 2, 4, 16), (150, 4, 7, 64), (40, 8, 9, 16)])
def test_sort(tokens: int, top_k: int, experts: int, tile: int) -> None:
    ids = ids_for(tokens, top_k, experts)
    if tokens == 9:
        ids[3, 1], ids[4, 0] = -1, experts  # left out
    with poisoned():
        rows, tile_experts = moe_sort(ids, experts, tile)
    expected, expected_experts = R.moe_sort_reference(ids, experts, tile)
    assert torch.equal(tile_experts, expected_experts)
    used = int((expected_experts >= 0).sum()) * tile
    assert torch.equal(rows[:used], expected[:used])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_combine(dtype: torch.dtype) -> None:
    for tokens, top_k, experts, tile in ((0, 2, 3, 16), (1, 2, 4, 16), (30, 2, 3, 32), (50, 3, 4, 64)):
        x, weight, bias = random(tokens, 40, dtype=dtype), random(experts, 24, 40, dtype=dtype), random(experts, 24, dtype=dtype)
        weights = random(tokens, top_k, dtype=dtype).abs()
        order = R.moe_sort_reference(ids_for(tokens, top_k, experts), experts, tile)
        rows = tokens * top_k
        for added in (None, bias):
            with poisoned():
                y = moe_linear(x, weight, *order, added, rows, top_k)
                out = moe_combine(y, weights)
            assert_close(y, R.moe_linear_reference(x, weight, *order, added, rows, top_k))
            assert_close(out, R.moe_combine_reference(y, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    """Whatever the tile's height is for the number of tokens, and whoever shares the tile."""
    experts, top_k, weight = 3, 2, random(3, 40, 72, dtype=dtype)
    x, logits = random(140, 72, dtype=dtype), random(140, experts, dtype=dtype)

    def layer(rows: slice, tile: int) -> Tensor:
        weights, ids = moe_route(logits[rows], top_k, True, True, False)
        count = ids.numel()
        y = moe_linear(x[rows], weight, *moe_sort(ids, experts, tile), None, count, top_k)
        return moe_combine(y, weights)

    whole = layer(slice(0, 140), 128)
    for rows, tile in ((slice(0, 1), 16), (slice(5, 25), 32), (slice(60, 140), 64)):
        assert same_bits(layer(rows, tile), whole[rows])


def test_tiles_follow_the_rows_alone() -> None:
    assert [R.tile_rows(t * 8, 128) for t in (1, 64, 512, 1024, 8192, 65536)] == [16, 16, 16, 64, 64, 128]


def test_what_is_refused() -> None:
    assert "2000 experts" in str(moe_route_reason(random(1, 2000), 2, True, True, False))
    assert "contiguous" in str(moe_sort_reason(torch.zeros(4, 2, dtype=torch.int64).t(), 3, 16))
    with pytest.raises(RuntimeError, match="top_k 9"):
        R.moe_route_reference(random(1, 8), 9, True, True, False)
    with pytest.raises(RuntimeError, match="tile 24"):
        R.moe_sort_reference(torch.zeros(1, 2, dtype=torch.int64), 3, 24)
    with pytest.raises(RuntimeError, match="are not 5"):
        R.moe_linear_reference(
            random(2, 4), random(1, 3, 4), *R.moe_sort_reference(torch.zeros(2, 2, dtype=torch.int64), 1, 16), None, 5, 2
        )
