"""On a real GPU, kernels at real sizes against fp64, with new random numbers each time and results poisoned beforehand.

tests/kernels/triton holds every kernel against its reference at many small sizes; here is what only size shows: long sums, many
programs, every stage of a pipeline. TRITON_INTERPRET=1, set before Python starts, runs the same at small sizes without a GPU.
"""

from __future__ import annotations

import secrets

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from llmc.kernels.argmax.triton_impl import argmax
from llmc.kernels.gelu_mul.triton_impl import gelu_mul
from llmc.kernels.moe.reference import tile_rows
from llmc.kernels.moe.triton_impl import moe_linear, moe_sort
from llmc.kernels.paged_attention.triton_impl import paged_attend
from llmc.kernels.plain_linear.triton_impl import plain_linear
from llmc.kernels.rms_norm.triton_impl import add_rms_norm, rms_norm
from llmc.kernels.rope_kv_write.triton_impl import rope_kv_write
from llmc.kernels.silu_mul.triton_impl import silu_mul
from tests import gpu
from tests.kernels.triton.world import DEVICE, INTERPRETED, assert_close, poisoned, random, same_bits

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float32)
ROWS = (1, 3) if INTERPRETED else (1, 7, 64, 300, 2048)
HIDDEN = 160 if INTERPRETED else 4096
BLOCK = 16


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    if not INTERPRETED:
        gpu.target()
        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} is not a CUDA build")
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown where a test fails
    torch.manual_seed(seed)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_kernels(dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, residual, weight = random(rows, HIDDEN, dtype=dtype), random(rows, HIDDEN, dtype=dtype), random(HIDDEN, dtype=dtype)
        with poisoned():
            alone = rms_norm(x, weight, 1e-6, 0.0, False)
            normed, summed = add_rms_norm(x, residual, weight, 1e-6, 0.0, False)
            silu, gelu = silu_mul(x, residual), gelu_mul(x, residual, True)
        assert_close(alone, norm(x.double(), weight.double(), 1e-6))
        assert_close(summed, x.double() + residual.double())
        assert_close(normed, norm(summed.double(), weight.double(), 1e-6))
        assert_close(silu, F.silu(x.double()) * residual.double())
        assert_close(gelu, F.gelu(x.double(), approximate="tanh") * residual.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype) -> None:
    weight, bias = random(HIDDEN + 40, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5), random(HIDDEN + 40, dtype=dtype)
    for rows in ROWS:
        x = random(rows, HIDDEN, dtype=dtype)
        with poisoned():
            found = plain_linear(x, weight, bias)
        assert_close(found, x.double() @ weight.double().t() + bias.double())
        if rows > 1:
            assert same_bits(plain_linear(x[-1:], weight, bias), found[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_by_expert(dtype: torch.dtype) -> None:
    weight = random(5, 96, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    for rows in ROWS:
        x, ids = random(rows, HIDDEN, dtype=dtype), torch.randint(0, 5, (rows,)).to(DEVICE)
        with poisoned():
            order = moe_sort(ids[:, None], 5, tile_rows(rows, 5))
            found = moe_linear(x, weight, *order, None, rows, 1)
        expected = torch.stack([row @ weight[int(expert)].double().t() for row, expert in zip(x.double(), ids, strict=True)])
        assert_close(found, expected)


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """fp64 [queries, heads, dim] of the last queries of a sequence of `length` keys."""
    at = torch.arange(length, device=q.device)
    blocks, places = table[at // BLOCK].long(), at % BLOCK
    groups = q.shape[1] // k_cache.shape[1]
    k, v = (cache[blocks, :, places].double().repeat_interleave(groups, dim=1) for cache in (k_cache, v_cache))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    position = torch.arange(length - q.shape[0], length, device=q.device)[:, None]
    seen = at[None, :] <= position
    if window:
        seen = seen & (at[None, :] > position - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "window", "with_sinks"), [(128, 0, False), (128, 100, False), (64, 0, True), (256, 0, False)])
def test_attention(dtype: torch.dtype, dim: int, window: int, with_sinks: bool) -> None:
    """A prompt, a chunk of one and a decoding sequence in one step; then all decoding."""
    lengths = (40, 33, 1) if INTERPRETED else (1500, 700, 4001, 1, 16)
    heads, kv_heads, most = 8, 2, max(lengths)
    blocks = -(-most // BLOCK)
    k_cache, v_cache = (random(len(lengths) * blocks, kv_heads, BLOCK, dim, dtype=dtype) for _ in range(2))
    tables = torch.randperm(len(lengths) * blocks).view(1, len(lengths), blocks).int().to(DEVICE)
    sinks = random(heads, dtype=dtype) if with_sinks else None
    for counts in ([min(length, 20 + 30 * i) for i, length in enumerate(lengths)], [1] * len(lengths)):
        q = random(sum(counts), heads, dim, dtype=dtype)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        with poisoned():
            found = paged_attend(
                q, k_cache, v_cache, tables, torch.tensor(lengths, dtype=torch.int32).to(DEVICE), starts.to(DEVICE), 0, 0, dim**-0.5,
                window, 0.0, sinks, decode=max(counts) == 1,
            )  # fmt: skip
        for i, (length, rows) in enumerate(zip(lengths, q.split(counts), strict=True)):
            expected = attention(rows, k_cache, v_cache, tables[0, i], length, dim**-0.5, window, sinks)
            assert_close(found[starts[i] : starts[i + 1]], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_cache(dtype: torch.dtype) -> None:
    dim, heads, kv_heads = 128, 8, 2
    for tokens in ROWS:
        q, k, v = (random(tokens, count, dim, dtype=dtype) for count in (heads, kv_heads, kv_heads))
        weights = [random(dim, dtype=dtype) for _ in range(2)]
        angle = torch.rand(500, dim // 2).repeat(1, 2)
        cos, sin = angle.cos().to(dtype).to(DEVICE), angle.sin().to(dtype).to(DEVICE)
        positions = torch.randint(0, 500, (tokens,)).to(DEVICE)
        blocks = -(-tokens // BLOCK) + 1
        caches = [torch.full((blocks, kv_heads, BLOCK, dim), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
        slots = torch.randperm(blocks * BLOCK)[:tokens][None].to(DEVICE)
        with poisoned():
            found = rope_kv_write(q, k, v, positions, cos, sin, weights[0], weights[1], 1e-6, 0.0, True, *caches, slots, 0)

        def turned(x: Tensor, weight: Tensor, at: Tensor = positions, tables: tuple[Tensor, Tensor] = (cos, sin)) -> Tensor:
            y = norm(x.double(), weight.double(), 1e-6)
            half = torch.cat([-y[..., dim // 2 :], y[..., : dim // 2]], dim=-1)
            return y * tables[0][at].double()[:, None] + half * tables[1][at].double()[:, None]

        written = [cache[slots[0] // BLOCK, :, slots[0] % BLOCK] for cache in caches]
        assert_close(found, turned(q, weights[0]))
        assert_close(written[0], turned(k, weights[1]))
        assert same_bits(written[1], v)
        assert int((~caches[0].isnan()).sum()) == tokens * kv_heads * dim, "a slot of no token was written"


def test_argmax() -> None:
    for rows in ROWS:
        x = random(rows, 1000 if INTERPRETED else 151936, dtype=torch.bfloat16)
        with poisoned():
            found = argmax(x)
        assert torch.equal(x.float().gather(1, found[:, None].long())[:, 0], x.float().amax(1))
