"""Other engines beside llmc, at one and two threads: what `decode.py --peers [DIR]` adds to its results.

DIR holds a Python for each engine, and the models in its form; an engine that is not there is named in the results:
    v-llama/bin/python   llama-cpp-python; gguf/NAME.gguf (bf16), gguf/NAME-q8_0.gguf
    v-vllm/bin/python    vLLM for CPUs; takes the model folder
    v-ov/bin/python      openvino-genai; ov/NAME-fp16, made by optimum-cli export openvino
llama.cpp's AMX code ends some virtual machines' processes with a segmentation fault; `--llama-plain` runs it without its repacked
buffers, and the result says so.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.peer_worker import Size
from llmc.bench.contenders import cold_start, engine_rows
from llmc.bench.workload import Mode

THREADS = (1, 2)
# mode -> ours, theirs (the best of those that were measured), at least
BARS = {
    "decode": [("llmc", ["llama.cpp bf16"], 1.3), ("llmc int8", ["llama.cpp q8_0"], 1.1)],
    "prefill": [("llmc", ["llama.cpp bf16", "llama.cpp q8_0", "vLLM", "vLLM eager", "OpenVINO"], 1.0)],
    "concurrent": [("llmc", ["llama.cpp bf16", "llama.cpp q8_0", "vLLM", "vLLM eager", "OpenVINO"], 1.2)],
}
START_BARS_S = {"S": 0.6, "M": 1.0}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One engine with one model. script: its worker. server: it is started as one, else as a library that gives one token."""

    name: str
    python: Path
    script: str
    model: Path
    flags: tuple[str, ...] = ()
    server: bool = False

    @property
    def missing(self) -> Path | None:
        """What it lacks."""
        return next((path for path in (self.python, self.model) if not path.exists()), None)


def peers(folder: Path, name: str, model: Path, *, plain_llama: bool) -> list[Peer]:
    """The engines that `folder` may hold."""
    llama = {"python": folder / "v-llama/bin/python", "script": "worker_llama.py", "flags": ("--plain",) if plain_llama else ()}
    vllm = {"python": folder / "v-vllm/bin/python", "script": "worker_vllm.py", "model": model, "server": True}
    openvino = {"python": folder / "v-ov/bin/python", "script": "worker_openvino.py"}
    return [
        Peer(name="llama.cpp bf16", model=folder / f"gguf/{name}.gguf", **llama),  # type: ignore[arg-type]
        Peer(name="llama.cpp q8_0", model=folder / f"gguf/{name}-q8_0.gguf", **llama),  # type: ignore[arg-type]
        Peer(name="vLLM", **vllm),  # type: ignore[arg-type]
        Peer(name="vLLM eager", flags=("--eager",), **vllm),  # type: ignore[arg-type]
        Peer(name="OpenVINO", model=folder / f"ov/{name}-fp16", **openvino),  # type: ignore[arg-type]
    ]


def tok_s(row: Mapping[str, Any], mode: Mode) -> float:
    """What the mode is about: tokens of the prompt per second in `prefill`, else decoded ones."""
    return mode.prompt_tokens / row["prefill_s"] if mode.name == "prefill" else float(row["decode_tok_s"])


def llmc_tok_s(artifact: Path, modes: Sequence[Mode], threads: int) -> dict[str, list[float]]:
    """Of each mode, by name, measured in one process."""
    found = engine_rows(artifact, modes, threads=threads, warmup=1, repeats=3, seed=0)
    return {mode.name: [tok_s(row, mode) for row in found["modes"][mode.name]] for mode in modes}


def peer_tok_s(peer: Peer, modes: Sequence[Mode], threads: int) -> dict[str, list[float]]:
    """As llmc_tok_s."""
    sizes = {mode.name: str(Size(mode.batch, mode.prompt_tokens, mode.new_tokens)) for mode in modes}
    found = _worker(peer, threads, "--sizes", *sizes.values())["sizes"]
    return {mode.name: [tok_s(row, mode) for row in found[sizes[mode.name]]] for mode in modes}


class PeerFailed(Exception):
    """Another engine's process ended with an error. str() is one line."""


def _worker(peer: Peer, threads: int, *arguments: str) -> dict[str, Any]:
    command = [str(peer.python), f"benchmarks/{peer.script}", str(peer.model), *arguments, *peer.flags, "--threads", str(threads)]
    environ = {"PYTHONPATH": str(harness.ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    try:
        return harness.json_of(command, environ)
    except RuntimeError as error:
        first, *rest = str(error).strip().splitlines()
        raise PeerFailed(f"its process ended with {first.rpartition(' ended with ')[2]} {rest[-1] if rest else ''}".strip()) from error


def measure_peers(
    name: str, model: Path, plain: Path, int8: Path, folder: Path, modes: list[Mode], rounds: int, *, plain_llama: bool
) -> dict[str, Any]:
    """tokens/s, start and memory of each contender, in turns, and the ratios that have a bar.

    Args:
        model: the Hugging Face folder.
        plain, int8: llmc's artifacts of it.
        folder: of the other engines.

    A peer whose process fails at some number of threads is named under "not_measured" with what it said, and has no row there.
    """
    known = peers(folder, name, model, plain_llama=plain_llama)
    here = [peer for peer in known if peer.missing is None]
    result: dict[str, Any] = {
        "llama_cpp_plain_buffers": plain_llama,
        "not_measured": {peer.name: f"there is no {peer.missing}" for peer in known if peer.missing is not None},
    }
    contenders: dict[str, Callable[[int], dict[str, list[float]]]] = {
        "llmc": partial(llmc_tok_s, plain, modes),
        "llmc int8": partial(llmc_tok_s, int8, modes),
        **{peer.name: partial(peer_tok_s, peer, modes) for peer in here},
    }
    for threads in THREADS:
        rows, failed = turns(contenders, threads, rounds)
        result["not_measured"] |= {f"{who}, threads {threads}": why for who, why in failed.items()}
        for mode in modes:
            seen = {who: values[mode.name] for who, values in rows.items()}
            medians = {who: statistics.median(values) for who, values in seen.items()}
            result[f"{mode.name}, threads {threads}"] = {
                "tok_s": {who: harness.summary(values) for who, values in seen.items()},
                "ratios": ratios(mode.name, medians),
            }
    result["start"] = _starts(name, plain, int8, here, rounds)
    return result


def turns(
    contenders: Mapping[str, Callable[[int], dict[str, list[float]]]], threads: int, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """What each measured of each mode, over `rounds` rounds in which each has its turn, and why those that failed have none."""
    rows: dict[str, dict[str, list[float]]] = {who: {} for who in contenders}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for who, run in contenders.items():
            if who in failed:
                continue
            try:
                measured = run(threads)
            except PeerFailed as error:
                failed[who] = str(error)
                del rows[who]
                continue
            for mode, values in measured.items():
                rows[who].setdefault(mode, []).extend(values)
    return rows, failed


def ratios(mode: str, medians: Mapping[str, float]) -> list[dict[str, Any]]:
    """Ours over the best of theirs, wherever one of them was measured."""
    found = []
    for ours, theirs, bar in BARS[mode]:
        measured = {who: medians[who] for who in theirs if who in medians}
        if measured:
            best = max(measured, key=lambda who: measured[who])
            found.append({"ours": ours, "theirs": best, "ratio": medians[ours] / measured[best], "bar": bar})
    return found


def _starts(name: str, plain: Path, int8: Path, here: list[Peer], rounds: int) -> dict[str, Any]:
    """Seconds from the spawn to the first token, and PSS then, page cache warm, at two threads. llmc and vLLM are servers, the others
    libraries in a Python process, which have less to do."""
    for path in (plain, int8, *(peer.model for peer in here if peer.model.is_dir())):
        harness.warm(path)
    seen: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for contender, artifact in (("llmc", plain), ("llmc int8", int8)):
            start = cold_start(artifact, threads=2)
            seen.setdefault(contender, []).append((start.seconds, start.pss_bytes / 1e6))
        for peer in here:
            seen.setdefault(peer.name, []).append(_server_start(peer) if peer.server else _library_start(peer))
    table = {
        who: {"seconds": harness.summary([s for s, _ in values]), "pss_mb": harness.summary([pss for _, pss in values])}
        for who, values in seen.items()
    }
    return {"contenders": table, "bar_s": START_BARS_S[name], "libraries": [peer.name for peer in here if not peer.server]}


def _library_start(peer: Peer) -> tuple[float, float]:
    started = time.time()
    answer = _worker(peer, 2, "--startup")
    return answer["first_token_at"] - started, answer["pss_bytes"] / 1e6


def _server_start(peer: Peer) -> tuple[float, float]:
    """Of vLLM's server, the only one among them."""
    with tempfile.TemporaryDirectory() as folder:
        return vllm_start(peer.python, peer.model, Path(folder) / "log", 2, eager="--eager" in peer.flags)


def vllm_start(python: Path | str, model: Path, log: Path, threads: int, *, eager: bool) -> tuple[float, float]:
    """Seconds from the spawn of vLLM's server to its first token, and the megabytes (PSS) of all its processes then."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1", "--port", "{port}"]
    options = ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "8", *(["--enforce-eager"] if eager else [])]
    environ = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with harness.server([*command, *options], log, environ) as running:
        body = {"model": str(model), "prompt": [5, 6, 7, 8, 9, 10, 11, 12, 13], "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        seconds = harness.first_token_seconds(running, body)
        return seconds, harness.pss_bytes(running.process.pid) / 1e6


def lines(name: str, result: Mapping[str, Any]) -> list[str]:
    """For the table: one line per ratio, per start, and per engine that is not there."""
    made = []
    for what, row in result.items():
        if isinstance(row, dict) and "ratios" in row:
            made += [f"{name:<6}{what:<24}{r['ours']} / {r['theirs']}: {r['ratio']:.2f} (bar {r['bar']})" for r in row["ratios"]]
    for who, row in result["start"]["contenders"].items():
        library = ", no server" if who in result["start"]["libraries"] else ""
        made.append(f"{name:<6}{'start':<24}{who}{library}: {row['seconds']['median']:.2f} s, {row['pss_mb']['median']:.0f} MB")
    return made + [f"{name:<6}{'not measured':<24}{who}: {why}" for who, why in result["not_measured"].items()]
