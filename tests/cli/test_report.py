"""`llmc report`: one artifact's, two compared, and what does not belong to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.cli import main
from llmc.cli import report as command
from llmc.compiler.report_compare import compare
from tests.compiler.test_report import MEASURED, REPORT

OTHER: dict[str, Any] = {
    **REPORT,
    "memory": {**REPORT["memory"], "weights_bytes": 500},
    "passes": [],
    "measured": {**MEASURED, "startup_ms": {"verify": 20.0}},
}


def test_what_differs_is_named_and_what_is_equal_is_not() -> None:
    found = {(one.part, one.name): one for one in compare({**REPORT, "measured": MEASURED}, OTHER)}
    weights = found["memory", "weights_bytes"]
    assert (weights.a, weights.b, weights.factor) == (1000, 500, 0.5)
    assert (found["passes", "merge-qkv"].b, found["passes", "merge-qkv"].factor) == (None, None)
    assert found["start, ms", "verify"].factor == 2.0 and found["start, ms", "canary"].b is None
    assert not any(part in ("model", "target", "limits", "kernels") for part, _ in found)
    assert compare(REPORT, REPORT) == []


def test_parts_stand_together_and_stages_of_one_name_are_added() -> None:
    stages = [{"name": "accuracy", "seconds": 1.5, "detail": ""}] * 2
    found = compare(REPORT, {**OTHER, "kv_quantization": {"scheme": "int8"}, "measured": {**MEASURED, "stages": stages}})
    parts = [one.part for one in found]
    assert [part for place, part in enumerate(parts) if part not in parts[:place]] == [
        part for place, part in enumerate(parts) if place == 0 or parts[place - 1] != part
    ]
    assert [one.b for one in found if one.name == "accuracy"] == [3.0]
    assert [one.b for one in found if one.part == "KV cache"] == ["int8"]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts "a" and "b" whose reports are REPORT and OTHER."""
    known = {"a": {**REPORT, "measured": MEASURED}, "b": OTHER}
    monkeypatch.setattr(command, "read_report", lambda path: json.loads(json.dumps(known[path.name])))


@pytest.mark.usefixtures("reports")
def test_two_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "a", "b"]) == 1
    shown = capsys.readouterr().out
    assert "weights_bytes" in shown and "1.0 kB" in shown and "500 B" in shown and "0.50" in shown
    assert main(["report", "a", "a"]) == 0
    assert "are equal" in capsys.readouterr().out
    assert main(["report", "a", "b", "--json"]) == 1
    assert {"part", "name", "a", "b", "factor"} == json.loads(capsys.readouterr().out)[0].keys()
    assert main(["report", "a", "b", "--html", "x"]) == 2


@pytest.mark.usefixtures("reports")
def test_a_page_takes_in_what_was_measured_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gain = {"pass": "merge-qkv", "decode 1": {"median": 1.25, "low": 1.2, "high": 1.3}, "kl": 0.0025}
    levels, kernels, page = tmp_path / "levels.json", tmp_path / "kernels.json", tmp_path / "page.html"
    levels.write_text(json.dumps({"benchmark": "levels", "tables": [{}, {"rows": [gain]}]}))
    kernels.write_text(json.dumps({"benchmark": "kernels", "details": {"kernels": MEASURED["kernels"]}}))
    assert main(["report", "a", "--html", str(page), "--levels", str(levels), "--kernels", str(kernels)]) == 0
    assert "1.250 [1.200, 1.300]" in page.read_text() and "2.5e−03" in page.read_text() and "Kernels, measured" in page.read_text()
    assert main(["report", "a", "--html", str(page), "--kernels", str(levels)]) == 2
    assert "is no --json file of `llmc bench kernels`" in capsys.readouterr().err
    assert main(["report", "a", "--kernels", str(kernels), "--levels", str(levels)]) == 0  # in a terminal, too
    shown = capsys.readouterr().out
    assert "kernels, measured" in shown and "1.250 [1.200, 1.300]" in shown
    kernels.write_text(json.dumps({"details": {"kernels": {"rows": [{**MEASURED["kernels"]["rows"][0], "name": "linear 9 × 9"}]}}}))
    assert main(["report", "a", "--kernels", str(kernels)]) == 2
    assert "has times of linear 9 × 9, and a has no such kernel; run llmc bench kernels a" in capsys.readouterr().err
    assert main(["report", "a", "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    levels.write_text("[")
    assert main(["report", "a", "--levels", str(levels)]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err


@pytest.mark.usefixtures("reports")
def test_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "a"]) == 0
    shown = capsys.readouterr().out
    assert "merge-qkv" in shown and "linear 8 × 8" in shown and "compiled in 4.0 s" in shown


def test_a_folder_without_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 4
    assert "there is no such artifact" in capsys.readouterr().err
