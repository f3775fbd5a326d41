"""What `llmc compile --explain PASS` says: a pass's own docstring, what it promises, and where it runs."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, fields
from typing import Any

import torch

from llmc.compiler.pass_choice import REQUIRED
from llmc.compiler.pipeline import KINDS, LEVELS, QUANTIZATIONS, STORED, pipeline, size_pipeline
from llmc.errors import ConfigError
from llmc.passes.add_lora import AddLora, LoraLayout
from llmc.passes.base import Numerics, Pass
from llmc.passes.shard_tensor_parallel import ShardTensorParallel


@dataclass(frozen=True, kw_only=True)
class Explained:
    """A pass in words.

    what: the first line of its docstring. parts: label ("Before", "Applies", "Why", ...) -> text.
    runs: kind of target -> the levels, or what else of a compile, that run it. settings: field -> value in the pipeline.
    optional: --passes may leave it out.
    """

    name: str
    what: str
    parts: dict[str, str]
    numerics: str
    runs: dict[str, list[str]]
    settings: dict[str, Any]
    optional: bool


def all_passes() -> dict[str, Pass]:
    """Every pass of every target by name, those of the CPU first, those of the levels before what else may run."""
    found: dict[str, Pass] = {}
    for kind in KINDS:
        for level in reversed(LEVELS):
            for applied in pipeline(level, kind=kind):
                found.setdefault(applied.name, applied)
        for applied, _ in _others(kind):
            found.setdefault(applied.name, applied)
    return found


def _others(kind: str) -> list[tuple[Pass, str]]:
    """Passes that no level runs by itself, each with what makes it run."""
    quantizing = [(pipeline(LEVELS[-1], scheme, kind=kind)[-1], f"--quantization {scheme}") for scheme in QUANTIZATIONS[kind]]
    stored = (pipeline(LEVELS[-1], STORED, kind=kind)[-1], f"{'' if kind == 'cpu' else 'fp8 '}checkpoints that are quantised already")
    if kind == "cuda":
        return [*quantizing, stored, *((applied, "every level, for each size of a step") for applied in size_pipeline())]
    lora = AddLora(LoraLayout(rank=1, modules=(), slot_elements=0), 1, torch.float32)
    return [*quantizing, stored, (ShardTensorParallel(), "--tensor-parallel-size"), (lora, "--enable-lora")]


def explain(name: str) -> Explained:
    """Explain a pass.

    Raises:
        ConfigError: no pass of that name.
    """
    known = all_passes()
    if name not in known:
        raise ConfigError(f"--explain: no pass {name!r}; there are {', '.join(known)}")
    applied = known[name]
    what, parts = _docstring(applied)
    runs = {kind: [f"-O{level}" for level in LEVELS if any(p.name == name for p in pipeline(level, kind=kind))] for kind in KINDS}
    for kind in KINDS:
        runs[kind] += [why for other, why in _others(kind) if other.name == name]
    return Explained(
        name=name,
        what=what,
        parts=parts,
        numerics=_numerics(applied),
        runs={kind: levels for kind, levels in runs.items() if levels},
        settings={f.name: getattr(applied, f.name) for f in fields(applied)} if name in _of_levels() else {},
        optional=name in _of_levels() and name not in REQUIRED,
    )


def _of_levels() -> set[str]:
    return {applied.name for kind in KINDS for applied in pipeline(LEVELS[-1], kind=kind)}


def _docstring(applied: Pass) -> tuple[str, dict[str, str]]:
    """The first line, and the labelled lines after it with their continuations."""
    text = inspect.getdoc(sys.modules[type(applied).__module__]) or ""
    first, _, rest = text.partition("\n")
    parts: dict[str, str] = {}
    label = ""
    for line in rest.splitlines():
        head, colon, tail = line.partition(":")
        if colon and head.isalpha() and head[0].isupper() and not line.startswith(" "):
            label = head
            parts[label] = tail.strip()
        elif line.strip() and label and line.startswith(" "):
            parts[label] += " " + line.strip()
    return first, parts


def _numerics(applied: Pass) -> str:
    if applied.numerics is Numerics.EXACT:
        return "exact: the same bits"
    bounds = ", ".join(f"{str(dtype).removeprefix('torch.')} {t.rtol:g} relative or {t.atol:g}" for dtype, t in applied.tolerance.items())
    return f"close: within {bounds}"
