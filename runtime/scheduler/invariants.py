"""What is true of a scheduler between any two calls, recounted from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from llmc.errors import InternalError
from llmc.runtime.scheduler.request import Sequence


def check_sequences(live: Iterable[Sequence], waiting: list[Sequence], running: list[Sequence], *, num_prefilling: int) -> None:
    """Every live sequence stands in one list, in order; waiting ones hold nothing; decoding ones lack one token. Changes nothing.

    Raises:
        InternalError: one of these does not hold.
    """
    for name, sequences in (("waiting", waiting), ("running", running)):
        if any(a.rank >= b.rank for a, b in pairwise(sequences)) or any(s.state != name for s in sequences):
            raise InternalError(f"scheduler: the {name} list is out of order or holds a sequence of another state")
    if sorted(map(id, live)) != sorted(map(id, [*waiting, *running])):
        raise InternalError("scheduler: a live sequence is in neither list or in both")
    if any(any(s.blocks.groups) or s.num_computed or not s.prefilling or s.lora_slot >= 0 for s in waiting):
        raise InternalError("scheduler: a waiting sequence holds blocks, or a slot of an adapter")
    if num_prefilling != sum(s.prefilling for s in running):
        raise InternalError("scheduler: the count of prefilling sequences is wrong")
    if any(len(s.token_ids) - s.num_computed != 1 for s in running if not s.prefilling):
        raise InternalError("scheduler: a decoding sequence lacks more than its newest token")
    if any(s.num_computed >= len(s.token_ids) or len(s.token_ids) >= s.max_length for s in running):
        raise InternalError("scheduler: a running sequence has nothing left to do")
