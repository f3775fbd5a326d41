"""How a compile looks while it runs: a live list of stages in a terminal, one line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from llmc.compiler.stages import Stage


class LiveStages(AbstractContextManager["LiveStages"]):
    """Finished stages with their times, the running one with a spinner and its seconds so far."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._done: list[Stage] = []
        self._running: tuple[str, float] | None = None
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveStages:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def started(self, name: str) -> None:
        self._running = (name, time.perf_counter())

    def finished(self, stage: Stage) -> None:
        self._done.append(stage)
        self._running = None

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for stage in self._done:
            table.add_row("[green]✓[/]", stage.name, f"{stage.seconds:.1f} s", f"[dim]{stage.detail}[/]")
        if self._running is not None:
            name, since = self._running
            table.add_row(self._spinner, f"[bold]{name}[/]", f"{time.perf_counter() - since:.1f} s", "")
        return Group(self._title, table)


class PlainStages(AbstractContextManager["PlainStages"]):
    """One line per finished stage on standard error, for logs."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def started(self, name: str) -> None:
        pass

    def finished(self, stage: Stage) -> None:
        print(f"llmc: {stage.name:<10} {stage.seconds:7.2f} s  {stage.detail}", file=sys.stderr, flush=True)
