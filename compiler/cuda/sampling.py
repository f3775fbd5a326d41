"""Plans that sample: from the logits a step's plan left on the GPU to tokens, of which the host brings back nothing else.

    (logits, numbers of rows)  ->  SamplingPlans

They depend on no model's graph, so that all models of one vocabulary share them in the compile cache. What each kind does and reads is in
docs/plan_format.md, "Sampling".
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from llmc.artifacts.keys import Key, graph_key, source_digest
from llmc.artifacts.manifest import SamplingRecord, TensorSpec
from llmc.artifacts.plan import encode_plan
from llmc.artifacts.store import Store
from llmc.compiler.cuda.cross import DEVICE, cross_cuda
from llmc.compiler.cuda.own_kernels import KernelCache
from llmc.compiler.cuda.planner import PlannedProgram, Stamp, stamp_plan
from llmc.compiler.cuda.report import kernel_table
from llmc.compiler.cuda.schedule import direct_schedule
from llmc.compiler.input_key import package_folder, toolchain
from llmc.errors import ArtifactError, InternalError
from llmc.kernels.cuda_targets import CudaTarget
from llmc.kernels.ops import overload

KINDS = ("check", "draw", "truncate", "full")
NUM_TOUCHED = 1024  # tokens of a row that a bias or penalty may touch
NUM_TOP = 20  # log-probabilities a row, as many as the API gives
MAX_FULL_BYTES = 128 << 20  # of the adjusted logits, fp32; with more rows the host does it
MAX_VOCAB = 1 << 18  # what the kernels take

_FACTS = "sampling.json"
_SOURCES = ("compiler", "kernels", "artifacts")


@dataclass(frozen=True, kw_only=True)
class SamplingPlans:
    """Records with the bytes of their plans, all images by SHA-256, plans and kernels for the report, and a note for people or ""."""

    records: Sequence[SamplingRecord]
    plans: Sequence[bytes]
    images: Mapping[str, bytes]
    facts: Mapping[str, list[Any]]
    note: str


def sampling_plans(rows: Iterable[int], logits: TensorSpec, target: CudaTarget, scratch: Path, *, store: Store | None) -> SamplingPlans:
    """Compile every kind at every number of rows, or find them compiled.

    Args:
        rows: numbers of logits rows of the step's plans.
        logits: the program's output.
        scratch: a folder for what goes into the cache.

    Returns:
        None of any kind for a vocabulary above MAX_VOCAB; "full" only where its fp32 logits take up to MAX_FULL_BYTES.

    Raises:
        InternalError, ArtifactError: see `stamp_plan`.
    """
    vocab, dtype = int(logits.shape[-1]), str(logits.dtype)
    sizes = sorted(set(rows)) if vocab <= MAX_VOCAB else []
    folder, key = scratch / "sampling", _key(sizes, vocab, dtype, target)
    if store is None or not store.fetch(key, folder):
        folder.mkdir()
        _write(folder, compile_sampling(sizes, vocab, dtype, target))
        if store is not None:
            try:
                store.put(key, folder, {"what": "sampling plans", "target": target.name, "sizes": len(sizes)})
            except ArtifactError as error:
                return _read(folder, f"; sampling not kept in the cache: {error}")
    return _read(folder, "")


def compile_sampling(rows: Sequence[int], vocab: int, dtype: str, target: CudaTarget) -> list[tuple[SamplingRecord, PlannedProgram]]:
    """Every kind at every number of rows; records have no path yet."""
    own, made = KernelCache(target), []
    with cross_cuda(target):
        for count in rows:
            for kind in KINDS:
                full = kind == "full"
                if full and 4 * count * vocab > MAX_FULL_BYTES:
                    continue
                record = SamplingRecord(
                    path="",
                    kind=kind,  # type: ignore[arg-type]
                    num_logits=count,
                    num_touched=NUM_TOUCHED if full else 0,
                    num_top=min(NUM_TOP, vocab) if full else 0,
                )
                made.append((record, _plan(record, vocab, getattr(torch, dtype), own)))
    return made


class _Build:
    """A graph of calls over fake tensors, with its inputs by name."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.inputs: dict[str, Tensor] = {}

    def input(self, name: str, *shape: int, dtype: torch.dtype) -> Node:
        value = torch.empty(shape, dtype=dtype, device=DEVICE)
        self.inputs[name] = value
        return self._keep(self.graph.placeholder(name), value)

    def call(self, target: Any, *args: Any) -> Node:
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        return self._keep(self.graph.call_function(target, args), target(*values))

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    @staticmethod
    def _keep(node: Node, value: Any) -> Node:
        node.meta["val"] = value
        return node


def _plan(record: SamplingRecord, vocab: int, dtype: torch.dtype, own: KernelCache) -> PlannedProgram:
    with FakeTensorMode():
        build = _Build()
        results = _results(build, record, vocab, dtype)
        build.graph.output(tuple(results.values()))
        module = GraphModule(torch.nn.Module(), build.graph, class_name="Sampling")
    schedule = direct_schedule(module)
    if schedule is None:
        raise InternalError(f"sampling of kind {record.kind} holds something else than ops of ours; please report this")
    stamp = Stamp(schedule=schedule, inputs=list(build.inputs), outputs=[f"result {name}" for name in results], constants={})
    sizes = {"N": record.num_logits, "V": vocab}
    return stamp_plan([stamp], build.inputs, {name: f"result {name}" for name in results}, sizes, own, decode=True)


def _results(build: _Build, record: SamplingRecord, vocab: int, dtype: torch.dtype) -> dict[str, Node]:
    """The results of a kind by name, with everything that gives them in the graph."""
    rows = record.num_logits
    logits = build.input("logits", rows, vocab, dtype=dtype)
    chosen_from = logits
    if record.kind == "check":
        tokens = build.input("next_tokens", rows, dtype=torch.int64)
    else:
        parameters = [
            build.input("inverse_temperature", rows, dtype=torch.float32),
            build.input("top_k", rows, dtype=torch.int32),
            build.input("top_p", rows, dtype=torch.float64),
            build.input("min_p_gap", rows, dtype=torch.float64),
            build.input("seeds", rows, dtype=torch.int64),
            build.input("draws", rows, dtype=torch.int64),
        ]
        if record.kind == "full":
            chosen_from = build.call(
                overload("adjust_logits"),
                logits,
                build.input("mask", rows, -(-vocab // 32), dtype=torch.int32),
                build.input("touched_ids", rows, record.num_touched, dtype=torch.int32),
                build.input("touched_bias", rows, record.num_touched, dtype=torch.float32),
                build.input("touched_counts", rows, record.num_touched, dtype=torch.float32),
                build.input("penalties", rows, 3, dtype=torch.float32),
            )
        tokens = build.call(overload("sample"), chosen_from, *parameters, record.kind != "draw")
    checked = build.call(overload("checked_tokens"), chosen_from, tokens)
    results = {"tokens": build.item(checked, 0), "fed_tokens": build.item(checked, 1)}
    if record.kind == "full":
        likely = build.call(overload("token_logprobs"), logits, tokens, record.num_top)
        names = ("logprobs", "ranks", "top_ids", "top_logprobs")
        results |= {name: build.item(likely, index) for index, name in enumerate(names)}
    return results


def _write(folder: Path, made: Sequence[tuple[SamplingRecord, PlannedProgram]]) -> None:
    """Plans as <sha256>.json, images as <sha256>.cubin, and the records."""
    records: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    for record, program in made:
        data = encode_plan(program.plan)
        digest = hashlib.sha256(data).hexdigest()
        (folder / f"{digest}.json").write_bytes(data)
        records.append({name: getattr(record, name) for name in ("kind", "num_logits", "num_touched", "num_top")} | {"sha256": digest})
        images.update(program.images)
    for sha256, image in images.items():
        (folder / f"{sha256}.cubin").write_bytes(image)
    named = {f"{record.kind} {record.num_logits}": program for record, program in made}
    report = {
        "plans": [{"size": name, "launches": len(one.plan.launches), "arena_bytes": _arena_bytes(one)} for name, one in named.items()],
        "kernels": kernel_table(named),
    }
    (folder / _FACTS).write_text(json.dumps({"records": records, "images": list(images), "report": report}, sort_keys=True))


def _arena_bytes(made: PlannedProgram) -> int:
    return sum(region.size_bytes or 0 for region in made.plan.regions if region.kind == "arena")


def _read(folder: Path, note: str) -> SamplingPlans:
    facts = json.loads((folder / _FACTS).read_bytes())
    records, plans = [], []
    for found in facts["records"]:
        digest = found.pop("sha256")
        records.append(SamplingRecord(path=f"plans/{digest}.json", **found))
        plans.append((folder / f"{digest}.json").read_bytes())
    images = {sha256: (folder / f"{sha256}.cubin").read_bytes() for sha256 in facts["images"]}
    return SamplingPlans(records=records, plans=plans, images=images, facts=facts["report"], note=note)


def _key(sizes: Sequence[int], vocab: int, dtype: str, target: CudaTarget) -> Key:
    return graph_key(
        {
            "what": "sampling",
            "sizes": json.dumps(list(sizes)),
            "vocabulary": f"{vocab} {dtype}",
            "limits": f"{NUM_TOUCHED} {NUM_TOP} {MAX_FULL_BYTES}",
            "target": json.dumps(asdict(target), sort_keys=True),
            "llmc sources": source_digest({room: package_folder(room) for room in _SOURCES}),
            **{f"version/{name}": version for name, version in toolchain(target).items() if name in ("torch", "triton")},
        }
    )
