"""The load generator: arrivals that nobody holds back, every request accounted for, whatever the server does."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmc.bench.open_loop import LoadConfig, arrivals, bench_serve, prompt_of
from llmc.bench.result import GATE_FAILED
from llmc.cli import main
from llmc.errors import ConfigError
from tests.bench.stub_server import stub_server, tokens


def say(text: str) -> None:
    """Nobody listens."""


def config(url: str, **changes: Any) -> LoadConfig:
    return LoadConfig(**{"base_url": url, "rate": 500.0, "num_requests": 12, "new_tokens": 3, "warmup": 0, "timeout_s": 30.0, **changes})


def counts(result: Any) -> dict[str, Any]:
    return {row["what"]: row["value"] for row in result.tables[1].rows}


def test_arrivals_are_a_poisson_process_from_a_seed() -> None:
    times = arrivals(5.0, 4000, seed=3)
    gaps = [b - a for a, b in zip([0.0, *times[:-1]], times, strict=True)]
    assert times == sorted(times) == arrivals(5.0, 4000, seed=3) != arrivals(5.0, 4000, seed=4)
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.06)  # four standard errors of 4000 gaps
    assert statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.1)  # of an exponential distribution, the mean


def test_prompts_differ_and_repeat_with_the_seed() -> None:
    assert prompt_of(0, 1, 20) == prompt_of(0, 1, 20) != prompt_of(0, 2, 20)
    assert len(prompt_of(0, 1, 20).split()) == 20


def test_no_request_waits_for_an_answer() -> None:
    """The server answers none before all have come: a client that waited for answers would wait for ever."""
    everyone = threading.Barrier(12, timeout=20)

    def reply(body: dict[str, Any]) -> Iterator[str]:
        everyone.wait()
        return tokens(body["max_tokens"])

    with stub_server(reply) as url:
        result = bench_serve(config(url), say)
    assert counts(result)["requests answered"] == 12
    assert counts(result)["failed"] == 0
    assert len(result.details["requests"]) == 12


def test_what_fails_is_counted_and_named_and_the_rest_goes_on() -> None:
    numbers = iter(range(100))
    lock = threading.Lock()

    def reply(body: dict[str, Any]) -> Iterator[str] | tuple[int, str]:
        with lock:
            number = next(numbers)
        kinds = {0: (503, "busy"), 1: iter(["data: {broken"]), 2: iter(['data: {"error": {"message": "engine died"}}']), 3: iter([])}
        return kinds.get(number) or tokens(3)

    with stub_server(reply) as url:
        result = bench_serve(config(url), say)
    assert (counts(result)["requests answered"], counts(result)["failed"]) == (8, 4)
    middle = {row["what"]: row["p50"] for row in result.tables[0].rows}
    assert len(middle["first token (TTFT)"].samples) == len(middle["whole answer"].samples) == 8  # type: ignore[union-attr]
    assert isinstance(middle["between tokens (ITL)"], float)
    notes = " ".join(result.tables[1].notes)
    for part in ("status 503: busy", "no usable answer", "engine died", "without a token"):
        assert part in notes
    json.dumps(result.as_json(), allow_nan=False)


def test_a_server_that_answers_nothing_is_an_error() -> None:
    with stub_server(lambda body: (500, "no")) as url, pytest.raises(ConfigError, match="every request failed; the first: status 500"):
        bench_serve(config(url), say)
    with pytest.raises(ConfigError, match="no server answers there"):
        bench_serve(config("http://127.0.0.1:9"), say)
    with pytest.raises(ConfigError, match="no address"):
        config("localhost:8000", model="m")


def test_gates_and_goodput_end_the_command_with_their_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    with stub_server(lambda body: tokens(2)) as url:
        common = ["bench", "serve", "--base-url", url, "--num-requests", "6", "--rate", "400", "--output-len", "2", "--warmup", "1"]
        files = ["--json", str(data), "--html", str(page)]
        assert main([*common, "--goodput", "ttft:60000", "--min-goodput", "0.001", "--max-p99-ttft", "60000", *files]) == 0
        assert main([*common, "--goodput", "ttft:0", "--min-goodput", "0.001"]) == GATE_FAILED
    assert "gate --min-goodput 0.001: FAILED, measured 0" in capsys.readouterr().out
    saved = json.loads(data.read_text())
    assert saved["workload"]["seed"] == 0 and saved["environment"]["commit"] and all(gate["passed"] for gate in saved["gates"])
    assert "gate" not in page.read_text() or "FAILED" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an ARTIFACT to serve"),
        (["a", "--base-url", "http://x"], "one of them"),
        (["a", "--rate", "0"], "above 0"),
        (["a", "--goodput", "speed:3"], "accepted are ttft, itl and e2e"),
        (["a", "--goodput", "ttft"], "a name and milliseconds"),
        (["a", "--min-goodput", "3"], "give the bounds with --goodput"),
    ],
)
def test_settings_that_make_no_run(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err
