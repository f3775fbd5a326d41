"""A BenchResult in a terminal, as JSON and as one HTML file."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.bench.figure import Figure, number
from llmc.bench.result import BenchResult, Cell, Column, Table
from llmc.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def refuse_unwritable(flag: str, path: Path) -> None:
    """Before minutes are spent on what could not be kept.

    Raises:
        ConfigError: the file cannot be made there.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: may not be written by this user; name another file")


def write_json(result: BenchResult, path: Path) -> None:
    path.write_text(json.dumps(result.as_json(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_html(result: BenchResult, path: Path) -> None:
    """One self-contained page: no script, nothing fetched."""
    path.write_text(html(result), encoding="utf-8")


def html(result: BenchResult) -> str:
    from jinja2 import Environment, StrictUndefined

    from llmc.bench.svg import bars, scatter

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(lines=lines, head=head, bars=bars, scatter=scatter, measured=measured_columns, plain=plain)
    source = (files("llmc.bench") / "page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(result=result)


def show(result: BenchResult, console: Console) -> None:
    """Tables with intervals, then gates."""
    from rich.markup import escape

    for table in result.tables:
        _show_table(table, console)
        for note in table.notes:
            console.print(escape(note), style="dim", soft_wrap=True)
    if interval := interval_note(result):
        console.print(escape(interval), style="dim", soft_wrap=True)
    for gate in result.gates:
        console.print(escape(f"gate {gate}"), style="green" if gate.passed else "bold red", soft_wrap=True)


def _show_table(table: Table, console: Console) -> None:
    """As it is where it fits; else turned on its side, one contender per column."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    upright = lines(table, False)
    width = sum(max(map(len, column)) + 3 for column in zip(*upright, strict=True)) + 1
    found = lines(table, width > console.width)
    shown = RichTable(title=escape(table.title), title_justify="left")
    for place, title in enumerate(found[0]):
        longest = max(map(len, " ".join(line[0] for line in found).split())) if place == 0 else None  # names are not broken
        shown.add_column(title, justify="right" if place else "left", overflow="fold", min_width=longest)
    for line in found[1:]:
        shown.add_row(*map(escape, line))
    console.print(shown)


def lines(table: Table, wide: bool) -> list[list[str]]:
    """Head and rows as text; a table that is too wide and has fewer rows than columns is turned on its side."""
    found = [[head(column) for column in table.columns]]
    found += [[cell_text(row.get(column.key), column) for column in table.columns] for row in table.rows]
    return [list(line) for line in zip(*found, strict=True)] if wide and len(table.rows) < len(table.columns) else found


def interval_note(result: BenchResult) -> str:
    """What the brackets mean, with their true coverage."""
    cells = [cell for table in result.tables for row in table.rows for cell in row.values() if isinstance(cell, Figure)]
    counts = sorted({(len(cell.samples), cell.interval[2]) for cell in cells if len(cell.samples) > 1})
    if not counts:
        return ""
    described = "; ".join(f"{count} samples, {100 * coverage:.0f} %" for count, coverage in counts)
    return f"median [interval of the median] ({described})"


def head(column: Column) -> str:
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[column.better]
    return f"{column.title}{f' ({column.unit})' if column.unit else ''}{arrow}"


def cell_text(cell: Cell, column: Column) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Figure):
        low, high, _ = cell.interval
        if len(cell.samples) == 1:
            return number(cell.median, column.digits)
        return f"{number(cell.median, column.digits)} [{number(low, column.digits)}, {number(high, column.digits)}]"
    return number(cell, column.digits) if isinstance(cell, float) else str(cell)


def plain(value: object) -> str:
    """A recorded setting, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def measured_columns(table: Table) -> list[Column]:
    """The columns whose cells are figures; each is a bar chart, if the table has them."""
    return [] if not table.bars else [c for c in table.columns if any(isinstance(row.get(c.key), Figure) for row in table.rows)]
