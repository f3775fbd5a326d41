"""Compiling the variants of a model that a benchmark compares, and the parts every comparison measures."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.artifacts.manifest import Limits, Manifest
from llmc.artifacts.verify import open_artifact
from llmc.bench.openai_client import first_token_seconds
from llmc.bench.processes import llmc_command, pss_bytes, serve_command, server, warm, worker
from llmc.bench.workload import Mode
from llmc.errors import ConfigError, InternalError

Say = Callable[[str], None]
STARTUP_PROMPT = (3, 2, 1, 3, 1, 2, 3, 3, 1)  # ids that every vocabulary has


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compile a model. `options`: what is added to `llmc compile MODEL`."""

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A variant as an artifact."""

    name: str
    artifact: Path
    manifest: Manifest
    compile_s: float  # the whole command, nothing taken from the compile cache
    size_bytes: int
    code_bytes: int


def refuse_unknown(setting: str, values: Iterable[object]) -> None:
    """Judge values of a compile setting before the first of them is compiled.

    Raises:
        ConfigError: `llmc compile` would refuse one.
    """
    from llmc.config.settings import BY_NAME

    for value in values:
        try:
            BY_NAME[setting].parse(str(value))
        except ConfigError as error:
            raise ConfigError(f"{BY_NAME[setting].flag}: {error}") from None


def refuse_longer(mode: Mode, limits: Limits) -> None:
    """Raises ConfigError if sequences of the mode do not fit into an artifact."""
    if mode.prompt_tokens + mode.new_tokens > limits.max_model_len:
        raise ConfigError(
            f"{mode.prompt_tokens} prompt and {mode.new_tokens} new tokens are above the artifact's {limits.max_model_len}; ask for less"
        )


def refuse_other_model(model: Path, manifest: Manifest) -> None:
    """A baseline runs the model that the artifact was compiled from, as far as its config.json tells.

    Raises:
        ConfigError: no model folder, or that of another model.
    """
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise ConfigError(f"--model {model}: its config.json cannot be read ({reason}); name the folder that was compiled") from None
    facts = manifest.model
    expected = {"architectures": [facts.architecture], "num_hidden_layers": facts.num_layers, "hidden_size": facts.hidden_size}
    for name, value in {**expected, "vocab_size": facts.vocab_size}.items():
        if isinstance(config, dict) and config.get(name, value) != value:
            raise ConfigError(
                f"--model {model}: {name} is {config[name]} there and {value} in the artifact; name the folder that was compiled"
            )


def compile_variant(model: Path, variant: Variant, out: Path) -> Compiled:
    """`llmc compile` in a process of its own, without the compile cache.

    Raises:
        ConfigError: the compile refused (its message).
    """
    command = llmc_command("compile", str(model), "-o", str(out), "--force", "--no-cache", *variant.options)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise ConfigError(f"{variant.name} does not compile: {lines[-1].removeprefix('llmc: ') if lines else done.returncode}")
    return opened(variant.name, out, compile_s=seconds)


def opened(name: str, artifact: Path, *, compile_s: float = 0.0) -> Compiled:
    """An artifact that is there."""
    with open_artifact(artifact, check_machine=False) as found:
        manifest = found.manifest
    sizes = {record.path: record.size_bytes for record in manifest.files}
    warm(artifact)
    return Compiled(
        name=name,
        artifact=artifact,
        manifest=manifest,
        compile_s=compile_s,
        size_bytes=sum(sizes.values()),
        code_bytes=sum(size for path, size in sizes.items() if path.startswith(("images/", "programs/"))),
    )


def engine_rows(artifact: Path, modes: Sequence[Mode], *, threads: int, warmup: int, repeats: int, seed: int) -> dict[str, Any]:
    """See engine_worker."""
    request = {"artifact": str(artifact), "modes": [mode.as_json() for mode in modes], "threads": threads}
    return worker("llmc.bench.engine_worker", {**request, "warmup": warmup, "repeats": repeats, "seed": seed}, threads=threads)


def hf_rows(model: Path, dtype: str, modes: Sequence[Mode], *, threads: int, warmup: int, repeats: int, seed: int) -> dict[str, Any]:
    """See hf_worker."""
    request = {"model": str(model), "dtype": dtype, "modes": [mode.as_json() for mode in modes], "threads": threads}
    return worker("llmc.bench.hf_worker", {**request, "warmup": warmup, "repeats": repeats, "seed": seed}, threads=threads)


def hf_cold_start(model: Path, dtype: str, *, threads: int) -> tuple[float, int]:
    """Seconds from the spawn of a Python process to transformers' first token, no server, and its PSS in bytes."""
    started = time.time()
    request = {"model": str(model), "dtype": dtype, "threads": threads, "startup": True}
    answer = worker("llmc.bench.hf_worker", request, threads=threads)
    return answer["first_token_at"] - started, answer["pss_bytes"]


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """seconds: from the spawn of `llmc serve` to the first token over HTTP. stages_ms: where the server says they went."""

    seconds: float
    pss_bytes: int
    stages_ms: dict[str, float]


def cold_start(artifact: Path, *, threads: int, options: Sequence[str] = ()) -> ColdStart:
    """Start `llmc serve`, ask for one token, stop it. The page cache is warm if the files were read before.

    Raises:
        InternalError: the server ended, or gave no token.
    """
    body = {"model": "bench", "prompt": list(STARTUP_PROMPT), "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as folder:
        log = Path(folder) / "log"
        with server([*serve_command(artifact, threads=threads), *options], log) as running:
            seconds = first_token_seconds(running, body)
            used = pss_bytes(running.process.pid)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{") and '"ready"' in line]
    if not lines:
        raise InternalError("the server did not log that it is ready; please report this")
    ready = json.loads(lines[0])
    stages = {key.removesuffix("_ms"): float(value) for key, value in ready.items() if key.endswith("_ms")}
    return ColdStart(seconds=seconds, pss_bytes=used, stages_ms=stages)
