"""Ways to launch attention that a GPU may find faster than the rule's, without another bit in any result.

What decides a row's bits stays: tiles and segments of keys, the rows of a decode program, and how a tile's rows lie over warps, 16 of
them to each. What changes is how far loads run ahead, and whether a prefill program has 64 rows or 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .triton_impl import Work

_STAGES = (1, 2, 3)  # more compile to the same machine code
_WIDE = 128  # a head_dim above has one shape that fits into the registers
_NARROW = 64  # up to it 64 rows to four warps spill nothing, however far loads run ahead


def decode_candidates(default: Work) -> Iterator[Work]:
    """Other numbers of stages for the kernels of one query a sequence; `default` first."""
    yield default
    for stages in _STAGES:
        if stages != default.decode_stages:
            yield replace(default, decode_stages=stages)


def prefill_candidates(default: Work, head_dim: int) -> Iterator[Work]:
    """Other rows and stages for the kernel of many queries; `default` first."""
    yield default
    shapes = [(64, 4), (128, 8)] if head_dim <= _WIDE else [(default.prefill_rows, default.prefill_warps)]
    for rows, warps in shapes:
        for stages in (1,) if rows == 64 and _NARROW < head_dim <= _WIDE else _STAGES:
            work = replace(default, prefill_rows=rows, prefill_warps=warps, prefill_stages=stages)
            if work != default:
                yield work
