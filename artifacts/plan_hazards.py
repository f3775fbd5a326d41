"""Which launches of a plan must wait for which, from what they read and write.

A later launch waits for an earlier one that wrote what it reads (true dependence), wrote what it writes, or read what it writes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmc.artifacts.plan import Launch, Span

_END = 1 << 62  # past the end of any region: where an open span stops


@dataclass(slots=True)
class _Segment:
    """Bytes of a region with one history: who wrote them last (-1: nobody in this plan) and who has read them since."""

    start: int
    stop: int
    writer: int = -1
    readers: list[int] = field(default_factory=list)


class _History:
    """The segments of one region: disjoint, sorted, covering everything."""

    def __init__(self) -> None:
        self.segments = [_Segment(0, _END)]

    def cut(self, start: int, stop: int) -> list[_Segment]:
        """The segments that tile [start, stop), split at its ends where needed."""
        first = self._split(start)
        return self.segments[first : self._split(stop)]

    def overwrite(self, start: int, stop: int, writer: int) -> None:
        """The span has one writer and no reader."""
        first = self._split(start)
        self.segments[first : self._split(stop)] = [_Segment(start, stop, writer)]

    def _split(self, at: int) -> int:
        """Make `at` the start of a segment; returns which, or the number of segments at the very end."""
        index = bisect_right(self.segments, at, key=lambda s: s.start) - 1
        found = self.segments[index]
        if at == found.start:
            return index
        if at == found.stop:
            return index + 1
        self.segments[index : index + 1] = [
            _Segment(found.start, at, found.writer, list(found.readers)),
            _Segment(at, found.stop, found.writer, list(found.readers)),
        ]
        return index + 1


def hazards(launches: Sequence[Launch]) -> list[set[int]]:
    """For each launch the earlier ones it must wait for, directly."""
    regions: dict[int, _History] = {}
    waits: list[set[int]] = []
    for index, launch in enumerate(launches):
        before: set[int] = set()
        for span in launch.reads:
            for segment in _cut(regions, span):
                before.add(segment.writer)
        for span in launch.writes:
            for segment in _cut(regions, span):
                before.update((segment.writer, *segment.readers))
        for span in launch.reads:
            for segment in _cut(regions, span):
                if not segment.readers or segment.readers[-1] != index:
                    segment.readers.append(index)
        for span in launch.writes:
            start, stop = _bounds(span)
            if start < stop:
                regions[span.region].overwrite(start, stop, index)
        waits.append(before - {-1})
    return waits


def _cut(regions: dict[int, _History], span: Span) -> list[_Segment]:
    start, stop = _bounds(span)
    if start >= stop:
        return []
    return regions.setdefault(span.region, _History()).cut(start, stop)


def _bounds(span: Span) -> tuple[int, int]:
    return span.start, _END if span.stop is None else span.stop


def hazard_edges(launches: Sequence[Launch]) -> list[tuple[int, int]]:
    """The fewest edges that order every hazard, sorted: an edge that others imply is left out."""
    edges: list[tuple[int, int]] = []
    ancestors: list[int] = []  # per launch, a bit for each that comes before it
    for later, before in enumerate(hazards(launches)):
        seen = 0
        for earlier in sorted(before, reverse=True):
            if not seen >> earlier & 1:
                edges.append((earlier, later))
                seen |= ancestors[earlier] | 1 << earlier
        ancestors.append(seen)
    return sorted(edges)


def unordered_hazard(launches: Sequence[Launch], edges: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The first hazard that `edges` leave open, as (earlier, later), or None. Edges must lead from earlier to later launches."""
    into: list[list[int]] = [[] for _ in launches]
    for earlier, later in edges:
        into[later].append(earlier)
    ancestors: list[int] = []
    for later, before in enumerate(hazards(launches)):
        seen = 0
        for earlier in into[later]:
            seen |= ancestors[earlier] | 1 << earlier
        for earlier in sorted(before):
            if not seen >> earlier & 1:
                return earlier, later
        ancestors.append(seen)
    return None


def first_unwritten_read(launches: Sequence[Launch], region: int) -> tuple[int, Span] | None:
    """The first read of a span of `region` of which no earlier launch wrote any byte; for memory that starts as garbage."""
    history = _History()
    for index, launch in enumerate(launches):
        for span in launch.reads:
            start, stop = _bounds(span)
            if span.region == region and start < stop and all(s.writer < 0 for s in history.cut(start, stop)):
                return index, span
        for span in launch.writes:
            start, stop = _bounds(span)
            if span.region == region and start < stop:
                history.overwrite(start, stop, index)
    return None
