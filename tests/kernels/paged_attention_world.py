"""Sequences that grow over steps in a paged cache: what a scheduler would hand to paged attention, in miniature."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.paged_attention.compiled import CompiledPagedAttention

NUM_BLOCKS_PER_SEQUENCE = 130


def kernel_fixture(num_threads: int = 1) -> Any:
    """A fixture that gives the kernel built for each level this machine can run, where the kernel's code differs."""
    levels = [level.name for level in runnable_levels() if level.name in ("x86-64-v3", "x86-64-v4", "x86-64-v4+bf16+amx")]

    @pytest.fixture(scope="session", params=levels)
    def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompiledPagedAttention]:
        yield CompiledPagedAttention(build_kernels(request.param, kernel_cache(tmp_path_factory)).kernels_so, num_threads)

    return kernel


def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where builds are shared between test files (and, if the variable is set, between runs)."""
    named = os.environ.get("LLMC_TEST_KERNEL_CACHE")
    return Path(named) if named else tmp_path_factory.getbasetemp().parent / "llmc-kernels"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What stays the same over a World's steps."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None  # None: dtype
    window: int = 0
    softcap: float = 0.0
    sinks_dtype: torch.dtype | None = None
    merged_qkv: bool = False  # q, k, v are slices of one tensor
    query_scale: float = 1.0
    extreme: bool = False  # values from far below the smallest normal product to infinite ones


@dataclass
class Batch:
    """The op's arguments for one step, caches aside."""

    q: Tensor
    k: Tensor
    v: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    rows: dict[str, slice]  # sequence -> its rows

    def call(self, op: Callable[..., Tensor], caches: list[Tensor]) -> Tensor:
        """Run `op` with group 1 of two groups; group 0 holds what must not be read."""
        slots = torch.stack([torch.full_like(self.slot_mapping, 1 << 50), self.slot_mapping])
        tables = torch.stack([torch.full_like(self.block_tables, -7), self.block_tables])
        return op(
            self.q,
            self.k,
            self.v,
            *caches,
            slots,
            tables,
            self.seq_lens,
            self.query_start_loc,
            0,
            1,
            self.scale,
            self.window,
            self.softcap,
            self.sinks,
        )


class World:
    """Named sequences with fixed random q, k, v per position, whatever the steps that bring them."""

    def __init__(self, shape: Shape, seed: int, block_seed: int = 0, sequences: str = "abcdefgh") -> None:
        self.shape = shape
        self.seed = seed
        self.sequences = sequences
        self.length = dict.fromkeys(sequences, 0)
        self.num_blocks = NUM_BLOCKS_PER_SEQUENCE * len(sequences) * 16 // shape.block_size
        free = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(block_seed)).tolist()
        per_sequence = self.num_blocks // len(sequences)
        self.blocks = {name: free[i * per_sequence : (i + 1) * per_sequence] for i, name in enumerate(sequences)}
        self._tokens: dict[str, Tensor] = {}

    def caches(self) -> list[Tensor]:
        """Zeroed K and V caches."""
        s = self.shape
        dtype = s.kv_dtype or s.dtype
        width = s.head_dim + (4 if dtype == torch.int8 else 0)  # an int8 tile holds its scales
        return [torch.zeros(self.num_blocks, s.num_kv_heads, s.block_size, width, dtype=dtype) for _ in range(2)]

    def _qkv(self, name: str, begin: int, end: int) -> Tensor:
        """[tokens, H + 2 Hkv, D] of a sequence's positions [begin, end)."""
        s = self.shape
        if name not in self._tokens:
            generator = torch.Generator().manual_seed(self.seed * 1000 + ord(name))
            heads = s.num_heads + 2 * s.num_kv_heads
            tokens = torch.randn(1200 if s.head_dim * heads <= 2048 else 400, heads, s.head_dim, generator=generator)
            tokens[:, : s.num_heads] *= s.query_scale
            if s.extreme:
                tokens *= 10.0 ** torch.randint(-24, 2, tokens.shape, generator=generator)
                tokens[220::9, -1, ::5] = float("inf")
            self._tokens[name] = tokens.to(s.dtype)
        return self._tokens[name][begin:end]

    def batch(self, step: dict[str, int], padding: int = 0) -> Batch:
        """Advance each named sequence by some tokens. Mutates the lengths; 0 tokens is an empty row of a living sequence."""
        s = self.shape
        parts, slots, tables, lengths, starts, rows = [], [], [], [], [0], {}
        width = max((self.length[n] + c + s.block_size - 1) // s.block_size for n, c in step.items()) + 1 if step else 1
        for name, count in step.items():
            begin = self.length[name]
            end = self.length[name] = begin + count
            parts.append(self._qkv(name, begin, end))
            table = self.blocks[name][: (end + s.block_size - 1) // s.block_size]
            slots += [table[p // s.block_size] * s.block_size + p % s.block_size for p in range(begin, end)]
            if s.window:
                gone = max(0, begin - s.window + 1) // s.block_size
                table = [-1] * min(gone, len(table)) + table[gone:]
            tables.append(table + [-1] * (width - len(table)))
            lengths.append(end)
            rows[name] = slice(starts[-1], starts[-1] + count)
            starts.append(starts[-1] + count)
        heads = s.num_heads + 2 * s.num_kv_heads
        qkv = torch.cat([*parts, torch.full((padding, heads, s.head_dim), float("nan"), dtype=s.dtype)])
        q, k, v = qkv.split([s.num_heads, s.num_kv_heads, s.num_kv_heads], dim=1)
        if not s.merged_qkv:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        sinks = None
        if s.sinks_dtype is not None:
            sinks = torch.randn(s.num_heads, generator=torch.Generator().manual_seed(self.seed)).to(s.sinks_dtype)
        return Batch(
            q=q,
            k=k,
            v=v,
            slot_mapping=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
            block_tables=torch.tensor(tables, dtype=torch.int32).reshape(len(step), width),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            scale=s.head_dim**-0.5,
            window=s.window,
            softcap=s.softcap,
            sinks=sinks,
            rows=rows,
        )
