"""The stages of a compile, timed as they happen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One finished stage. `detail` is a short fact for people, such as "280 nodes"."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What running an unpublished artifact gave. `startup_ms`: milliseconds of its start, by stage; empty where it was not run."""

    detail: str
    startup_ms: Mapping[str, float] = field(default_factory=dict)


class StageObserver(Protocol):
    """Who wants to see stages live: a terminal view, plain lines, nobody."""

    def started(self, name: str) -> None: ...

    def finished(self, stage: Stage) -> None: ...


class Silent:
    """Shows nothing."""

    def started(self, name: str) -> None:
        pass

    def finished(self, stage: Stage) -> None:
        pass


@dataclass
class Note:
    """What a stage says of itself when it is done; filled in by the code inside the `with`."""

    detail: str = ""


@dataclass
class StageLog:
    """Times stages and tells the observer."""

    observer: StageObserver
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Note]:
        """Time what stands inside the `with`. A stage that raises is not recorded."""
        self.observer.started(name)
        note = Note()
        started = time.perf_counter()
        yield note
        finished = Stage(name=name, seconds=time.perf_counter() - started, detail=note.detail)
        self.stages.append(finished)
        self.observer.finished(finished)

    def record(self, stage: Stage) -> None:
        """Add a stage that was timed elsewhere."""
        self.stages.append(stage)
        self.observer.finished(stage)
