"""`--calibration`: integers that are fitted to a text instead of rounded to nearest, by auto-round (extra `calibrate`).

    ModelSource -> (job.json -> calibrate_worker.py -> a quantised checkpoint in a temporary folder) -> ModelSource

What comes back is read as any quantised checkpoint is, and its integers are kept as they are; the output projection and embeddings, which
auto-round leaves alone, are rounded to nearest in 8 bits as without calibration. Methods: awq (Lin et al. 2023, scales of inputs moved into
the norms before them) and signround (Cheng et al. 2023, rounding and scales found by signed gradient descent, block by block).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc.compiler.calibration_data import LIBRARY, fitting_sequences, fitting_text, installed_version
from llmc.compiler.model import ModelSource, read_json, read_model
from llmc.compiler.pipeline import group_of
from llmc.compiler.stages import StageLog
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError, InternalError, UnsupportedModel

_EXPERTS = ("num_experts", "num_local_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """source: the model with fitted integers. text: "built-in", or the file's sha256. tokens: what they were fitted to."""

    source: ModelSource
    version: str
    text: str
    tokens: int


def fitted(
    config: CompileConfig, source: ModelSource, encode: Callable[[str], list[int]] | None, max_model_len: int, scratch: Path, log: StageLog
) -> Calibrated | None:
    """`calibrate` as a stage of a compile; None where integers are rounded to nearest, or there are none."""
    if config.calibration == "rtn":
        return None
    with log.stage("calibrate") as note:
        group = group_of("int4", config.quantization_group_size)
        found = calibrate(config, source, group, encode, max_model_len, scratch)
        note.detail = f"{config.calibration} by {LIBRARY} {found.version} on {found.tokens} tokens"
    return found


def calibrate(
    config: CompileConfig, source: ModelSource, group: int, encode: Callable[[str], list[int]] | None, max_model_len: int, scratch: Path
) -> Calibrated:
    """Fit the integers of `source`; `config.calibration` says how.

    Args:
        group: inputs that share a scale.
        encode: text to token ids; None without a tokenizer.
        max_model_len: no sequence is longer.
        scratch: where the quantised checkpoint goes, a quarter of the model's size.

    Raises:
        ConfigError: the library is not installed, the text cannot be read or is too short.
        UnsupportedModel: a model whose matrices the calibration does not reach.
        InternalError: auto-round failed.
    """
    installed = installed_version()
    _check_model(config, source)
    text, name = fitting_text(config.calibration_data)
    tokenizer = (config.tokenizer or config.model) / "tokenizer.json"
    if encode is None or not tokenizer.is_file():
        raise ConfigError(
            f"--calibration {config.calibration} fits weights to a text, and {source.name} has no tokenizer.json; give --tokenizer DIR"
        )
    sequences = fitting_sequences([i for i in encode(text) if i < source.vocab_size], max_model_len, config.calibration_data)
    folder = scratch / "calibrated"
    folder.mkdir()
    _run(
        folder,
        {
            "model": str(source.path.resolve()),
            "tokenizer": str(tokenizer.resolve()),
            "dtype": source.dtype,
            "method": config.calibration,
            "group": group,
            "seed": config.seed,
            "threads": config.jobs,
            "sequences": sequences,
        },
    )
    raw = read_json(source.path / "config.json") | {"quantization_config": _layout(group)}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    fitted = read_model(folder, dtype=source.dtype)
    return Calibrated(
        source=replace(source, path=folder, tensors=fitted.tensors, stored=fitted.stored),
        version=installed,
        text=name,
        tokens=sum(map(len, sequences)),
    )


def _check_model(config: CompileConfig, source: ModelSource) -> None:
    named = f"--calibration {config.calibration}"
    if source.stored is not None:
        raise ConfigError(f"{named}: {source.name} is quantised already, by {source.stored.method}; leave --quantization and this flag out")
    if source.model_type == "gpt2":
        raise UnsupportedModel(f"{named}: gpt2 holds its matrices transposed, which calibration is not built for; leave the flag out")
    if any(getattr(source.config.get_text_config(), key, None) for key in _EXPERTS):
        raise UnsupportedModel(
            f"{named}: {source.model_type} has experts, whose weights llmc does not quantise on any target; leave the flag out"
        )


def _run(folder: Path, job: dict[str, Any]) -> None:
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "llmc.compiler.calibrate_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1] if done.stdout.strip() else ""
    answer: dict[str, Any] = json.loads(last) if done.returncode in (0, 1) and last.startswith("{") else {}
    if done.returncode != 0 or not answer.get("matrices"):
        reason = answer.get("error") or (f"it ended with status {done.returncode}" if done.returncode else "it fitted no matrix")
        raise InternalError(f"{LIBRARY} failed on this model: {' '.join(reason.split())[:500]}; compile without --calibration")


def _layout(group: int) -> dict[str, Any]:
    """`quantization_config` of what the worker writes."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
