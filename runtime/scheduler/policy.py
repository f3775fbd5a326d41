"""Who comes first. A rank orders sequences everywhere: in the queue, in a step, and, from the other end, for preemption."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter
from typing import Protocol, TypeVar

from llmc.errors import InternalError, RequestRejected
from llmc.runtime.messages import GenerateRequest
from llmc.runtime.scheduler.config import Policy

Rank = tuple[int, float, str]  # priority (0 under fcfs), arrival, id; smaller runs earlier

_rank = attrgetter("rank")


class Ranked(Protocol):
    """Anything with a rank; ranks are unique, because request ids are."""

    rank: Rank


T = TypeVar("T", bound=Ranked)


def rank_of(request: GenerateRequest, policy: Policy) -> Rank:
    """The request's rank: arrival under "fcfs"; priority, then arrival, under "priority". Ties by id. Never changes."""
    if request.arrival_time != request.arrival_time:
        raise RequestRejected("arrival_time is not a number", status=500)  # NaN would break the order for everyone
    return (request.priority if policy == "priority" else 0, request.arrival_time, request.request_id)


def insert_ranked(items: list[T], item: T) -> None:
    """Insert into a list sorted by rank."""
    insort(items, item, key=_rank)


def remove_ranked(items: list[T], item: T) -> None:
    """Remove from a list sorted by rank.

    Raises:
        InternalError: it is not there.
    """
    index = bisect_left(items, item.rank, key=_rank)
    if index == len(items) or items[index] is not item:
        raise InternalError(f"scheduler: sequence {item.rank[2]} is not in the list it should be in")
    del items[index]
