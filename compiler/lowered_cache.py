"""Lowered code in the compile cache: the same graph for the same target is lowered once, whatever the weights.

The graph key holds the graph, the dtypes and shapes of what it reads, the values of the constants that are known without a
checkpoint (small ones may end up inside the code), the target, the toolchain and llmc's own sources. Weights are not in it: a
second fine-tune of a model finds the code of the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from llmc.artifacts.keys import Key, graph_key, source_digest
from llmc.artifacts.store import Store
from llmc.compiler.input_key import package_folder, toolchain
from llmc.compiler.lower import lower_aoti
from llmc.compiler.nodes import to_bytes
from llmc.compiler.packing import to_numpy
from llmc.errors import ArtifactError
from llmc.kernels.isa import TargetSpec
from llmc.passes.weights import WeightTable

_IMAGE, _FACTS = "model.so", "facts.json"
_SOURCES = ("compiler", "kernels")


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A model image, from the cache or fresh.

    constants: the image's name of each -> name in the weight table. calls: C functions of ops it calls -> number of calls.
    """

    path: Path
    constants: Mapping[str, str]
    calls: Mapping[str, int]
    detail: str  # one line for people


def lower(graph: GraphModule, weights: WeightTable, target: TargetSpec, scratch: Path, *, jobs: int, store: Store | None) -> Lowered:
    """Lower a graph, or find it lowered.

    Args:
        scratch: a folder for the image.

    Raises:
        UnsupportedModel, ConfigError, InternalError: see `lower_aoti`.
        ArtifactError: the cache could not be read or written.
    """
    folder = scratch / "lowered"
    key = lowering_key(graph, weights, target, {})
    if store is not None and store.fetch(key, folder):
        facts = json.loads((folder / _FACTS).read_bytes())
        detail = f"code from the cache, {key.digest[:12]}"
        return Lowered(path=folder / _IMAGE, constants=facts["constants"], calls=facts["calls"], detail=detail)
    folder.mkdir()
    lowered = lower_aoti(graph, target, folder / _IMAGE, jobs=jobs)
    facts = {"constants": dict(lowered.constants), "calls": dict(lowered.calls)}
    (folder / _FACTS).write_text(json.dumps(facts, sort_keys=True))
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lowered.seconds.items())
    detail = f"{lowered.num_kernels} kernels; {times}"
    detail += keep(store, key, folder, {"what": "lowered code", "isa": target.isa, "kernels": lowered.num_kernels})
    return Lowered(path=folder / _IMAGE, constants=facts["constants"], calls=facts["calls"], detail=detail)


def keep(store: Store | None, key: Key, folder: Path, facts: Mapping[str, Any]) -> str:
    """Put lowered code into the cache, if there is one. Returns what to add to the stage's line: why it could not be kept, or nothing."""
    if store is not None:
        try:
            store.put(key, folder, dict(facts))
        except ArtifactError as error:
            return f"; not kept in the cache: {error}"
    return ""


def lowering_key(graph: GraphModule, weights: WeightTable, target: TargetSpec, more: Mapping[str, str]) -> Key:
    """The graph key. `more`: what else decides the code, such as another compiler's version."""
    constants = {name: [str(weights[name].dtype), list(weights[name].shape)] for name in weights}
    values = {name: hashlib.sha256(to_numpy(value).tobytes()).hexdigest() for name, value in weights.computed.items()}
    held = {node.name: node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"}
    inputs = {name: f"{value.dtype} {value.shape}" for name, value in held.items()}
    return graph_key(
        {
            "graph": hashlib.sha256(to_bytes(graph)).hexdigest(),
            "inputs": json.dumps(inputs, sort_keys=True),
            "constants": hashlib.sha256(json.dumps(constants, sort_keys=True).encode()).hexdigest(),
            "values": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
            "target": target.isa,
            "llmc sources": source_digest({room: package_folder(room) for room in _SOURCES}),
            **{f"version/{name}": version for name, version in toolchain().items() if name in ("torch", "c++")},
            **more,
        }
    )
