"""The report: what it says of a graph, and a page that holds together on its own."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.capture import capture
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import pipeline
from llmc.compiler.report_layer import activations, kernels, layer_graph
from llmc.compiler.report_page import contents, gpu_padding, memory_plan, render_html, report_files, spans, startup_spans, write_measured
from llmc.compiler.report_svg import activations_svg, layer_svg, roofline_svg
from llmc.passes.base import PassContext
from llmc.passes.lower_experts import LowerExperts
from llmc.passes.runner import run_passes
from tests.passes.test_lower_experts import Experts, experts

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_model"

REPORT: dict[str, Any] = {
    "model": {"name": "toy <&>", "architecture": "Toy", "parameters": 2_000_000, "dtype": "bfloat16"},
    "target": {"name": "cpu", "level": "-O2"},
    "limits": {"max_model_len": 64, "max_num_seqs": 16, "max_num_batched_tokens": 32},
    "memory": {"weights_bytes": 1000, "kv_bytes_per_token": 10, "kv_bytes_per_full_sequence": 640, "block_size": 16,
               "kv_groups": ["2 layers, full"]},
    "passes": [{"name": "merge-qkv", "numerics": "exact", "matches": 2, "nodes_before": 9, "nodes_after": 7, "refusals": {"why <not>": 1}}],
    "ops": {"llmc.linear.default": 3},
    "extern_calls": ["llmc::linear"],
    "weights": [{"kind": "w.*", "tensors": 2, "bytes": 1000}],
    "canaries": [],
    "chat_template": "none",
    "quantization": None,
    "layer": {"number": 0, "before": {"elided": 1, "nodes": [
        {"op": "mul", "kind": "pointwise", "shape": "T × 8", "inputs": ["residual"]},
        {"op": "linear", "kind": "matmul", "shape": "T × 8", "inputs": [0, "q_proj<"]},
        {"op": "add", "kind": "pointwise", "shape": "T × 8", "inputs": ["residual", 1]}]},
        "after": {"elided": 0, "nodes": [{"op": "linear", "kind": "matmul", "shape": "T × 8", "inputs": ["residual", "q_proj"]}]}},
    "kernels": [{"op": "linear", "dtype": "bfloat16", "rows": 8, "columns": 8, "weight_bytes": 128, "padding_bytes": 0,
                 "flop_per_token": 128, "kv_bytes_per_token": 0, "count": 3}],
}  # fmt: skip
MEASURED: dict[str, Any] = {
    "stages": [{"name": "read", "seconds": 1.0, "detail": "a"}, {"name": "lower", "seconds": 3.0, "detail": "b"}],
    "seconds": 4.0,
    "artifact_bytes": 1500,
    "toolchain": {},
    "files": {"manifest.json": 100, "weights/model.safetensors": 1000, "images/a.so": 300, "images/b.so": 100},
    "startup_ms": {"verify": 10.0, "load.code": 40.0, "load.weights": 20.0, "load": 40.0, "canary": 50.0},
    "kernels": {"bandwidth_gb_s": 20.0, "peak_gflop_s": 900.0, "rows": [
        {"name": "linear 8 × 8", "rows": 1, "us": 2.0, "bytes": 128, "flop": 128, "of_limit": 0.5, "share": 0.25}]},
    "pass_gain": {"merge-qkv": "1.02 [1.00, 1.05]"},
}  # fmt: skip


class Page(HTMLParser):
    """Collects what could reach outside, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "action")]
        if tag in ("script", "link", "iframe", "img", "object"):
            self.outside.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def page_of(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


def test_a_whole_report_is_one_page_that_reaches_for_nothing() -> None:
    page = page_of(render_html(REPORT, MEASURED))
    assert (page.outside, page.open) == ([], [])
    assert "toy <&>" in page.text and "left 1 alone: why <not>" in page.text
    for heading in ("Where the time went", "Passes", "Layer 0, before and after the passes", "Kernels", "Kernels, measured", "Memory",
                    "What the artifact holds", "Where a start goes", "Weights", "Canaries"):  # fmt: skip
        assert heading in page.text
    assert "1.02 [1.00, 1.05]" in page.text


def test_what_a_pass_saves_is_shown_and_called_predicted() -> None:
    saved = {p["name"]: {"launches_saved": -57, "bytes_saved": -7_602_176} for p in REPORT["passes"]}
    text = page_of(render_html({**REPORT, "predicted": saved})).text
    assert "−57" in text and "−7.6 MB" in text and any("saved are predicted" in part for part in text)
    assert "bytes saved" not in page_of(render_html(REPORT)).text


def test_passes_that_were_left_out_are_named() -> None:
    searched = {**REPORT, "choice": "+merge-qkv,-fuse-silu-mul,-fuse-gelu-mul", "target": {"name": "cpu", "level": "-O3"}}
    text = page_of(render_html(searched)).text
    assert (
        "Left out: fuse-silu-mul, fuse-gelu-mul; added: merge-qkv, by --passes, or because the step was not faster with them "
        "(stage search)." in text
    )
    assert "Left out: fuse-silu-mul, by --passes." in page_of(render_html({**REPORT, "choice": "-fuse-silu-mul"})).text


def test_facts_alone_and_a_report_of_an_earlier_version_are_pages_too() -> None:
    page = page_of(render_html(REPORT))
    assert (page.outside, page.open) == ([], []) and "Where the time went" not in page.text and "Kernels, measured" not in page.text
    earlier = {name: value for name, value in REPORT.items() if name not in ("layer", "kernels", "quantization")}
    page = page_of(render_html(earlier, {name: MEASURED[name] for name in ("stages", "seconds", "artifact_bytes", "toolchain")}))
    assert page.open == [] and "Kernels" not in page.text and "Where a start goes" not in page.text


def test_the_same_facts_give_the_same_bytes() -> None:
    assert report_files(REPORT) == report_files(json.loads(json.dumps(REPORT)))
    assert set(report_files(REPORT)) == {"report/report.json", "report/report.html"}


def test_measured_reports_replace_what_was_there(tmp_path: Path) -> None:
    write_measured(tmp_path / "r", REPORT, {**MEASURED, "seconds": 9.0})
    write_measured(tmp_path / "r", REPORT, MEASURED)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "r" / "report.json").read_text())["measured"]["seconds"] == 4.0


def test_the_waterfall_is_a_partition() -> None:
    first, second = spans(MEASURED["stages"])
    assert (first["start"], first["width"], second["start"], second["width"]) == (0, 25, 25, 75)


def test_parts_of_a_start_lie_inside_it() -> None:
    found = {row["name"]: row for row in startup_spans(MEASURED["startup_ms"])}
    assert (found["load"]["start"], found["load"]["width"]) == (10, 40)
    assert found["load.code"]["start"] == found["load.weights"]["start"] == 10 and found["load.weights"]["width"] == 20
    assert found["canary"]["start"] == 50


def test_memory_grows_with_full_sequences() -> None:
    rows = memory_plan(REPORT)
    assert [(row["sequences"], row["bytes"]) for row in rows] == [(0, 1000), (1, 1640), (8, 6120), (16, 11240)]
    assert rows[-1]["weights_share"] + rows[-1]["kv_share"] == pytest.approx(100, abs=0.02)


def test_contents_are_summed_by_part() -> None:
    assert contents(MEASURED["files"]) == [
        {"part": "weights", "files": 1, "bytes": 1000},
        {"part": "code", "files": 2, "bytes": 400},
        {"part": "manifest", "files": 1, "bytes": 100},
    ]


def test_nodes_are_drawn_below_what_they_read() -> None:
    drawing = layer_svg(REPORT["layer"]["before"], "layer")
    tops = [float(y) for y in re.findall(r'<rect x="[0-9.]+" y="([0-9.]+)"', drawing)]
    assert len(tops) == 3 and tops == sorted(tops) and len(set(tops)) == 3
    assert "q_proj&lt; · T × 8" in drawing and "<q_proj" not in drawing


def test_the_roof_bends_at_its_ridge() -> None:
    points = [
        {"flop_per_byte": 1.0, "gflop_per_s": 10.0, "label": "memory"},
        {"flop_per_byte": 500.0, "gflop_per_s": 800.0, "label": "compute"},
    ]
    drawing = roofline_svg(points, bandwidth_gb_s=20.0, peak_gflop_s=900.0)
    spots = [(float(x), float(y)) for x, y in re.findall(r'cx="([0-9.]+)" cy="([0-9.]+)"', drawing)]
    corners = [(float(x), float(y)) for x, y in re.findall(r"([0-9.]+) ([0-9.]+)", re.search(r'class="roof" d="([^"]+)"', drawing)[1])]  # type: ignore[index]
    assert corners[1][1] == corners[2][1] < corners[0][1]  # flat after the ridge, rising before
    assert spots[0][0] < corners[1][0] < spots[1][0]
    assert spots[1][1] > corners[1][1]  # below the roof: y grows downwards


def test_memory_over_a_step_is_drawn_to_scale() -> None:
    drawing = activations_svg([100, 400, 200], "400 B behind <softmax>")
    heights = [154 - float(y) for y in re.findall(r"V([0-9.]+)H", drawing)]
    assert heights == [32, 128, 64] and "behind &lt;softmax&gt;" in drawing
    page = page_of(render_html({**REPORT, "activations": {"tokens": 64, "bytes": [100, 400], "peak_op": "linear"}}))
    assert page.open == [] and "400 B behind linear" in page.text


def test_padding_of_plans_is_what_the_next_smaller_one_leaves() -> None:
    sizes = ("decode 1", "decode 2", "decode 8", "prefill 64", "prefill 128")
    assert gpu_padding([{"size": size} for size in sizes]) == ["0 of 1", "0 of 2", "5 of 8", "63 of 64", "63 of 128"]


@pytest.fixture(scope="module")
def demo_graphs() -> tuple[Any, Any]:
    """The demo model's graph as captured, and after the passes of -O2."""
    traced = capture(read_model(DEMO, dtype="auto"), block_size=16, max_model_len=64)
    captured, graph, weights = traced.untouched().graph, traced.graph, traced.weight_table()
    run_passes(graph, pipeline(2), PassContext(weights=weights, max_positions=64))
    return captured, graph


def test_a_layer_is_told_from_its_neighbours(demo_graphs: tuple[Any, Any]) -> None:
    before, after = (layer_graph(graph, 1) for graph in demo_graphs)
    assert before is not None and after is not None
    named = {name for node in before["nodes"] for name in node["inputs"] if isinstance(name, str)}
    assert named == {"residual", "input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj", "post_attention_layernorm",
                     "gate_proj", "up_proj", "down_proj"}  # fmt: skip
    assert [node["op"] for node in before["nodes"]].count("linear") == 7
    assert sum("attention" in node["op"] or "attend" in node["op"] for node in before["nodes"]) == 1
    assert len(after["nodes"]) < len(before["nodes"])
    for layer in (before, after):
        assert all(source < index for index, node in enumerate(layer["nodes"]) for source in node["inputs"] if isinstance(source, int))
        read = {source for node in layer["nodes"] for source in node["inputs"]}
        assert set(range(len(layer["nodes"]) - 1)) <= read  # nothing hangs loose; the last goes to the next layer
    assert layer_graph(demo_graphs[0], 3) is None  # the last layer has no next one to end at


def test_kernels_have_the_bytes_of_their_weights(demo_graphs: tuple[Any, Any]) -> None:
    found = kernels(demo_graphs[1])
    linears = [k for k in found if k["op"].startswith("linear")]
    assert sum(k["count"] for k in linears) == 4 * 4 + 1  # qkv, o, gate and up, down per layer; the head
    assert [(k["rows"], k["count"]) for k in found if k["per"] == "logits"] == [(2048, 1)]  # the head alone
    assert {k["padding_bytes"] for k in linears} == {0}  # 192 and 512 are multiples of 32
    assert all(k["weight_bytes"] == 2 * k["rows"] * k["columns"] and k["flop_per_token"] == 2 * k["rows"] * k["columns"] for k in linears)
    (attention,) = [k for k in found if k["kv_bytes_per_token"]]
    assert (attention["count"], attention["rows"], attention["kv_bytes_per_token"]) == (4, 4, 2 * 2 * 64 * 2)


def test_a_step_holds_most_where_the_mlp_is_widest_or_the_logits_are(demo_graphs: tuple[Any, Any]) -> None:
    found = activations(demo_graphs[1])
    assert found["tokens"] == 64 and len(found["bytes"]) > 4 * 6
    assert found["peak_op"] == "linear" and max(found["bytes"]) == found["bytes"][-1]  # the head: 2048 logits a token
    assert max(found["bytes"]) == 64 * (2048 + 2 * 192) * 2  # beside what the last add_rms_norm gives: the sum and its norm


def test_experts_say_how_many_there_are_and_how_many_a_token_chooses() -> None:
    class Chosen(Experts):
        def forward(self, x: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(x.repeat_interleave(2, 0), expert_ids.repeat_interleave(2, 0))

    after, _ = experts(Chosen()).apply(LowerExperts())
    found = kernels(after.gm)
    assert [(k["experts"], k["choices"], k["flop_per_token"]) for k in found] == [(3, 2, 2 * 2 * 20 * 12)] * 2
    assert {k["count"] for k in kernels(experts(Experts()).apply(LowerExperts())[0].gm)} == {1}
