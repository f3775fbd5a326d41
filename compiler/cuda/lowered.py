"""A model's plans and cubins in the compile cache: one graph at the same sizes for the same GPU is compiled once, whatever the weights.

GraphModule, [PlanSize, ...]  ->  LoweredPlans
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from llmc.artifacts.keys import Key, graph_key, source_digest
from llmc.artifacts.manifest import TensorSpec
from llmc.artifacts.plan import encode_plan
from llmc.artifacts.store import Store
from llmc.compiler.cuda.program import CudaProgram, compile_program
from llmc.compiler.cuda.report import kernel_table
from llmc.compiler.cuda.schedule import SPILL_BUDGET_BYTES
from llmc.compiler.cuda.sizes import PlanSize
from llmc.compiler.input_key import package_folder, toolchain
from llmc.compiler.nodes import to_bytes
from llmc.errors import ArtifactError
from llmc.kernels.cuda_targets import CudaTarget
from llmc.passes.weights import WeightTable

_FACTS = "facts.json"
_SOURCES = ("compiler", "kernels", "passes", "artifacts")  # of passes: those that run on fixed sizes


@dataclass(frozen=True, kw_only=True)
class LoweredPlans:
    """What the artifact holds of a program for a GPU.

    plans: the bytes of each plan by its size, in order. images: cubins by SHA-256, in order of first use.
    facts: for the report. detail: one line for people.
    """

    plans: Mapping[PlanSize, bytes]
    images: Mapping[str, bytes]
    facts: Mapping[str, Any]
    detail: str


def lower_plans(
    graph: GraphModule,
    inputs: Sequence[TensorSpec],
    sizes: Sequence[PlanSize],
    weights: WeightTable,
    target: CudaTarget,
    scratch: Path,
    *,
    table_blocks: int,
    store: Store | None,
    progress: Callable[[PlanSize], None] | None = None,
) -> LoweredPlans:
    """Compile a graph at every size, or find it compiled.

    Args:
        graph: as the passes and `program.with_next_tokens` leave it.
        scratch: a folder for what goes into the cache.

    Raises:
        UnsupportedModel, InternalError: see `program.compile_program`.
        ArtifactError: the cache could not be read or written.
    """
    folder = scratch / "lowered"
    key = _key(graph, inputs, sizes, weights, target, table_blocks)
    if store is not None and store.fetch(key, folder):
        return _read(folder, f"{len(sizes)} sizes from the cache, {key.digest[:12]}")
    started = time.perf_counter()
    program = compile_program(graph, inputs, sizes, target, table_blocks=table_blocks, progress=progress)
    seconds = time.perf_counter() - started
    folder.mkdir()
    _write(folder, program)
    detail = (
        f"{len(sizes)} sizes; {program.layers} layers, {program.distinct} distinct, {program.inductor} of them by Inductor; {seconds:.1f} s"
    )
    if store is not None:
        try:
            store.put(key, folder, {"what": "plans", "target": target.name, "sizes": len(sizes)})
        except ArtifactError as error:
            detail += f"; not kept in the cache: {error}"
    return _read(folder, detail)


def _write(folder: Path, program: CudaProgram) -> None:
    """Plans as <number>.json in order, images as <sha256>.cubin, and what else there is to say in facts.json."""
    images: dict[str, bytes] = {}
    for number, made in enumerate(program.plans.values()):
        (folder / f"{number}.json").write_bytes(encode_plan(made.plan))
        images.update(made.images)
    for sha256, image in images.items():
        (folder / f"{sha256}.cubin").write_bytes(image)
    record = {
        "sizes": [asdict(size) for size in program.plans],
        "images": list(images),
        "report": {
            "layers": program.layers,
            "distinct_layers": program.distinct,
            "inductor_layers": program.inductor,
            "tiles": dict(program.tiles),
            "size_passes": dict(program.size_passes),
            "spill_budget_bytes": SPILL_BUDGET_BYTES,
            "plans": [
                {"size": str(size), "launches": len(made.plan.launches), "arena_bytes": _arena_bytes(made)}
                for size, made in program.plans.items()
            ],
            "kernels": kernel_table({str(size): made for size, made in program.plans.items()}),
        },
    }
    (folder / _FACTS).write_text(json.dumps(record, sort_keys=True))


def _arena_bytes(made: Any) -> int:
    return sum(region.size_bytes or 0 for region in made.plan.regions if region.kind == "arena")


def _read(folder: Path, detail: str) -> LoweredPlans:
    record = json.loads((folder / _FACTS).read_bytes())
    return LoweredPlans(
        plans={PlanSize(**size): (folder / f"{number}.json").read_bytes() for number, size in enumerate(record["sizes"])},
        images={sha256: (folder / f"{sha256}.cubin").read_bytes() for sha256 in record["images"]},
        facts=record["report"],
        detail=detail,
    )


def _key(
    graph: GraphModule, inputs: Sequence[TensorSpec], sizes: Sequence[PlanSize], weights: WeightTable, target: CudaTarget, table_blocks: int
) -> Key:
    """Values of constants are not in it: a schedule is made from fake tensors, so that none can end up in code."""
    constants = {name: [str(weights[name].dtype), list(weights[name].shape)] for name in weights}
    described = {spec.name: [spec.dtype, spec.shape] for spec in inputs}
    return graph_key(
        {
            "graph": hashlib.sha256(to_bytes(graph)).hexdigest(),
            "inputs": json.dumps(described),
            "constants": hashlib.sha256(json.dumps(constants, sort_keys=True).encode()).hexdigest(),
            "sizes": json.dumps([[str(size), size.num_seqs, size.num_logits] for size in sizes]),
            "block table": str(table_blocks),
            "target": json.dumps(asdict(target), sort_keys=True),
            "llmc sources": source_digest({room: package_folder(room) for room in _SOURCES}),
            **{f"version/{name}": version for name, version in toolchain(target).items() if name in ("torch", "triton")},
        }
    )
