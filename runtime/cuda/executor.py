"""Runs plans: one pinned piece of inputs, one copy, one graph launch, one copy back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import Entry, PlanRecord
from llmc.artifacts.plan import Plan, PlanOutput
from llmc.artifacts.plan_check import REGION_ALIGNMENT
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.cuda.device import Device
from llmc.runtime.cuda.graph import build_graph
from llmc.runtime.cuda.modules import Modules
from llmc.runtime.cuda.staging import InputLayout, StagedInputs, fixed_shape
from llmc.runtime.cuda.weights import DeviceTensor
from llmc.runtime.executors.kv_cache import cache_input
from llmc.runtime.executors.logits import LogitsBuffer
from llmc.runtime.memory import round_up
from llmc.runtime.step import DeviceBatch

LOGITS, TOKENS = "logits", "next_tokens"


@dataclass(slots=True)
class _Program:
    """A plan ready to run, once it has a graph."""

    record: PlanRecord
    plan: Plan
    layout: InputLayout
    inputs: StagedInputs
    logits: PlanOutput
    tokens: PlanOutput | None  # the argmax of each row, int64 [N]
    executable: int = 0


class PlanExecutor:
    """An `Executor` over the plans of one entry.

    Every plan uses the same input piece, the same arena and the same pinned buffers, each as large as the largest plan needs.

    Args:
        device: on which everything is; closed with this object.
        entry: of executor "plans".
        plans: the entry's, checked, in its order.
        modules: the kernels of all plans.
        weights: where each tensor lies.

    Raises:
        ArtifactError: a plan and the manifest disagree.
        ConfigError: the GPU's memory does not hold the arena.
    """

    def __init__(
        self, *, device: Device, entry: Entry, plans: Sequence[Plan], modules: Modules, weights: Mapping[str, DeviceTensor]
    ) -> None:
        self._device = device
        self._entry = entry
        self._modules = modules
        self._weights = weights
        self._thread = threading.get_ident()
        self._caches: dict[str, int] = {}
        checked = [(plan, InputLayout(plan, entry.inputs, record.path)) for plan, record in zip(plans, entry.plans, strict=True)]
        results = [_logits(plan, entry, record.path) for plan, record in zip(plans, entry.plans, strict=True)]
        largest = max(layout.nbytes for _, layout in checked)
        self._input_address = device.allocate(largest, what="the inputs of a step")
        self._staging = device.pinned(largest, what="the inputs of a step")
        arenas = [region.size_bytes or 0 for plan in plans for region in plan.regions if region.kind == "arena"]
        self._arena_address = device.allocate(max(arenas, default=0), what="the memory of a step")
        most = max(output.shape[0] for output in results)
        self._result = device.pinned(max(8 * most, *(nbytes_of(out.dtype, out.shape) for out in results)), what="the logits of a step")
        self._picked = device.pinned(4 * most, what="the logits of a step")
        self._wide = LogitsBuffer(entry.outputs[0].dtype)
        self._stream = device.stream()
        self._programs = [
            _Program(record, plan, layout, layout.on(self._staging), output, _tokens(plan, record.path))
            for record, (plan, layout), output in zip(entry.plans, checked, results, strict=True)
        ]
        for program in self._programs:
            self._check_weights(program)

    def available_bytes(self) -> int:
        """GPU memory that nobody has, of which the KV cache may take its part."""
        return self._device.free_bytes()

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate K and V of every layer, zeroed, and build every plan's graph over them.

        Raises:
            ConfigError: the GPU's memory does not hold so many blocks.
        """
        if self._caches:
            raise InternalError("the KV cache was allocated twice; please report this")
        self._device.enter()
        places: dict[str, int] = {}
        total = 0
        for spec in self._entry.inputs:
            if cache_input(spec.name) is not None:
                places[spec.name] = total
                nbytes = nbytes_of(spec.dtype, fixed_shape(spec.shape, {"NB": num_blocks}, f"entry {self._entry.name}: {spec.name}"))
                total = round_up(total + nbytes, REGION_ALIGNMENT)
        base = self._device.allocate(total, what=f"a KV cache of {num_blocks} blocks")
        self._device.zero(base, total, self._stream)
        self._caches = {name: base + place for name, place in places.items()}
        for program in self._programs:
            addresses = self._addresses(program)
            program.executable = build_graph(self._device, program.plan, self._modules, addresses, self._stream)
        self._device.synchronize(self._stream)

    def run(self, batch: DeviceBatch) -> np.ndarray:
        """One step. Returns float32 [N, vocab_size], valid until the next call.

        Raises:
            DeviceLost: a kernel failed; this process cannot use the GPU any more.
        """
        self._prepare()
        program = self._choose(batch)
        rows, most = len(batch.logits_indices), program.record.num_logits
        if rows <= most:
            return self._run_rows(program, batch, slice(0, rows))
        # Writing the same K and V again changes nothing, so a step is run as often as its rows ask for
        parts = [self._run_rows(program, batch, slice(first, min(first + most, rows))).copy() for first in range(0, rows, most)]
        return np.concatenate(parts)

    def run_greedy(self, batch: DeviceBatch) -> np.ndarray | None:
        """One step of which only each row's largest logit is wanted: the logits stay on the GPU.

        Returns:
            int64 [N], the lowest id of a row's largest logit, -1 where that is not finite; valid until the next call. A NaN counts as
            minus infinity. None if the plans do not give tokens, or not for so many rows; then nothing has run.

        Raises:
            DeviceLost: a kernel failed; this process cannot use the GPU any more.
        """
        self._prepare()
        program = self._choose(batch)
        rows, spec = len(batch.logits_indices), program.tokens
        if spec is None or rows > program.record.num_logits:
            return None
        self._start(program, batch, slice(0, rows))
        tokens = self._result[: 8 * rows].view(np.int64)
        self._device.copy_out(tokens.ctypes.data, self._arena_address + spec.offset, 8 * rows, self._stream)
        self._device.synchronize(self._stream)
        width = program.logits.shape[1]
        if tokens.min() < 0 or tokens.max() >= width:
            raise InternalError(f"the plan gave token {tokens.min()} or {tokens.max()} of a vocabulary of {width}; please report this")
        return np.where(np.isfinite(self._logits_at(program, tokens)), tokens, -1)

    def _logits_at(self, program: _Program, tokens: np.ndarray) -> np.ndarray:
        """The logit of one token of each row, of the step that ran last."""
        itemsize = NUMPY[program.logits.dtype].itemsize
        start = self._arena_address + program.logits.offset
        picked = self._picked[: itemsize * len(tokens)]
        for row, token in enumerate(tokens.tolist()):
            address = start + itemsize * (row * program.logits.shape[1] + token)
            self._device.copy_out(picked.ctypes.data + itemsize * row, address, itemsize, self._stream)
        self._device.synchronize(self._stream)
        return self._wide.to_float32(picked.view(NUMPY[program.logits.dtype]))

    def close(self) -> None:
        """Free graphs, modules and all memory."""
        for program in self._programs:
            if program.executable:
                self._device.release("cuGraphExecDestroy", program.executable)
        self._programs = []
        self._modules.close()
        self._caches = {}
        self._device.close()

    def _prepare(self) -> None:
        if not self._caches:
            raise InternalError("a step ran before the KV cache was allocated; please report this")
        if threading.get_ident() != self._thread:
            self._device.enter()
            self._thread = threading.get_ident()

    def _start(self, program: _Program, batch: DeviceBatch, rows: slice) -> None:
        """Put a step into the stream."""
        program.inputs.write(batch, rows)
        self._device.copy_in(self._input_address, self._staging.ctypes.data, program.layout.nbytes, self._stream)
        self._device.driver.call("cuGraphLaunch", program.executable, self._stream.handle)

    def _run_rows(self, program: _Program, batch: DeviceBatch, rows: slice) -> np.ndarray:
        """Logits of some of the rows a step asks for."""
        stream, output = self._stream, program.logits
        self._start(program, batch, rows)
        count = rows.stop - rows.start
        shape = [count, *output.shape[1:]]
        nbytes = nbytes_of(output.dtype, shape)
        self._device.copy_out(self._result.ctypes.data, self._arena_address + output.offset, nbytes, stream)
        self._device.synchronize(stream)
        return self._wide.to_float32(self._result[:nbytes].view(NUMPY[output.dtype]).reshape(shape))

    def _choose(self, batch: DeviceBatch) -> _Program:
        """The smallest plan with room for a step, of those with too few rows the one with the most."""
        tokens, sequences, rows = len(batch.input_ids), len(batch.seq_lens), len(batch.logits_indices)
        decode = tokens <= sequences and bool((np.diff(batch.query_start_loc) <= 1).all())
        columns = batch.block_tables.shape[2]
        best: _Program | None = None
        for program in self._programs:
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

    def _addresses(self, program: _Program) -> list[int]:
        """The address of each region of a plan."""
        addresses = []
        for region in program.plan.regions:
            if region.kind == "weight":
                addresses.append(self._weights[self._tensor(region.name)].address)
            elif region.kind == "input":
                addresses.append(self._input_address + program.layout.offsets[region.name])
            elif region.kind == "arena":
                addresses.append(self._arena_address)
            else:
                addresses.append(self._caches[region.name])
        return addresses

    def _tensor(self, region: str) -> str:
        return self._entry.constants.get(region, region)

    def _check_weights(self, program: _Program) -> None:
        where, caches = program.record.path, {spec.name for spec in self._entry.inputs if cache_input(spec.name) is not None}
        for region in program.plan.regions:
            name = region.name[:200]
            if region.kind == "weight":
                found = self._weights.get(self._tensor(region.name))
                if found is None:
                    raise ArtifactError(f"{where}: weight {name!r} is no tensor of the manifest; compile again")
                if found.nbytes != region.size_bytes:
                    raise ArtifactError(f"{where}: weight {name!r} has {region.size_bytes} bytes, its tensor {found.nbytes}; compile again")
            elif region.kind == "cache" and (region.name not in caches or region.size_bytes is not None):
                raise ArtifactError(f"{where}: {name!r} is no KV cache of the manifest's entry, of open size; compile again")


def _logits(plan: Plan, entry: Entry, where: str) -> PlanOutput:
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


def _tokens(plan: Plan, where: str) -> PlanOutput | None:
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
