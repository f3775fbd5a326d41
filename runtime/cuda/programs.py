"""The plans of an entry: each held against the manifest, and which of them a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.artifacts.kv_bytes import cache_shape
from llmc.artifacts.manifest import Entry, KVFacts, PlanRecord
from llmc.artifacts.plan import Plan, PlanOutput
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.cuda.staging import InputLayout, StagedInputs
from llmc.runtime.cuda.weights import DeviceTensor
from llmc.runtime.executors.kv_cache import cache_input
from llmc.runtime.step import DeviceBatch

LOGITS, TOKENS = "logits", "next_tokens"


@dataclass(slots=True)
class Program:
    """A plan ready to run, once it has a graph."""

    record: PlanRecord
    plan: Plan
    layout: InputLayout
    inputs: tuple[StagedInputs, StagedInputs]  # over each staging buffer
    logits: PlanOutput
    executable: int = 0  # of the plan, and of the "check" of its tokens where there is one
    samples: dict[str, int] = field(default_factory=dict)  # kind of sampling -> its graph


def choose_program(programs: Sequence[Program], batch: DeviceBatch) -> Program:
    """The smallest plan with room for a step, of those with too few rows the one with the most.

    Raises:
        InternalError: there is none, which the scheduler keeps to.
    """
    tokens, sequences, rows = len(batch.input_ids), len(batch.seq_lens), len(batch.logits_indices)
    decode = tokens <= sequences and bool((np.diff(batch.query_start_loc) <= 1).all())
    columns = batch.block_tables.shape[2]
    best: Program | None = None
    for program in programs:
        record = program.record
        fits = record.num_tokens >= tokens and record.num_seqs >= sequences and record.table_blocks >= columns
        if not fits or (record.decode and not decode):
            continue
        if record.num_logits >= rows:
            return program
        if best is None or record.num_logits > best.record.num_logits:
            best = program
    if best is None:
        raise InternalError(
            f"a step of {tokens} tokens in {sequences} sequences of up to {columns} blocks fits no plan of this artifact; "
            "please report this"
        )
    return best


def tensor_name(entry: Entry, region: str) -> str:
    """The manifest's tensor in a region of kind "weight"."""
    return entry.constants.get(region, region)


def check_weights(program: Program, entry: Entry, weights: Mapping[str, DeviceTensor]) -> None:
    """Whether a plan's weights are tensors of the manifest, and its caches the entry's.

    Raises:
        ArtifactError: one is not, or has another size.
    """
    where, caches = program.record.path, {spec.name for spec in entry.inputs if cache_input(spec.name) is not None}
    for region in program.plan.regions:
        name = region.name[:200]
        if region.kind == "weight":
            found = weights.get(tensor_name(entry, region.name))
            if found is None:
                raise ArtifactError(f"{where}: weight {name!r} is no tensor of the manifest; compile again")
            if found.nbytes != region.size_bytes:
                raise ArtifactError(f"{where}: weight {name!r} has {region.size_bytes} bytes, its tensor {found.nbytes}; compile again")
        elif region.kind == "cache" and (region.name not in caches or region.size_bytes is not None):
            raise ArtifactError(f"{where}: {name!r} is no KV cache of the manifest's entry, of open size; compile again")


def logits_of(plan: Plan, entry: Entry, where: str) -> PlanOutput:
    """The plan's logits, as the entry describes them.

    Raises:
        ArtifactError: they are missing or differ.
    """
    if not entry.outputs or entry.outputs[0].name != LOGITS:
        raise ArtifactError(f"entry {entry.name}: its first output is expected to be {LOGITS}; compile again")
    spec = entry.outputs[0]
    wanted = [plan.sizes.get("N", 0), spec.shape[-1]]
    for output in plan.outputs:
        if output.name == LOGITS:
            if output.dtype != spec.dtype or output.shape != wanted:
                raise ArtifactError(
                    f"{where}: logits are {output.dtype} {output.shape}, the manifest says {spec.dtype} {wanted}; compile again"
                )
            return output
    raise ArtifactError(f"{where}: has no output {LOGITS}; compile again")


def tokens_of(plan: Plan, where: str) -> PlanOutput | None:
    """The plan's tokens, if it gives them.

    Raises:
        ArtifactError: they are not int64 [N].
    """
    for output in plan.outputs:
        if output.name == TOKENS:
            if output.dtype != "int64" or output.shape != [plan.sizes.get("N", 0)]:
                raise ArtifactError(f"{where}: {TOKENS} are {output.dtype} {output.shape}, int64 [N] is expected; compile again")
            return output
    return None


def check_caches(entry: Entry, kv: KVFacts) -> None:
    """Whether the entry's caches are those of the manifest's KV facts.

    Raises:
        ArtifactError: one is of another layer, dtype or shape.
    """
    for spec in entry.inputs:
        cache = cache_input(spec.name)
        if cache is None:
            continue
        expected = ["NB", *cache_shape(kv, cache[1], 1)[1:]] if cache[1] < len(kv.head_dim) else None
        if (spec.dtype, spec.shape) != (kv.dtype, expected):
            raise ArtifactError(
                f"manifest.json: entry {entry.name}: {spec.name} is {spec.dtype} {spec.shape}, the KV facts say {kv.dtype} {expected}; "
                "compile again"
            )
