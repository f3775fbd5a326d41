"""The outcome of a benchmark: tables of figures, charts of them, and gates. What the terminal, --json and --html show is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmc.bench.figure import Figure
from llmc.bench.machine import environment

GATE_FAILED = 6  # exit status; 1 to 5 are errors of other kinds (llmc/errors.py)

Cell = str | int | float | Figure | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table. `unit` stands in the head; `better` decides nothing but the arrow there."""

    key: str
    title: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    digits: int = 1  # after the point


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells by column key; a missing cell, or None, was not measured."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    notes: Sequence[str] = ()
    bars: bool = True  # the page draws its figures; not where a chart of the result does


@dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    y: float
    label: str
    marked: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A scatter plot. `line` joins points in the order given: a Pareto front, a roof."""

    title: str
    x_title: str
    y_title: str
    points: Sequence[Point]
    line: Sequence[tuple[float, float]] = ()
    logarithmic: bool = False


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A bound that the user set, and what was measured."""

    name: str
    bound: float
    measured: float
    passed: bool

    def __str__(self) -> str:
        return f"{self.name} {self.bound:g}: {'passed' if self.passed else 'FAILED'}, measured {self.measured:.4g}"


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One run of `llmc bench`."""

    benchmark: str
    workload: Mapping[str, Any]  # sizes, seed, warm-up, repeats: what a repetition needs
    tables: Sequence[Table]
    charts: Sequence[Chart] = ()
    gates: Sequence[Gate] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=environment)

    @property
    def exit_code(self) -> int:
        return 0 if all(gate.passed for gate in self.gates) else GATE_FAILED

    def as_json(self) -> dict[str, Any]:
        """Plain data; a figure is its median, interval and samples."""
        return {
            "benchmark": self.benchmark,
            "environment": dict(self.environment),
            "workload": dict(self.workload),
            "tables": [
                {
                    "title": table.title,
                    "units": {column.key: column.unit for column in table.columns},
                    "rows": [{key: _plain(cell) for key, cell in row.items()} for row in table.rows],
                    "notes": list(table.notes),
                }
                for table in self.tables
            ],
            "gates": [{"name": g.name, "bound": g.bound, "measured": g.measured, "passed": g.passed} for g in self.gates],
            "details": dict(self.details),
        }


def at_most(name: str, bound: float | None, measured: float) -> list[Gate]:
    """A gate if a bound was given; NaN does not pass."""
    return [] if bound is None else [Gate(name=name, bound=bound, measured=measured, passed=measured <= bound)]


def at_least(name: str, bound: float | None, measured: float) -> list[Gate]:
    """As `at_most`, the other way."""
    return [] if bound is None else [Gate(name=name, bound=bound, measured=measured, passed=measured >= bound)]


def _plain(cell: Cell) -> Any:
    return cell.as_json() if isinstance(cell, Figure) else cell
