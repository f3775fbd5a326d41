"""From schedules to a plan: who runs, with which arguments, over which bytes, in which order.

    [Stamp, ...] -> PlannedProgram

Launches of Inductor's kernels are taken as they stand. A call of an op of ours is replaced by the launches of its GPU implementation,
which is run here on fake tensors and hands them over one by one (`kernels/launch.py`).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from llmc.artifacts.plan import (
    PLAN_FORMAT,
    Launch,
    Parameter,
    Plan,
    PlanImage,
    PlanKernel,
    PlanOutput,
    Pointer,
    Scalar,
    Span,
)
from llmc.artifacts.plan_check import check_plan
from llmc.artifacts.plan_hazards import hazard_edges
from llmc.compiler.cuda.cross import DEVICE, cross_cuda
from llmc.compiler.cuda.memory import Layout, MemoryTable, Place, lay_out
from llmc.compiler.cuda.own_kernels import KernelCache, KernelSource
from llmc.compiler.cuda.schedule import CompiledKernel, Schedule, is_view
from llmc.errors import InternalError
from llmc.kernels.cuda_targets import CudaTarget

_SCALARS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
_SCALARS |= {"fp32": "<f", "fp64": "<d"}
_NULL = Scalar(data="00" * 8)
_CACHES = ("k_cache_", "v_cache_")


@dataclass(frozen=True, kw_only=True)
class PlannedProgram:
    """A plan, its images by SHA-256, and one source per kernel of the plan."""

    plan: Plan
    images: Mapping[str, bytes]
    sources: Sequence[KernelSource]


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A launch before memory has addresses."""

    kernel: int
    grid: tuple[int, int, int]
    arguments: list[Place | Scalar]
    reads: list[Place]
    writes: list[Place]


@dataclass
class _Builder:
    target: CudaTarget
    own: KernelCache
    weights: dict[str, Tensor] = field(default_factory=dict)
    memory: MemoryTable = field(default_factory=MemoryTable)
    images: dict[str, bytes] = field(default_factory=dict)
    kernels: dict[Any, int] = field(default_factory=dict)
    records: list[PlanKernel] = field(default_factory=list)
    sources: list[KernelSource] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)

    def kernel(self, key: Any, compiled: CompiledKernel, aligned: Mapping[int, int], source: KernelSource) -> int:
        """The index of a kernel, added if it is new. `aligned`: parameter number -> bytes its pointer is known to be a multiple of."""
        if key not in self.kernels:
            sha256 = hashlib.sha256(compiled.image).hexdigest()
            self.images[sha256] = compiled.image
            parameters = [
                Parameter(offset=offset, size=size, align_bytes=aligned.get(number, 1))
                for number, (offset, size) in enumerate(compiled.kernel.parameters)
            ]
            self.kernels[key] = len(self.records)
            self.sources.append(source)
            self.records.append(
                PlanKernel(
                    image=list(self.images).index(sha256),
                    entry=compiled.entry,
                    num_warps=compiled.num_warps,
                    shared_bytes=compiled.shared_bytes,
                    cluster=compiled.num_ctas,
                    parameters=parameters,
                )
            )
        return self.kernels[key]

    def weight(self, name: str, held: Tensor) -> Tensor:
        """The tensor of the manifest of this name, as a value; `held`: its fake value."""
        if name not in self.weights:
            self.weights[name] = _like(held)
            self.memory.add(self.weights[name], name, "weight")
        return self.weights[name]

    def launch(
        self,
        kernel: int,
        grid: Sequence[Any],
        arguments: Mapping[str, Any],
        types: Mapping[str, str],
        read: Set[str],
        written: Set[str],
        scratch_bytes: int = 0,
    ) -> None:
        """Append a launch; `arguments` holds a fake tensor per pointer and a number per scalar, in the order of `types`.

        A pointer that is neither read nor written stands for a missing argument; it counts as read where nothing else names its memory.
        `scratch_bytes` a program are taken from the arena for as long as the launch runs.
        """
        places: list[Place | Scalar] = []
        reads, writes, idle = [], [], []
        for name, kind in types.items():
            if not kind.startswith("*"):
                places.append(scalar(kind, arguments[name]))
                continue
            place = self.memory.place(arguments[name])
            self.memory.use(place, len(self.steps))
            places.append(place)
            if name in read:
                reads.append(place)
            if name in written:
                writes.append(place)
            if name not in read and name not in written:
                idle.append(place)
        reads += [place for place in idle if all(place.memory != other.memory for other in (*reads, *writes))]
        missing = len(self.records[kernel].parameters) - len(places)
        if missing not in (0, 2) or (scratch_bytes and not missing):  # Triton appends two pointers to scratch memory, the second unused
            raise InternalError(f"kernel {self.records[kernel].entry} has {missing} parameters more than arguments; please report this")
        x, y, z = (int(size) for size in (*grid, 1, 1)[:3])
        if scratch_bytes:
            scratch = self.memory.place(torch.empty(x * y * z * scratch_bytes, dtype=torch.uint8, device=DEVICE))
            self.memory.use(scratch, len(self.steps))
            places.append(scratch)
            writes.append(scratch)
            missing -= 1
        places += [_NULL] * missing
        self.steps.append(_Step(kernel=kernel, grid=(x, y, z), arguments=places, reads=reads, writes=writes))


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """One use of a schedule in a plan.

    inputs, outputs: keys of the values it takes and gives, in the schedule's order. constants: the schedule's names -> the plan's.
    """

    schedule: Schedule
    inputs: Sequence[Hashable]
    outputs: Sequence[Hashable]
    constants: Mapping[str, str]


def stamp_plan(stamps: Sequence[Stamp], inputs: Mapping[str, Tensor], outputs: Mapping[str, Hashable], sizes: Mapping[str, int],
               own: KernelCache, *, decode: bool) -> PlannedProgram:  # fmt: skip
    """Put schedules one after another into one plan, and check it as a reader will.

    Args:
        stamps: in an order that is right.
        inputs: fake value of each graph input by its name, which is also its key in `Stamp.inputs`.
        outputs: name of each result -> its key.
        sizes: value of each symbolic dimension; recorded.
        own: kernels of ours compiled so far; new ones are added.
        decode: every sequence of a step has at most one token, so prefill kernels are left out.

    Raises:
        UnsupportedModel: no GPU implementation takes a call's arguments.
        InternalError, ArtifactError: a launch touches what it must not.
    """
    builder = _Builder(target=own.target, own=own)
    with cross_cuda(own.target), FakeTensorMode(), torch.no_grad():
        values: dict[Hashable, Tensor] = {name: _input(builder, name, value) for name, value in inputs.items()}
        for stamp in stamps:
            results = _stamp(builder, stamp, [values[key] for key in stamp.inputs], decode)
            values.update(zip(stamp.outputs, results, strict=True))
        plan = _plan(builder, {name: values[key] for name, key in outputs.items()}, sizes)
    program = PlannedProgram(plan=plan, images=builder.images, sources=builder.sources)
    check_plan(plan, program.images, "the plan just made")
    return program


def _stamp(builder: _Builder, stamp: Stamp, inputs: Sequence[Tensor], decode: bool) -> list[Tensor]:
    """Append a schedule's launches."""
    values: dict[Node, Any] = {}
    given = iter(inputs)
    for node in stamp.schedule.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
            if _layout(values[node]) != _layout(node.meta["val"]):
                raise InternalError(f"{node.name} is {_layout(values[node])}, compiled for {_layout(node.meta['val'])}; please report this")
        elif node.op == "get_attr":
            if node.users:
                values[node] = builder.weight(stamp.constants[str(node.target)], node.meta["val"])
        elif node.op == "output":
            made = node.args[0]
            return [values[n] for n in (made if isinstance(made, list | tuple) else [made])]
        elif "tuner" in node.meta:
            _inductor_launch(builder, node, values, stamp.schedule.kernel_of(node))
        elif node.target is torch.empty_strided:
            shape, stride = node.args
            values[node] = torch.empty_strided(shape, stride, dtype=node.kwargs["dtype"], device=DEVICE)
        elif is_view(node):
            values[node] = node.target(*map_arg(node.args, values.__getitem__), **node.kwargs)
        else:
            values[node] = _own_op(builder, node, values, decode)
    raise InternalError("a schedule without an end; please report this")


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, list(value.shape), list(value.stride())


def _like(fake: Tensor) -> Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=DEVICE)


def _input(builder: _Builder, name: str, held: Tensor) -> Tensor:
    value = _like(held)
    cache = name.replace(".", "_").startswith(_CACHES)
    builder.memory.add(value, name, "cache" if cache else "input", open_size=cache)
    return value


# --- Inductor's kernels -------------------------------------------------------------------------------------------------------


def _inductor_launch(builder: _Builder, node: Node, values: Mapping[Node, Tensor], compiled: CompiledKernel) -> None:
    tuner = node.meta["tuner"]
    meta = tuner.compile_results[0].compile_meta
    types = {name: kind for name, kind in meta["signature"].items() if kind != "constexpr"}
    call: Mapping[str, Any] = node.kwargs
    given = call["kwargs"]
    arguments = {name: values[given[name]] if kind.startswith("*") else given[name] for name, kind in types.items()}
    read, written = _inductor_accesses(compiled.entry, types, compiled.source)
    for name in types:
        if types[name].startswith("*") and builder.memory.pieces[builder.memory.place(arguments[name]).memory].kind == "cache":
            raise InternalError(f"kernel {compiled.entry} touches a KV cache outside attention; please report this model")
    positions = {index: number for number, (index, _) in enumerate((i, n) for i, n in enumerate(meta["signature"]) if n in types)}
    known = {positions[i]: attrs[0][1] for (i,), attrs in meta["configs"][0].items() if i in positions}
    aligned = {number: value for number, value in known.items() if list(types.values())[number].startswith("*")}
    constants = {
        n: meta["constants"].get(n, tuner.compile_results[0].config.kwargs.get(n)) for n, k in meta["signature"].items() if k == "constexpr"
    }
    source = KernelSource(module=None, source=compiled.source, function=tuner.fn.__name__, types=types, constants=constants)
    index = builder.kernel(id(tuner), compiled, aligned, source)
    builder.launch(index, call["grid"][0], arguments, types, read, written)


def _inductor_accesses(entry: str, types: Mapping[str, str], source: str) -> tuple[set[str], set[str]]:
    """Which pointers a kernel of Inductor's reads and writes; its parameter names say so.

    An `in_out_ptr` is memory that changes its owner; often nothing of the old one is read, and the body shows only stores.
    """
    body = source[source.rindex("\ndef ") :].partition(":\n")[2]
    read, written = set(), set()
    for name in (name for name, kind in types.items() if kind.startswith("*")):
        if not name.startswith(("in_ptr", "arg_", "out_ptr", "in_out_ptr")):
            raise InternalError(f"kernel {entry} has a pointer {name}, of which a plan cannot tell what is done to it; please report this")
        uses, stores = len(re.findall(rf"\b{name}\b", body)), len(re.findall(rf"\btl\.store\({name}\b", body))
        if name.startswith(("out_ptr", "in_out_ptr")):
            written.add(name)
        if name.startswith(("in_ptr", "arg_")) or (name.startswith("in_out_ptr") and uses > stores):
            read.add(name)
        if name.startswith("in_ptr") and stores:
            raise InternalError(f"kernel {entry} stores to its input {name}; please report this")
    return read, written


# --- our own kernels ----------------------------------------------------------------------------------------------------------


def _own_op(builder: _Builder, node: Node, values: Mapping[Node, Any], decode: bool) -> Any:
    from llmc.kernels import launch as own
    from llmc.kernels.registry import choose

    op = str(node.target).split(".")[1]
    arguments: Any = map_arg(node.args, values.__getitem__)
    launches: list[own.Launch] = []
    device = own.Device(num_sms=builder.target.num_sms, shared_bytes=builder.target.shared_memory_per_block_bytes)
    extra: dict[str, Any] = {"decode": decode} if op in ("paged_attention", "paged_attend") else {}
    if "decode" in extra:
        q, k_cache = arguments[0], arguments[1 if op == "paged_attend" else 3]
        extra["work"] = builder.own.tuned.work(q.shape[2], q.shape[1] // k_cache.shape[1], q.dtype, k_cache.dtype)
    if op == "plain_linear":
        x, weight = arguments[:2]
        n, k = weight.shape
        extra["tile"] = builder.own.tuned.tile(n, k, weight.dtype, x.numel() // k)
    result = choose(op, *arguments).call(*arguments, launch=launches.append, device=device, **extra)
    for each in launches:
        if not each.empty:
            _own_launch(builder, each)
    return result


def _own_launch(builder: _Builder, launch: Any) -> None:
    kernel = builder.own.kernel(launch)
    index = builder.kernel(id(kernel), kernel.compiled, kernel.aligned, kernel.source)
    builder.launch(
        index, launch.grid, launch.args, kernel.source.types, kernel.read, kernel.written, scratch_bytes=kernel.compiled.scratch_bytes
    )


# --- the plan -----------------------------------------------------------------------------------------------------------------


def scalar(kind: str, value: Any) -> Scalar:
    """A number as a kernel parameter of Triton type `kind`.

    Raises:
        InternalError: a type or a value that no parameter of ours has.
    """
    if kind not in _SCALARS:
        raise InternalError(f"a kernel parameter of type {kind}; please report this")
    try:
        return Scalar(data=struct.pack(_SCALARS[kind], value).hex())
    except struct.error as error:
        raise InternalError(f"{value!r} does not fit a kernel parameter of type {kind} ({error}); please report this") from None


def _plan(builder: _Builder, results: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Plan:
    for result in results.values():
        if not result.is_contiguous():
            raise InternalError(f"a result of shape {list(result.shape)} has strides {list(result.stride())}; please report this")
        builder.memory.use(builder.memory.place(result), len(builder.steps))  # one past the last launch: nobody may take its place
    layout = lay_out(builder.memory)

    def span(place: Place) -> Span:
        base = layout.base[place.memory]
        region = layout.index[place.memory]
        if layout.regions[region].size_bytes is None:
            return Span(region=region, start=0, stop=None)
        return Span(region=region, start=base + place.start, stop=base + place.stop)

    launches = [
        Launch(
            kernel=step.kernel,
            grid=step.grid,
            arguments=[_pointer(a, layout) if isinstance(a, Place) else a for a in step.arguments],
            reads=[span(place) for place in step.reads],
            writes=[span(place) for place in step.writes],
            label=builder.records[step.kernel].entry,
        )
        for step in builder.steps
    ]
    return Plan(
        format=PLAN_FORMAT,
        target=builder.target.architecture,
        sizes=dict(sizes),
        regions=layout.regions,
        images=[PlanImage(sha256=sha256, size_bytes=len(image)) for sha256, image in builder.images.items()],
        kernels=builder.records,
        launches=launches,
        edges=hazard_edges(launches),
        outputs=[
            PlanOutput(
                name=name,
                dtype=str(result.dtype).removeprefix("torch."),  # type: ignore[arg-type]
                shape=list(result.shape),
                region=layout.index[place.memory],
                offset=layout.base[place.memory] + place.start,
            )
            for name, result in results.items()
            for place in [builder.memory.place(result)]
        ],
    )


def _pointer(place: Place, layout: Layout) -> Pointer:
    return Pointer(region=layout.index[place.memory], offset=layout.base[place.memory] + place.start)
