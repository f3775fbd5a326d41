"""Drawings of the report as inline SVG; colours come from the page's style, so they follow its light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_BOX_W, _BOX_H, _GAP_X, _GAP_Y = 96, 34, 8, 20
_PAD = 10


def layer_svg(layer: Mapping[str, Any], title: str) -> Markup:
    """A layer's graph, top to bottom: a node stands below everything it reads; weights are named inside the node that reads them."""
    nodes = layer["nodes"]
    ranks = _ranks(nodes)
    columns: dict[int, list[int]] = {}
    for index, rank in enumerate(ranks):
        columns.setdefault(rank, []).append(index)
    widest = max(map(len, columns.values()))
    width = 2 * _PAD + widest * _BOX_W + (widest - 1) * _GAP_X
    place: dict[int, tuple[float, float]] = {}
    for rank, members in columns.items():
        members.sort(key=lambda index: (_wanted(nodes[index], place), index))
        start = (width - len(members) * _BOX_W - (len(members) - 1) * _GAP_X) / 2
        for column, index in enumerate(members):
            place[index] = (start + column * (_BOX_W + _GAP_X), _PAD + 24 + rank * (_BOX_H + _GAP_Y))
    middle = width / 2
    parts = [f'<text class="soft" x="{middle}" y="18" text-anchor="middle">from the layer before</text>']
    for index, node in enumerate(nodes):
        x, y = place[index]
        for source in node["inputs"]:
            if source == "residual":
                parts.append(_edge(middle, 22, x + _BOX_W / 2, y, faint=ranks[index] > 0))
            elif isinstance(source, int):
                from_x, from_y = place[source]
                parts.append(_edge(from_x + _BOX_W / 2, from_y + _BOX_H, x + _BOX_W / 2, y, faint=ranks[index] - ranks[source] > 1))
    for index, node in enumerate(nodes):
        x, y = place[index]
        weights = ", ".join(name for name in node["inputs"] if isinstance(name, str) and name != "residual")
        below = f"{weights} · {node['shape']}" if weights else node["shape"]
        parts.append(f'<g class="{escape(node["kind"])}"><title>{escape(node["op"])} {escape(below)}</title>')
        parts.append(f'<rect x="{x}" y="{y}" width="{_BOX_W}" height="{_BOX_H}" rx="6"/>')
        parts.append(f'<text x="{x + _BOX_W / 2}" y="{y + 14}" text-anchor="middle">{escape(_fit(node["op"], 15))}</text>')
        parts.append(f'<text class="soft" x="{x + _BOX_W / 2}" y="{y + 28}" text-anchor="middle">{escape(_fit(below, 18))}</text></g>')
    height = _PAD + 24 + (max(ranks) + 1) * (_BOX_H + _GAP_Y)
    return _svg(width, height, parts, title, fixed=True)


def roofline_svg(points: Sequence[Mapping[str, Any]], bandwidth_gb_s: float, peak_gflop_s: float) -> Markup:
    """Kernels on the machine's roof: x flop per byte, y GFLOP/s, both logarithmic.

    Args:
        points: each with flop_per_byte, gflop_per_s (both above 0) and label.
    """
    width, height, left, right, top, bottom = 640, 330, 64, 20, 14, 44
    xs = [p["flop_per_byte"] for p in points] + [peak_gflop_s / bandwidth_gb_s]
    low_x, high_x = _decades(xs)
    low_y, high_y = _decades([p["gflop_per_s"] for p in points] + [peak_gflop_s])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(max(y, 10.0**low_y)) - low_y) / (high_y - low_y)
        return round(left + across * (width - left - right), 1), round(height - bottom - up * (height - top - bottom), 1)

    parts = []
    for power in range(low_x, high_x + 1):
        x, _ = at(10.0**power, 10.0**low_y)
        parts.append(f'<path class="grid" d="M{x} {top}V{height - bottom}"/>')
        parts.append(f'<text class="soft" x="{x}" y="{height - bottom + 16}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(low_y, high_y + 1):
        _, y = at(10.0**low_x, 10.0**power)
        parts.append(f'<path class="grid" d="M{left} {y}H{width - right}"/>')
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    ridge = peak_gflop_s / bandwidth_gb_s
    start = max(10.0**low_x, 10.0**low_y / bandwidth_gb_s)
    corners = [at(start, start * bandwidth_gb_s), at(ridge, peak_gflop_s), at(10.0**high_x, peak_gflop_s)]
    parts.append('<path class="roof" d="M' + "L".join(f"{x} {y}" for x, y in corners) + '"/>')
    for point in points:
        x, y = at(point["flop_per_byte"], point["gflop_per_s"])
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="5"><title>{escape(point["label"])}</title></circle>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">flop per byte of weights and KV</text>')
    parts.append(f'<text transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle">GFLOP/s</text>')
    return _svg(width, height, parts, "Roofline")


def activations_svg(nbytes: Sequence[int], label: str) -> Markup:
    """Bytes alive over the calls of a step, as steps above zero.

    Args:
        nbytes: behind each call, in order; at least one.
        label: of the highest.
    """
    width, height, top, bottom = 640, 180, 26, 26
    most = max(nbytes) or 1
    across = width / len(nbytes)
    path = [f"M0 {height - bottom}"]
    for number, value in enumerate(nbytes):
        path.append(f"V{height - bottom - (height - top - bottom) * value / most:.1f}H{across * (number + 1):.1f}")
    peak = across * (nbytes.index(max(nbytes)) + 0.5)
    anchor = "start" if peak < width / 3 else "end" if peak > 2 * width / 3 else "middle"
    parts = [
        f'<path class="area" d="{"".join(path)}V{height - bottom}Z"/>',
        f'<path class="grid" d="M0 {height - bottom}H{width}"/>',
        f'<text x="{peak:.1f}" y="{top - 8}" text-anchor="{anchor}">{escape(label)}</text>',
        f'<text class="soft" x="0" y="{height - 8}">first of {len(nbytes)} calls</text>',
        f'<text class="soft" x="{width}" y="{height - 8}" text-anchor="end">last</text>',
    ]
    return _svg(width, height, parts, "Memory of a step over its calls")


def _ranks(nodes: Sequence[Mapping[str, Any]]) -> list[int]:
    ranks: list[int] = []
    for node in nodes:
        ranks.append(max((ranks[source] + 1 for source in node["inputs"] if isinstance(source, int)), default=0))
    return ranks


def _wanted(node: Mapping[str, Any], place: Mapping[int, tuple[float, float]]) -> float:
    """Below the mean of what it reads, so that lines cross little."""
    above = [place[source][0] for source in node["inputs"] if isinstance(source, int)]
    return sum(above) / len(above) if above else 0.0


def _edge(x1: float, y1: float, x2: float, y2: float, *, faint: bool) -> str:
    bend = min(40.0, (y2 - y1) / 2)
    return f'<path class="{"edge faint" if faint else "edge"}" d="M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"/>'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _fit(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _svg(width: float, height: float, parts: Sequence[str], title: str, *, fixed: bool = False) -> Markup:
    """`fixed`: at its natural width, to be scrolled, where shrinking would make the text unreadable."""
    style = f' style="width: {width:.0f}px; max-width: none"' if fixed else ""
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}"{style} role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>")
