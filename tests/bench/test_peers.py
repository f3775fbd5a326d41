"""What `benchmarks/decode.py --peers` makes of what it finds and measures; the engines themselves are not in the tests' environment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.decode_peers import BARS, PeerFailed, lines, peers, ratios, turns

ROOT = Path(__file__).resolve().parents[2]


def test_ours_is_held_against_the_best_of_theirs_that_was_measured() -> None:
    medians = {"llmc": 200.0, "llmc int8": 300.0, "llama.cpp bf16": 100.0, "OpenVINO": 160.0}
    (found,) = ratios("concurrent", medians)
    assert found == {"ours": "llmc", "theirs": "OpenVINO", "ratio": 1.25, "bar": 1.2}
    assert [(r["ours"], r["theirs"]) for r in ratios("decode", medians)] == [("llmc", "llama.cpp bf16")]
    assert ratios("prefill", {"llmc": 1.0}) == []


def test_an_engine_that_is_not_there_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "v-llama/bin").mkdir(parents=True)
    (tmp_path / "v-llama/bin/python").touch()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/S.gguf").touch()
    found = {peer.name: peer for peer in peers(tmp_path, "S", tmp_path / "model", plain_llama=True)}
    assert set(found) == {who for rows in BARS.values() for _, theirs, _ in rows for who in theirs}
    assert found["llama.cpp bf16"].missing is None and found["llama.cpp bf16"].flags == ("--plain",)
    assert found["llama.cpp q8_0"].missing == tmp_path / "gguf/S-q8_0.gguf"
    assert found["vLLM"].missing == tmp_path / "v-vllm/bin/python"
    shown = lines("S", {"not_measured": {"vLLM": "there is no v-vllm"}, "start": {"contenders": {}, "libraries": []}})
    assert shown == ["S     not measured            vLLM: there is no v-vllm"]


WORKER = """
import sys
from benchmarks.peer_worker import arguments, report
args = arguments("--odd")
def generate(prompts, new):
    if args.startup:
        assert (len(prompts), len(prompts[0]), new) == (1, 9, 1)
    else:
        assert (len(prompts), len(prompts[0]), new) in [(2, 4, 6), (1, 9, 11)]
    return 0.5, 0.5 + 0.1 * (new - 1)
report(generate, args, 1000)
"""


@pytest.mark.parametrize("startup", [False, True])
def test_a_worker_says_what_it_measured_without_llmc_or_torch(startup: bool) -> None:
    sizes = ["--startup"] if startup else ["--sizes", "2x4x6", "1x9x11", "--repeat", "2"]
    command = [sys.executable, "-S", "-c", WORKER, "model", "--odd", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    answer = json.loads(done.stdout)
    if startup:
        assert answer["first_token_at"] > 0 and answer["pss_bytes"] > 1 << 20
    else:
        assert list(answer["sizes"]) == ["2x4x6", "1x9x11"]
        assert answer["sizes"]["2x4x6"] == [{"prefill_s": 0.5, "decode_tok_s": pytest.approx(20), "total_tok_s": pytest.approx(12)}] * 2


def test_contenders_take_turns_and_keep_what_each_measured() -> None:
    order = []

    def contender(name: str, value: float) -> Callable[[int], dict[str, list[float]]]:
        return lambda threads: order.append(name) or {"decode": [value, threads]}  # type: ignore[func-returns-value]

    def broken(threads: int) -> dict[str, list[float]]:
        raise PeerFailed("its process ended with status -8:")

    contenders = {"ours": contender("ours", 1.0), "broken": broken, "theirs": contender("theirs", 2.0)}
    assert turns(contenders, 2, 2) == (
        {"ours": {"decode": [1.0, 2, 1.0, 2]}, "theirs": {"decode": [2.0, 2, 2.0, 2]}},
        {"broken": "its process ended with status -8:"},
    )
    assert order == ["ours", "theirs"] * 2
