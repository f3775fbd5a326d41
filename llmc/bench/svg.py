"""Two charts as inline SVG: horizontal bars with their intervals, and a scatter plot. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence

import markupsafe

from llmc.bench.figure import Figure, number
from llmc.bench.result import Chart, Column, Table

_ROW, _BAR, _RIGHT = 26, 210, 110  # pixels: a bar's row, the longest bar, the number behind it
_LETTER, _MOST_LETTERS = 7.2, 28  # width of a letter on average, generously; letters of a label
_LABEL_H = 16  # height that a label in a scatter plot keeps to itself


def bars(table: Table, column: Column) -> markupsafe.Markup:
    """One bar per row that has the figure, from zero, with a line for its interval."""
    rows = [(str(row.get(table.columns[0].key, "")), cell) for row in table.rows if isinstance(cell := row.get(column.key), Figure)]
    top = max(cell.interval[1] for _, cell in rows) or 1.0
    scale = _BAR / top
    left = round(_LETTER * max(len(_short(name)) for name, _ in rows)) + 10
    parts = []
    for index, (name, cell) in enumerate(rows):
        y = index * _ROW
        low, high, _ = cell.interval
        width, x_low, x_high = (round(scale * max(0.0, value), 1) for value in (cell.median, low, high))
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{markupsafe.escape(_short(name))}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{y + 5}" width="{max(1.0, width)}" height="16" rx="3"/>')
        if len(cell.samples) > 1:
            parts.append(f'<path class="ci" d="M{round(left + x_low, 1)} {y + 13}H{round(left + x_high, 1)}"/>')
        text = f"{number(cell.median, column.digits)} {column.unit}".strip()
        parts.append(f'<text class="soft" x="{round(left + max(width, x_high) + 6, 1)}" y="{y + 17}">{markupsafe.escape(text)}</text>')
    return _svg(left + _BAR + _RIGHT, _ROW * len(rows), parts, f"{column.title} per {table.columns[0].title}")


def scatter(chart: Chart) -> markupsafe.Markup:
    """Points with labels on linear or logarithmic axes, and a line. A label stands to the right of its point, where a front that falls
    does not run; the last points' labels have room beside the axes."""
    width, height, left, bottom, top = 720, 380, 64, 46, 16
    xs = [p.x for p in chart.points] + [x for x, _ in chart.line]
    ys = [p.y for p in chart.points] + [y for _, y in chart.line]
    x_axis, y_axis = _Axis.over(xs, chart.logarithmic), _Axis.over(ys, chart.logarithmic)
    right = 24.0  # as much as the label needs that reaches farthest
    for point in chart.points:
        if point.marked and (share := x_axis.share(point.x)) > 0:
            right = max(right, width - left - (width - left - 12 - _LETTER * len(_short(point.label))) / share)
    right = math.ceil(right)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(left + x_axis.share(x) * (width - left - right), 1),
            round(height - bottom - y_axis.share(y) * (height - bottom - top), 1),
        )

    parts = []
    for tick in x_axis.ticks():
        x, _ = at(tick, y_axis.low)
        parts.append(f'<path class="grid" d="M{x} {top}V{height - bottom}"/>')
        parts.append(f'<text class="soft" x="{x}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_axis.ticks():
        _, y = at(x_axis.low, tick)
        parts.append(f'<path class="grid" d="M{left} {y}H{width - right}"/>')
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    if chart.line:
        path = "L".join(f"{x} {y}" for x, y in (at(*one) for one in chart.line))
        parts.append(f'<path class="front" d="M{path}"/>')
    taken: list[tuple[float, float, float]] = []
    for point in sorted(chart.points, key=lambda p: not p.marked):
        x, y = at(point.x, point.y)
        title = f"<title>{markupsafe.escape(point.label)}</title>" if point.label else ""
        parts.append(f'<circle class="{"dot best" if point.marked else "dot"}" cx="{x}" cy="{y}" r="5">{title}</circle>')
        long = 9 + _LETTER * len(_short(point.label))
        start = x if x + long <= width else x - long
        if not point.label or any(start < end and begin < start + long and abs(y - above) < _LABEL_H for begin, end, above in taken):
            continue  # it would lie on another's; the title still names it
        taken.append((start, start + long, y))
        place = f'x="{x + 9}" y="{y - 7}"' if start == x else f'x="{x - 9}" y="{y - 7}" text-anchor="end"'
        parts.append(f'<text class="soft" {place}>{markupsafe.escape(_short(point.label))}</text>')
    x_name, y_name = markupsafe.escape(chart.x_title), markupsafe.escape(chart.y_title)
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{x_name}</text>')
    middle = (height - bottom + top) / 2
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{y_name}</text>')
    return _svg(width, height, parts, chart.title)


class _Axis:
    """A range of values on [0, 1]."""

    def __init__(self, low: float, high: float, logarithmic: bool) -> None:
        self.low, self.high, self.logarithmic = low, high, logarithmic

    @classmethod
    def over(cls, values: Sequence[float], logarithmic: bool) -> _Axis:
        if logarithmic:
            low = 10.0 ** math.floor(math.log10(min(values)))
            return cls(low, max(10.0 ** math.ceil(math.log10(max(values))), 10 * low), True)
        step = _step(max(values))
        return cls(0.0, step * max(1, math.ceil(max(values) / step)), False)

    def share(self, value: float) -> float:
        if self.logarithmic:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = _step(self.high)
        return [step * i for i in range(round(self.high / step) + 1)]


def _step(top: float) -> float:
    """1, 2 or 5 times a power of ten: about five steps up to `top`."""
    if top <= 0:
        return 1.0
    raw = top / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)


def _short(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else name[: _MOST_LETTERS - 1] + "…"


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> markupsafe.Markup:
    label = markupsafe.escape(title)
    return markupsafe.Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">' + "".join(parts) + "</svg>")
