"""Plans that sample, checked against what this runtime writes into them and reads from them (docs/plan_format.md, "Sampling")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import Entry, SamplingRecord
from llmc.artifacts.plan import Plan, PlanOutput
from llmc.artifacts.plan_check import REGION_ALIGNMENT
from llmc.errors import ArtifactError
from llmc.runtime.memory import round_up

GIVEN = ("logits", "next_tokens")  # what the step's own plan left
TOKENS, FED = "tokens", "fed_tokens"
LIKELY = ("logprobs", "ranks", "top_ids", "top_logprobs")
# What a step's rows are filled up with: rows that take the largest logit and change nothing.
_FILLING = {"mask": -1, "touched_ids": -1, "touched_counts": -1}
_RESULT_TYPES = {TOKENS: "int64", FED: "int64", "logprobs": "float32", "ranks": "int64", "top_ids": "int64", "top_logprobs": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """A plan that samples. offsets: of each input in the piece of inputs, `nbytes` long."""

    record: SamplingRecord
    plan: Plan
    offsets: Mapping[str, int]
    nbytes: int
    outputs: Mapping[str, PlanOutput]
    arena_bytes: int
    shapes: Mapping[str, tuple[Any, tuple[int, ...]]]

    def write(self, piece: np.ndarray, inputs: Mapping[str, np.ndarray]) -> None:
        """Lay out the rows of a step in a piece of memory, uint8 [at least nbytes], and fill up the rest."""
        for name, offset in self.offsets.items():
            dtype, shape = self.shapes[name]
            given = inputs[name]
            size = np.dtype(dtype).itemsize * int(np.prod(shape))
            array = piece[offset : offset + size].view(dtype).reshape(shape)
            array[: len(given)] = given
            array[len(given) :] = _FILLING.get(name, 0)
            if name == "penalties":
                array[len(given) :, 0] = 1.0


def make_tail(record: SamplingRecord, plan: Plan, entry: Entry) -> Tail:
    """Hold a plan against its record and the entry's logits.

    Raises:
        ArtifactError: it is made for other sizes, reads something else, or gives something else.
    """
    where, logits = record.path, entry.outputs[0]
    vocab = int(logits.shape[-1])
    if (plan.sizes.get("N"), plan.sizes.get("V")) != (record.num_logits, vocab):
        raise ArtifactError(f"{where}: samples {plan.sizes}, the manifest says {record.num_logits} rows of {vocab}; compile again")
    wanted = _inputs(record, vocab)
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {}
    offsets: dict[str, int] = {}
    total = arena_bytes = 0
    for region in plan.regions:
        if region.kind == "arena":
            arena_bytes = region.size_bytes or 0
            continue
        given = {"logits": nbytes_of(logits.dtype, [record.num_logits, vocab]), "next_tokens": 8 * record.num_logits}
        if region.kind != "input" or (region.name not in wanted and region.name not in given):
            raise ArtifactError(f"{where}: this runtime has no input {region.name[:200]!r}; upgrade llmc or compile again")
        if region.name in given:
            expected = given[region.name]
        else:
            dtype, shape = wanted[region.name]
            expected = np.dtype(dtype).itemsize * int(np.prod(shape))
            shapes[region.name], offsets[region.name] = wanted[region.name], total
            total = round_up(total + expected, REGION_ALIGNMENT)
        if region.size_bytes != expected:
            raise ArtifactError(f"{where}: input {region.name} has {region.size_bytes} bytes, {expected} are expected; compile again")
    outputs = {output.name: output for output in plan.outputs}
    for name, expected_shape in _results(record).items():
        found = outputs.get(name)
        if found is None or (found.dtype, found.shape) != (_RESULT_TYPES[name], expected_shape):
            shown = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise ArtifactError(f"{where}: {name} is {shown}, {_RESULT_TYPES[name]} {expected_shape} is expected; compile again")
    return Tail(record=record, plan=plan, offsets=offsets, nbytes=total, outputs=outputs, arena_bytes=arena_bytes, shapes=shapes)


def tails_of(entry: Entry, plans: Sequence[Plan]) -> dict[tuple[str, int], Tail]:
    """The plans that sample, by kind and rows; a "check" for every number of rows where there are any.

    Raises:
        ArtifactError: one is missing, or does not fit.
    """
    tails: dict[tuple[str, int], Tail] = {}
    for record, plan in zip(entry.sampling, plans, strict=True):
        tails[record.kind, record.num_logits] = make_tail(record, plan, entry)
    if tails:
        for step in entry.plans:
            if ("check", step.num_logits) not in tails:
                raise ArtifactError(f"manifest.json: entry {entry.name} has no plan that checks {step.num_logits} tokens; compile again")
    return tails


def _inputs(record: SamplingRecord, vocab: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """numpy dtype and shape of everything the host writes for a kind."""
    rows, touched = record.num_logits, record.num_touched
    if record.kind == "check":
        return {}
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "inverse_temperature": (np.float32, (rows,)),
        "top_k": (np.int32, (rows,)),
        "top_p": (np.float64, (rows,)),
        "min_p_gap": (np.float64, (rows,)),
        "seeds": (np.int64, (rows,)),
        "draws": (np.int64, (rows,)),
    }
    if record.kind == "full":
        wanted["mask"] = (np.int32, (rows, -(-vocab // 32)))
        wanted["touched_ids"] = (np.int32, (rows, touched))
        wanted["touched_bias"] = (np.float32, (rows, touched))
        wanted["touched_counts"] = (np.float32, (rows, touched))
        wanted["penalties"] = (np.float32, (rows, 3))
    return wanted


def _results(record: SamplingRecord) -> dict[str, list[int]]:
    rows, top = record.num_logits, record.num_top
    found = {TOKENS: [rows], FED: [rows]}
    if record.kind == "full":
        found |= {"logprobs": [rows], "ranks": [rows], "top_ids": [rows, top], "top_logprobs": [rows, top]}
    return found
