"""Milliseconds of start-up, by stage, in the order the stages ended. Stages named "a.b" run inside stage "a"."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


class StageTimer:
    """Collects the time of each stage. Stages may run in several threads, each under its own name."""

    def __init__(self) -> None:
        self._milliseconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        began = time.perf_counter()
        yield
        self._milliseconds[name] = 1e3 * (time.perf_counter() - began)

    def timed(self, name: str, work: Callable[[], _T]) -> _T:
        """Time a call."""
        with self.stage(name):
            return work()

    @property
    def milliseconds(self) -> dict[str, float]:
        """What was measured so far, rounded to microseconds."""
        return {name: round(value, 3) for name, value in self._milliseconds.items()}
