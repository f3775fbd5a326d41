"""The meaning of llmc::lora_add in plain torch, and its fake rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCHEMA = "lora_add(Tensor y, Tensor x, Tensor slots, Tensor pool, int rank, int[] sizes, int[] offsets) -> Tensor"

C_SHIM = (
    "AOTITorchError aoti_torch_cpu_llmc_lora_add(AtenTensorHandle y, AtenTensorHandle x, AtenTensorHandle slots, AtenTensorHandle pool, "
    "int64_t rank, const int64_t* sizes, int64_t num_sizes, const int64_t* offsets, int64_t num_offsets, AtenTensorHandle* ret)"
)


def lora_add_reference(
    y: Tensor, x: Tensor, slots: Tensor, pool: Tensor, rank: int, sizes: Sequence[int], offsets: Sequence[int]
) -> Tensor:
    """y plus the low-rank term of the adapter that each row has chosen: y + (x A^T) B, per part of the columns.

    y: [..., N], what a linear made of x. x: [..., K], of y's dtype and leading sizes, which hold T rows in all.
    slots: int32 [T], the adapter of each row; a row of -1 comes out with the bits it had.
    pool: [S, P], one adapter's matrices of all linears per row. The columns of y are in parts of `sizes`, as a merged linear's are;
        part i has A [rank, K] at `offsets[i]` of a pool row and B [rank, sizes[i]] right behind it, scale included. An offset of -1:
        the part has no adapter.
    Sums are in fp32 or better, here in fp64, the result is rounded once.

    Source: LoRA (Hu et al. 2021, arXiv:2106.09685); rows of several adapters in one product as in Punica (Chen et al. 2023,
    arXiv:2310.18547).
    """
    _check(y, x, slots, pool, rank, sizes, offsets)
    k, n = x.shape[-1], y.shape[-1]
    rows, inputs = y.reshape(-1, n), x.reshape(-1, k)
    if slots.numel() != len(rows):
        raise RuntimeError(f"llmc::lora_add: {slots.numel()} slots for {len(rows)} rows")
    if slots.numel() and not -1 <= int(slots.min()) <= int(slots.max()) < pool.shape[0]:
        raise RuntimeError(f"llmc::lora_add: a slot lies outside the pool of {pool.shape[0]}")
    out = rows.clone(memory_format=torch.contiguous_format)
    for slot in sorted({int(s) for s in slots} - {-1}):
        chosen = (slots == slot).nonzero()[:, 0]
        begin = 0
        for size, offset in zip(sizes, offsets, strict=True):
            columns = slice(begin, begin + size)
            begin += size
            if offset < 0:
                continue
            middle, end = offset + rank * k, offset + rank * (k + size)
            a, b = pool[slot, offset:middle].view(rank, k).double(), pool[slot, middle:end].view(rank, size).double()
            term = (inputs[chosen].double() @ a.T) @ b
            out[chosen, columns] = (rows[chosen, columns].double() + term).to(y.dtype)
    return out.view(y.shape)


def lora_add_fake(y: Tensor, x: Tensor, slots: Tensor, pool: Tensor, rank: int, sizes: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """Shape rule: y's sizes, contiguous."""
    _check(y, x, slots, pool, rank, sizes, offsets)
    return y.new_empty(y.shape)


def _check(y: Tensor, x: Tensor, slots: Tensor, pool: Tensor, rank: int, sizes: Sequence[int], offsets: Sequence[int]) -> None:
    """Refuse what no implementation takes. Asks nothing of open sizes."""
    if y.dtype != x.dtype or y.dim() != x.dim() or y.dim() < 2:
        raise RuntimeError(f"llmc::lora_add: y and x must agree, got {y.dtype} with {y.dim()} dimensions and {x.dtype} with {x.dim()}")
    if slots.dtype != torch.int32 or slots.dim() != 1 or pool.dim() != 2:
        raise RuntimeError(f"llmc::lora_add: slots must be int32 [T] and pool [S, P], got {slots.dtype} {slots.dim()}d, {pool.dim()}d")
    if rank < 1 or len(sizes) != len(offsets) or sum(sizes) != y.shape[-1]:
        raise RuntimeError(f"llmc::lora_add: rank {rank}, parts {list(sizes)} at {list(offsets)} do not make {y.shape[-1]} columns")
    for size, offset in zip(sizes, offsets, strict=True):
        if offset >= 0 and offset + rank * (x.shape[-1] + size) > pool.shape[1]:
            raise RuntimeError(f"llmc::lora_add: a part of {size} columns at {offset} ends outside the pool's rows of {pool.shape[1]}")
