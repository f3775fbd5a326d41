"""Drive a captured graph by hand: a toy block allocator and the inputs of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmc.artifacts.manifest import KVFacts

Step = Callable[..., Tensor]


class PagedSteps:
    """Caches and block tables of a few sequences. `run` computes one step and returns the last logits of each sequence in it."""

    def __init__(self, kv: KVFacts, *, num_blocks: int = 64, width: int = 8) -> None:
        self.kv = kv
        self.width = width  # columns of the block table
        self.free = list(range(num_blocks - 1, 0, -1))
        self.lengths: dict[int, int] = {}
        self.blocks: dict[int, list[list[int]]] = {}  # sequence -> per group
        self.caches: list[Tensor] = []
        for heads, head_dim in zip(kv.num_kv_heads, kv.head_dim, strict=True):
            shape = (num_blocks, heads, kv.block_size, head_dim)
            self.caches += [torch.zeros(shape, dtype=getattr(torch, kv.dtype)) for _ in range(2)]

    def inputs(self, work: Sequence[tuple[int, Sequence[int]]], *, padding: int = 0) -> tuple[Tensor, ...]:
        """Inputs for computing new tokens of some sequences. Allocates blocks.

        Args:
            work: (sequence, its new tokens) in batch order.
            padding: rows without a sequence added at the end, slot -1.
        """
        groups, size = range(len(self.kv.groups)), self.kv.block_size
        ids: list[int] = []
        positions: list[int] = []
        starts = [0]
        slots: list[list[int]] = [[] for _ in groups]
        for sequence, tokens in work:
            tables = self.blocks.setdefault(sequence, [[] for _ in groups])
            for token in tokens:
                position = self.lengths.get(sequence, 0)
                self.lengths[sequence] = position + 1
                for group in groups:
                    if position % size == 0:
                        tables[group].append(self.free.pop())
                    slots[group].append(tables[group][-1] * size + position % size)
                ids.append(token)
                positions.append(position)
            starts.append(len(ids))
        rows = [[table + [0] * (self.width - len(table)) for table in (self.blocks[s][g] for s, _ in work)] for g in groups]
        pad = [0] * padding
        return (
            torch.tensor(ids + pad),
            torch.tensor(positions + pad),
            torch.tensor([end - 1 for end in starts[1:]]),
            torch.tensor([row + [-1] * padding for row in slots]),
            torch.tensor(rows, dtype=torch.int32),
            torch.tensor([self.lengths[s] for s, _ in work], dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            *self.caches,
        )

    def run(self, step: Step, work: Sequence[tuple[int, Sequence[int]]], *, padding: int = 0) -> Tensor:
        """Logits [len(work), vocab] of the last new token of each sequence."""
        with torch.no_grad():
            return step(*self.inputs(work, padding=padding))
