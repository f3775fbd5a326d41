"""Runs plans: one pinned piece of inputs, one copy, one graph launch, one copy back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.kv_bytes import layer_block_bytes
from llmc.artifacts.manifest import Entry, KVFacts
from llmc.artifacts.plan import Plan, PlanOutput
from llmc.artifacts.plan_check import REGION_ALIGNMENT
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.cuda.device import Device
from llmc.runtime.cuda.graph import build_graph
from llmc.runtime.cuda.modules import Modules
from llmc.runtime.cuda.programs import TOKENS, Program, check_caches, check_weights, choose_program, logits_of, tensor_name, tokens_of
from llmc.runtime.cuda.sampling import FED, GIVEN, LIKELY, Tail, tails_of
from llmc.runtime.cuda.sampling import TOKENS as SAMPLED
from llmc.runtime.cuda.staging import InputLayout
from llmc.runtime.cuda.weights import DeviceTensor
from llmc.runtime.device_sampling import DeviceLimits, Fed, RowSampling, SampledRows
from llmc.runtime.executors.kv_cache import cache_input
from llmc.runtime.executors.logits import Logits, LogitsBuffer
from llmc.runtime.memory import round_up
from llmc.runtime.step import DeviceBatch

_BUILDERS = 4  # threads that build graphs; the driver does most of the work


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that was begun: whose results will be in which buffer, and where its tokens lie for the next step."""

    slot: int
    tail: Tail
    rows: int
    num_top: int  # -1: no log-probabilities
    fed_address: int


class PlanExecutor:
    """An `Executor` over the plans of one entry.

    Every plan uses the same input piece, the same arena and the same pinned buffers, each as large as the largest plan needs.

    Args:
        device: on which everything is; closed with this object.
        entry: of executor "plans". kv: the manifest's, which says how large the caches are.
        plans: the entry's, checked, in its order.
        modules: the kernels of all plans.
        weights: where each tensor lies, or will. loaded: waits until they are there, or raises why they will not be.
        stop_loading: waits for what of it was begun.
        sampling: the entry's plans that sample, checked, in its order.

    Raises:
        ArtifactError: a plan and the manifest disagree.
        ConfigError: the GPU's memory does not hold the arena.
    """

    def __init__(
        self,
        *,
        device: Device,
        entry: Entry,
        kv: KVFacts,
        plans: Sequence[Plan],
        sampling: Sequence[Plan],
        modules: Modules,
        weights: Mapping[str, DeviceTensor],
        loaded: Callable[[], None],
        stop_loading: Callable[[], None],
    ) -> None:
        self._device = device
        self._entry = entry
        self._kv = kv
        self._loaded, self._stop_loading = loaded, stop_loading
        check_caches(entry, kv)
        self._modules = modules
        self._weights = weights
        self._thread = threading.get_ident()
        self._caches: dict[str, int] = {}
        checked = [(plan, InputLayout(plan, entry.inputs, record.path)) for plan, record in zip(plans, entry.plans, strict=True)]
        results = [logits_of(plan, entry, record.path) for plan, record in zip(plans, entry.plans, strict=True)]
        largest = max(layout.nbytes for _, layout in checked)
        self._input_address = device.allocate(largest, what="the inputs of a step")
        # Two of what the host writes and reads: while one step runs, the next is laid out
        self._staging = [device.pinned(largest, what="the inputs of a step") for _ in range(2)]
        arenas = [region.size_bytes or 0 for plan in plans for region in plan.regions if region.kind == "arena"]
        self._arena_address = device.allocate(max(arenas, default=0), what="the memory of a step")
        self._result = device.pinned(max(nbytes_of(out.dtype, out.shape) for out in results), what="the logits of a step")
        self._tails = tails_of(entry, sampling)
        self._make_room_for_sampling()
        self._wide = LogitsBuffer(entry.outputs[0].dtype)
        self._stream = device.stream()
        self._begun: deque[_Begun] = deque()
        self._slot = 0
        self._programs = [
            Program(record, plan, layout, (layout.on(self._staging[0]), layout.on(self._staging[1])), output)
            for record, (plan, layout), output in zip(entry.plans, checked, results, strict=True)
        ]
        for program in self._programs:
            check_weights(program, entry, weights)
            if self._tails and tokens_of(program.plan, program.record.path) is None:
                raise ArtifactError(f"{program.record.path}: has no output {TOKENS}, which plans that sample read; compile again")

    def _make_room_for_sampling(self) -> None:
        tails, vocab = self._tails.values(), int(self._entry.outputs[0].shape[-1])
        full = [tail.record for tail in tails if tail.record.kind == "full"]
        self.sampling_limits = DeviceLimits(
            vocab=vocab,
            num_touched=min((record.num_touched for record in full), default=0),
            num_top=min((record.num_top for record in full), default=0),
        )
        inputs = max((tail.nbytes for tail in tails), default=0)
        results = max((sum(round_up(_nbytes(out), 8) for out in tail.outputs.values()) for tail in tails), default=0)
        device, what = self._device, "what the rows of a step want"
        self._wish_address = device.allocate(inputs, what=what) if inputs else 0
        self._wishes = [device.pinned(inputs, what=what) for _ in range(2)] if inputs else []
        self._sampled = [device.pinned(results, what="the tokens of a step") for _ in range(2)] if results else []
        arena = max((tail.arena_bytes for tail in tails), default=0)
        self._sampling_address = device.allocate(arena, what="the memory of sampling") if arena else 0
        self._events = [device.event() for _ in range(2)] if tails else []

    def available_bytes(self) -> int:
        """GPU memory that nobody has, of which the KV cache may take its part."""
        return self._device.free_bytes()

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate K and V of every layer, zeroed, and build every plan's graph over them while weights are still on their way; then
        wait for these.

        Raises:
            ArtifactError: a weight is damaged.
            ConfigError: the GPU's memory does not hold so many blocks.
        """
        if self._caches:
            raise InternalError("the KV cache was allocated twice; please report this")
        self._device.enter()
        places: dict[str, int] = {}
        total = 0
        for spec in self._entry.inputs:
            cache = cache_input(spec.name)
            if cache is not None:
                places[spec.name] = total
                total = round_up(total + num_blocks * layer_block_bytes(self._kv, cache[1]), REGION_ALIGNMENT)
        base = self._device.allocate(total, what=f"a KV cache of {num_blocks} blocks")
        self._device.zero(base, total, self._stream)
        self._caches = {name: base + place for name, place in places.items()}
        with ThreadPoolExecutor(_BUILDERS, thread_name_prefix="llmc-graphs") as pool:
            for _ in pool.map(self._build, self._programs):
                pass  # reading the results raises what a thread raised
        self._loaded()
        self._device.synchronize(self._stream)

    def _build(self, program: Program) -> None:
        """The graphs of a step of one size: the step itself with the check of its tokens, and each way to sample behind it."""
        self._device.enter()
        parts = [(program.plan, self._addresses(program))]
        for (kind, rows), tail in self._tails.items():
            if rows != program.record.num_logits:
                continue
            addresses = self._sampling_addresses(program, tail)
            if kind == "check":
                parts.append((tail.plan, addresses))
            else:
                program.samples[kind] = build_graph(self._device, [(tail.plan, addresses)], self._modules, self._stream)
        program.executable = build_graph(self._device, parts, self._modules, self._stream)

    def run(self, batch: DeviceBatch) -> Logits:
        """One step. Returns logits [N, vocab_size], valid until the next call.

        Raises:
            DeviceLost: a kernel failed; this process cannot use the GPU any more.
        """
        self._prepare()
        program = choose_program(self._programs, batch)
        rows, most = len(batch.logits_indices), program.record.num_logits
        if rows <= most:
            return Logits(self._run_rows(program, batch, slice(0, rows)), self._wide)
        # Writing the same K and V again changes nothing, so a step is run as often as its rows ask for
        parts = [self._run_rows(program, batch, slice(first, min(first + most, rows))).copy() for first in range(0, rows, most)]
        return Logits(np.concatenate(parts), self._wide)

    def start(self, batch: DeviceBatch, sampling: RowSampling, fed: Sequence[Fed]) -> bool:
        """Begin a step whose tokens are chosen on the GPU. At most two may be begun and not finished.

        Args:
            fed: input tokens that are those of the step begun last, which nobody on the host has seen; the batch holds anything there.

        Returns:
            False, and nothing has begun, if no plan holds such a step.

        Raises:
            DeviceLost: a kernel failed; this process cannot use the GPU any more.
        """
        self._prepare()
        program = choose_program(self._programs, batch)
        rows = len(batch.logits_indices)
        tail = self._tails.get((sampling.kind, program.record.num_logits))
        if tail is None or rows > program.record.num_logits:
            return False
        if len(self._begun) > 1 or (fed and not self._begun):
            raise InternalError(f"a step was begun while {len(self._begun)} are, and takes {len(fed)} runs of tokens; please report this")
        self._slot ^= 1
        slot, stream, device = self._slot, self._stream, self._device
        self._stage(program, batch, slice(0, rows), slot)
        for run in fed:  # before the graph writes over them
            target = self._input_address + program.layout.offsets["input_ids"] + 8 * run.token
            device.copy(target, self._begun[-1].fed_address + 8 * run.row, 8 * run.count, stream)
        device.driver.call("cuGraphLaunch", program.executable, stream.handle)
        if sampling.kind != "check":
            tail.write(self._wishes[slot], sampling.inputs)
            device.copy_in(self._wish_address, self._wishes[slot].ctypes.data, tail.nbytes, stream)
            device.driver.call("cuGraphLaunch", program.samples[sampling.kind], stream.handle)
        asked = [top for top in sampling.num_top if top is not None]
        begun = _Begun(slot, tail, rows, max(asked, default=-1), self._sampling_address + tail.outputs[FED].offset)
        for output, part in self._results(begun):
            device.copy_out(part.ctypes.data, self._sampling_address + output.offset, part.nbytes, stream)
        device.driver.call("cuEventRecord", self._events[slot], stream.handle)
        self._begun.append(begun)
        return True

    def finish(self) -> SampledRows:
        """Wait for the oldest step that was begun. What is returned is valid until the second `start` from now.

        Raises:
            DeviceLost: a kernel failed; this process cannot use the GPU any more.
            InternalError: no step was begun, or a plan gave a token that is none.
        """
        if not self._begun:
            raise InternalError("the tokens of a step were asked for and none was begun; please report this")
        self._prepare()
        begun = self._begun.popleft()
        self._device.driver.call("cuEventSynchronize", self._events[begun.slot])
        tokens, *likely = (part for _, part in self._results(begun))
        vocab = self.sampling_limits.vocab
        if tokens.min() < -1 or tokens.max() >= vocab:
            raise InternalError(f"the plan gave token {tokens.min()} or {tokens.max()} of a vocabulary of {vocab}; please report this")
        return SampledRows(tokens=tokens, likely=(likely[0], likely[1], likely[2], likely[3]) if likely else None)

    def abandon(self) -> None:
        """Wait for all steps that were begun, and drop them."""
        if self._begun:
            self._prepare()
            self._begun.clear()
            self._device.synchronize(self._stream)

    def _results(self, begun: _Begun) -> list[tuple[PlanOutput, np.ndarray]]:
        """What comes back of a step: its rows' tokens, and log-probabilities if somebody wants them."""
        names = (SAMPLED, *(LIKELY if begun.num_top >= 0 else ()))
        parts, at = [], 0
        for name in names:
            output = begun.tail.outputs[name]
            shape = [begun.rows, *output.shape[1:]]
            nbytes = nbytes_of(output.dtype, shape)
            parts.append((output, self._sampled[begun.slot][at : at + nbytes].view(NUMPY[output.dtype]).reshape(shape)))
            at = round_up(at + nbytes, 8)
        return parts

    def close(self) -> None:
        """Free graphs, modules and all memory."""
        self._stop_loading()
        for program in self._programs:
            for executable in (program.executable, *program.samples.values()):
                if executable:
                    self._device.release("cuGraphExecDestroy", executable)
        for event in self._events:
            self._device.release("cuEventDestroy_v2", event)
        self._programs, self._events = [], []
        self._modules.close()
        self._caches = {}
        self._device.close()

    def _prepare(self) -> None:
        if not self._caches:
            raise InternalError("a step ran before the KV cache was allocated; please report this")
        if threading.get_ident() != self._thread:
            self._device.enter()
            self._thread = threading.get_ident()

    def _stage(self, program: Program, batch: DeviceBatch, rows: slice, slot: int) -> None:
        """Lay out a step and put its copy to the GPU into the stream."""
        program.inputs[slot].write(batch, rows)
        self._device.copy_in(self._input_address, self._staging[slot].ctypes.data, program.layout.nbytes, self._stream)

    def _run_rows(self, program: Program, batch: DeviceBatch, rows: slice) -> np.ndarray:
        """Logits of some of the rows a step asks for, valid until the next call."""
        stream, output = self._stream, program.logits
        if self._begun:
            raise InternalError("a step's logits were asked for while another step runs; please report this")
        self._stage(program, batch, rows, 0)
        self._device.driver.call("cuGraphLaunch", program.executable, stream.handle)
        count = rows.stop - rows.start
        shape = [count, *output.shape[1:]]
        nbytes = nbytes_of(output.dtype, shape)
        self._device.copy_out(self._result.ctypes.data, self._arena_address + output.offset, nbytes, stream)
        self._device.synchronize(stream)
        return self._result[:nbytes].view(NUMPY[output.dtype]).reshape(shape)

    def _addresses(self, program: Program) -> list[int]:
        """The address of each region of a plan."""
        addresses = []
        for region in program.plan.regions:
            if region.kind == "weight":
                addresses.append(self._weights[tensor_name(self._entry, region.name)].address)
            elif region.kind == "input":
                addresses.append(self._input_address + program.layout.offsets[region.name])
            elif region.kind == "arena":
                addresses.append(self._arena_address)
            else:
                addresses.append(self._caches[region.name])
        return addresses

    def _sampling_addresses(self, program: Program, tail: Tail) -> list[int]:
        """The address of each region of a plan that samples behind a step of this size."""
        given = {output.name: self._arena_address + output.offset for output in program.plan.outputs}
        addresses = []
        for region in tail.plan.regions:
            if region.kind == "arena":
                addresses.append(self._sampling_address)
            else:
                addresses.append(given[region.name] if region.name in GIVEN else self._wish_address + tail.offsets[region.name])
        return addresses


def _nbytes(output: PlanOutput) -> int:
    return nbytes_of(output.dtype, output.shape)
