"""The program of an artifact that TVM compiles: from the graph to an image in the artifact, through the compile cache."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from llmc.artifacts.manifest import Entry
from llmc.artifacts.store import Store
from llmc.artifacts.writer import ArtifactWriter
from llmc.compiler.capture import TracedModel
from llmc.compiler.input_key import BACKENDS, check_backend
from llmc.compiler.lowered_cache import keep, lowering_key
from llmc.compiler.program import Program, built_kernels
from llmc.compiler.stages import StageLog
from llmc.kernels.build import BuiltKernels
from llmc.kernels.isa import TargetSpec
from llmc.passes.weights import WeightTable

_IMAGE, _FACTS = "model.so", "facts.json"


def tvm_program(
    target: TargetSpec,
    traced: TracedModel,
    weights: WeightTable,
    kernels: Future[BuiltKernels],
    writer: ArtifactWriter,
    scratch: Path,
    log: StageLog,
    store: Store | None,
) -> Program:
    """Lower the graph with TVM, or find it lowered, and put its image into the artifact.

    Raises:
        UnsupportedModel, ConfigError, InternalError: see `lower_tvm`.
        ArtifactError: the cache could not be read or written.
    """
    with log.stage("lower") as note:
        path, facts, note.detail = _lowered(target, traced, weights, scratch, store)
    built = built_kernels(kernels, target, log)
    model = writer.add_image(path, "model")
    entry = Entry(
        name="step", executor="tvm", program=model.path, inputs=list(traced.inputs), outputs=list(traced.outputs),
        constants={str(place): name for place, name in enumerate(facts["constants"])},
    )  # fmt: skip
    return Program(entry=entry, images=[writer.add_image(built.kernels_so, "kernels"), model], calls=facts["calls"])


def _lowered(
    target: TargetSpec, traced: TracedModel, weights: WeightTable, scratch: Path, store: Store | None
) -> tuple[Path, dict[str, Any], str]:
    """(image, facts, one line for people)"""
    folder = scratch / "lowered"
    versions = {f"version/{name}": importlib.metadata.version(name) for name in BACKENDS["tvm"]}
    key = lowering_key(traced.graph, weights, target, {"backend": "tvm", **versions})
    if store is not None and store.fetch(key, folder):
        return folder / _IMAGE, json.loads((folder / _FACTS).read_bytes()), f"code from the cache, {key.digest[:12]}"
    from llmc.compiler.tvm.lower import lower_tvm  # seconds of imports

    folder.mkdir()
    lowered = lower_tvm(traced.graph, target, folder / _IMAGE)
    facts = {"constants": list(lowered.constants), "calls": dict(lowered.calls)}
    (folder / _FACTS).write_text(json.dumps(facts, sort_keys=True))
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lowered.seconds.items())
    detail = f"{lowered.num_kernels} functions of TVM's; {times}"
    return folder / _IMAGE, facts, detail + keep(store, key, folder, {"what": "lowered code, TVM", "isa": target.isa})


def check_convertible(graph: GraphModule) -> None:
    """Refuse a graph with an op that has no converter, before anything is computed.

    Raises:
        ConfigError: TVM is not installed.
        UnsupportedModel: names the ops.
    """
    check_backend("tvm")
    hook = sys.excepthook
    from llmc.compiler.tvm.relax_graph import refuse_unknown_ops

    sys.excepthook = hook  # `import tvm` puts one of its own there
    refuse_unknown_ops(graph)
