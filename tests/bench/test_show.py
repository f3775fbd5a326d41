"""What people see: terminal, page, JSON."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

from rich.console import Console

from llmc.bench.figure import figure, number
from llmc.bench.result import GATE_FAILED, BenchResult, Chart, Column, Point, Table, at_least, at_most
from llmc.bench.show import cell_text, html, plain, show

ROWS = [
    {"level": "-O0", "speed": figure([100, 110, 90]), "size": 5.0, "kl": None},
    {"level": "-O2 <b>&", "speed": figure([200, 220, 180]), "size": 6.5, "kl": 4e-6},
]
COLUMNS = [
    Column(key="level", title="level"),
    Column(key="speed", title="decode", unit="tok/s", better="higher"),
    Column(key="size", title="artifact", unit="MB", better="lower"),
    Column(key="kl", title="mean KL", unit="nats", digits=6),
]
CHART = Chart(title="front", x_title="x", y_title="y", points=[Point(x=1, y=30, label="a<b"), Point(x=90, y=2, label="c", marked=True)],
              line=[(1, 30), (90, 2)])  # fmt: skip


def result(**changes: object) -> BenchResult:
    fields = {
        "benchmark": "levels",
        "workload": {"seed": 7},
        "tables": [Table(title="levels", columns=COLUMNS, rows=ROWS)],
        "charts": [CHART],
    }
    return BenchResult(**{**fields, **changes})  # type: ignore[arg-type]


def shown(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(result(gates=at_most("--max-kl", 1e-9, 4e-6)), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_wide_table_stands_as_it_is_and_a_narrow_terminal_turns_it() -> None:
    wide, narrow = shown(150), shown(66)
    assert re.search(r"-O0\s+│\s+100\.0 \[90\.0, 110\.0\]", wide)
    assert re.search(r"decode \(tok/s\) ↑\s+│\s+100\.0 \[90\.0, 110\.0\]\s+│\s+200\.0", narrow)
    for text in (wide, narrow):
        assert "0.000004" in text and "gate --max-kl 1e-09: FAILED, measured 4e-06" in text
        assert "[interval of the median] (3 samples, 75 %)" in text


class Page(HTMLParser):
    """Collects what could reach outside, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "action")]
        if tag in ("script", "link", "iframe", "img", "object"):
            self.outside.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_reaches_for_nothing() -> None:
    text = html(result())
    page = Page()
    page.feed(text)
    assert page.outside == [] and page.open == []
    assert "-O2 &lt;b&gt;&amp;" in text and "a&lt;b" in text and "<b>" not in text
    assert text.count("<svg") == 2  # bars of the one measured column, and the front
    assert "default-src 'none'" in text


def test_a_table_of_many_columns_is_turned_on_the_page() -> None:
    columns = [COLUMNS[0], *(Column(key=f"c{i}", title=f"column {i}") for i in range(8))]
    rows: list[dict[str, object]] = [{"level": "-O0", **{f"c{i}": i for i in range(8)}}]
    text = html(result(tables=[Table(title="wide", columns=columns, rows=rows)]))  # type: ignore[arg-type]
    assert "<tr><th>level</th><th>-O0</th></tr>" in text and "<tr><td>column 7</td><td>7</td></tr>" in text
    assert "<th>decode (tok/s) ↑</th>" in html(result())  # few columns: as it is


def test_logarithmic_charts_hold_their_points() -> None:
    points = [Point(x=0.5, y=3, label="low"), Point(x=4000, y=900, label="high")]
    text = html(result(charts=[Chart(title="roofline", x_title="x", y_title="y", points=points, logarithmic=True)]))
    spots = [(float(x), float(y)) for x, y in re.findall(r'cx="([0-9.]+)" cy="([0-9.]+)"', text)]
    assert len(spots) == 2 and all(64 <= x <= 696 and 16 <= y <= 334 for x, y in spots)
    assert spots[0][0] < spots[1][0] and spots[0][1] > spots[1][1]


def test_json_keeps_every_sample() -> None:
    plain = json.loads(json.dumps(result().as_json(), allow_nan=False))
    assert plain["tables"][0]["rows"][0]["speed"]["samples"] == [100, 110, 90]
    assert plain["tables"][0]["units"]["speed"] == "tok/s" and plain["workload"] == {"seed": 7}
    assert {"commit", "cpu", "versions", "time"} <= plain["environment"].keys()


def test_gates() -> None:
    assert result().exit_code == 0
    assert result(gates=at_most("a", 1.0, 1.0)).exit_code == 0
    assert result(gates=[*at_most("a", 1.0, 0.5), *at_least("b", 2.0, 1.99)]).exit_code == GATE_FAILED
    assert result(gates=at_most("a", 1.0, float("nan"))).exit_code == GATE_FAILED
    assert at_most("a", None, 3.0) == []


def test_what_was_recorded_reads_as_text() -> None:
    assert [plain(value) for value in ((2,), ["a", "b"], (), None, True, {"torch": "2", "cores": [1, 2]}, 4.5)] == [
        "2", "a, b", "none", "-", "yes", "torch 2, cores 1, 2", "4.5"]  # fmt: skip
    assert "<dt>new tokens</dt><dd>1, 2</dd>" in html(result(workload={"new_tokens": (1, 2)}))


def test_labels_keep_to_their_chart_and_to_themselves() -> None:
    names = ["-O2 int8, batch 16, 2 threads", "-O2, batch 1"]
    rows = [{"level": name, "speed": figure([10.0, 12.0])} for name in names]
    bars = Table(title="t", columns=COLUMNS[:2], rows=rows)
    points = [Point(x=x, y=9 - x, label=names[x % 2], marked=True) for x in range(9)]
    text = html(result(tables=[bars], charts=[Chart(title="front", x_title="x", y_title="y", points=points)]))
    ends = re.findall(r'<text x="([0-9]+)" y="[0-9]+" text-anchor="end">([^<]*)</text>', text)
    assert [name for _, name in ends] == ["-O2 int8, batch 16, 2 threa…", names[1]] and all(int(x) > 6.5 * len(name) for x, name in ends)
    labels = re.findall(r'<text class="soft" x="([0-9.]+)" y="([0-9.]+)">(-O2[^<]*)</text>', text)
    assert len(labels) == 9 and all(float(x) + 6.5 * len(name) <= 720 for x, _, name in labels)


def test_numbers() -> None:
    assert [number(v, 1) for v in (0.0, 0.04, 0.06, 12.34)] == ["0.0", "0.04", "0.1", "12.3"]
    assert cell_text(figure([2.0]), COLUMNS[1]) == "2.0" and cell_text(None, COLUMNS[1]) == "-" and cell_text(3, COLUMNS[1]) == "3"
