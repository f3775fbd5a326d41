"""The meaning of llmc::all_reduce in plain torch, and its fake rule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

SCHEMA = "all_reduce(Tensor x, int ranks) -> Tensor"

C_SHIM = "AOTITorchError aoti_torch_cpu_llmc_all_reduce(AtenTensorHandle x, int64_t ranks, AtenTensorHandle* ret)"


@dataclass
class _Group:
    """Ranks in threads of one process."""

    ranks: int
    parts: list[Tensor | None]
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks)


_MEMBER = threading.local()  # group and rank of this thread


def all_reduce_reference(x: Tensor, ranks: int) -> Tensor:
    """The sum of every rank's x, in the order of the ranks, in fp32, rounded once: every rank gets the same bits.

    x: [..., n] in float32, float16 or bfloat16, of the same shape on every rank. Ranks are threads here, see `in_threads`.
    """
    group: _Group | None = getattr(_MEMBER, "group", None)
    if group is None or group.ranks != ranks:
        raise RuntimeError(f"llmc::all_reduce of {ranks} ranks, called outside a group of as many")
    group.parts[_MEMBER.rank] = x
    group.barrier.wait()
    total = torch.zeros(x.shape, dtype=torch.float32)
    for part in group.parts:
        assert part is not None
        total = total + part.float()
    group.barrier.wait()  # nobody writes the next parts before all have read these
    return total.to(x.dtype)


def all_reduce_fake(x: Tensor, ranks: int) -> Tensor:
    """Shape rule: that of x, contiguous."""
    return x.new_empty(x.shape)


def in_threads(work: Sequence[Callable[[], T]]) -> list[T]:
    """Run each rank's work in a thread of its own, as one group; their results by rank."""
    group = _Group(ranks=len(work), parts=[None] * len(work))

    def run(rank: int) -> T:
        _MEMBER.group, _MEMBER.rank = group, rank
        try:
            return work[rank]()
        except BaseException:
            group.barrier.abort()  # the others would wait for ever
            raise

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, range(len(work))))
