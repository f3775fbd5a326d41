"""Running the compiled program. `make_executor` picks the kind the artifact names; nothing else knows which it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.artifacts.manifest import Entry, Manifest
from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.executors.openmp import bound_spinning
from llmc.runtime.lane_hash import LaneHash
from llmc.runtime.step import Executor
from llmc.runtime.weights import Weights

if TYPE_CHECKING:
    from llmc.runtime.executors.tensor_functions import TensorFunctions  # plans, for a GPU, do without


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCode:
    """The code of one entry, mapped into the process, before it has weights. `bind` makes the executor."""

    bind: Callable[[Weights], Executor]
    lane_hash: LaneHash | None = None  # of the artifact's kernels, for its weights


def step_entry(manifest: Manifest) -> Entry:
    """The entry the engine runs.

    Raises:
        ArtifactError: the artifact has none.
    """
    for entry in manifest.entries:
        if entry.name == "step":
            return entry
    raise ArtifactError(f"manifest.json: no entry named 'step' among {[entry.name for entry in manifest.entries]}; compile again")


def load_code(manifest: Manifest, entry: Entry, descriptors: Mapping[str, int], *, num_threads: int) -> LoadedCode:
    """Map the entry's code, for entries that run on a CPU. May run in another thread than the one that will run the program.

    Args:
        descriptors: open descriptor of each verified file, by its path in the artifact.
        num_threads: of every parallel region.

    Raises:
        ArtifactError: an image is missing or refused by the loader.
        ConfigError: torch or TVM's runtime is missing, or this process runs another artifact's kernels.
    """
    bound_spinning()
    if entry.executor == "aoti":
        return _load_aoti(manifest, entry, descriptors, num_threads)
    if entry.executor == "tvm":
        return _load_tvm(manifest, entry, descriptors, num_threads)
    return _load_nodes(manifest, entry, descriptors, num_threads)


def _load_aoti(manifest: Manifest, entry: Entry, descriptors: Mapping[str, int], num_threads: int) -> LoadedCode:
    from llmc.runtime.executors.aoti import AotiExecutor
    from llmc.runtime.executors.images import load_image

    tensors, own, lane_hash = _load_tensors(manifest, descriptors)
    model = next((image for image in manifest.images if image.path == entry.program), None)
    if model is None:
        raise ArtifactError(f"manifest.json: entry {entry.name} runs {entry.program}, which is no image; compile again")
    program = load_image(descriptors[model.path], sha256=model.sha256, role="model", shared=False, own_first=own)

    def bind(weights: Weights) -> Executor:
        return AotiExecutor(entry=entry, kv=manifest.kv, image=program, tensors=tensors, weights=weights, num_threads=num_threads)

    return LoadedCode(bind=bind, lane_hash=lane_hash)


def _load_tensors(manifest: Manifest, descriptors: Mapping[str, int]) -> tuple[TensorFunctions, bool, LaneHash | None]:
    """Map what the model image calls, and whose tensors those are; true: the artifact's own, which nothing else in the process, a
    libtorch least of all, may stand in for. And the hash that the kernels bring."""
    from llmc.runtime.executors.images import load_image

    images = {image.role: image for image in manifest.images}
    libtorch = "tensor_runtime" not in images or _oracle_wanted()
    found: TensorFunctions
    if libtorch:
        from llmc.runtime.executors.libtorch import load_libtorch

        found = load_libtorch()
    # The functions around the kernels leave those undefined and the model leaves them, so each must stand before the next.
    lane_hash = None
    for role in ("kernels", "aoti_shim"):
        if role in images:
            image = load_image(descriptors[images[role].path], sha256=images[role].sha256, role=role, shared=True)
            lane_hash = LaneHash.of(image) if role == "kernels" else lane_hash
    if "tensor_runtime" in images:
        from llmc.runtime.executors.tensor_runtime import TensorRuntime

        runtime = images["tensor_runtime"]
        own = load_image(descriptors[runtime.path], sha256=runtime.sha256, role=runtime.role, shared=False, own_first=not libtorch)
        if not libtorch:
            found = TensorRuntime(own)
    return found, not libtorch, lane_hash


def _oracle_wanted() -> bool:
    """Whether LLMC_TENSORS asks for libtorch where the artifact brings its own tensors.

    Raises:
        ConfigError: it asks for something else.
    """
    wanted = os.environ.get("LLMC_TENSORS", "artifact")
    if wanted not in ("artifact", "libtorch"):
        raise ConfigError(f"LLMC_TENSORS={wanted}: tensors are those of the artifact or of libtorch")
    return wanted == "libtorch"


def _load_tvm(manifest: Manifest, entry: Entry, descriptors: Mapping[str, int], num_threads: int) -> LoadedCode:
    from llmc.runtime.executors.images import load_image
    from llmc.runtime.executors.tvm import TvmExecutor
    from llmc.runtime.executors.tvm_runtime import open_tvm_runtime

    open_tvm_runtime()
    images = {image.role: image for image in manifest.images}
    for role in ("kernels", "model"):  # the model image finds the kernels where they stand
        if role not in images:
            raise ArtifactError(f"manifest.json: no image of role {role}, which executor tvm needs; compile again")
    kernels, model = images["kernels"], images["model"]
    load_image(descriptors[kernels.path], sha256=kernels.sha256, role="kernels", shared=True)
    image = load_image(descriptors[model.path], sha256=model.sha256, role="model", shared=False)

    def bind(weights: Weights) -> Executor:
        return TvmExecutor(entry=entry, kv=manifest.kv, image=image, weights=weights, num_threads=num_threads)

    return LoadedCode(bind=bind)


def _load_nodes(manifest: Manifest, entry: Entry, descriptors: Mapping[str, int], num_threads: int) -> LoadedCode:
    from llmc.runtime.executors.images import load_image
    from llmc.runtime.executors.nodes import NodesExecutor, read_program

    program = read_program(descriptors[entry.program], entry.program)
    kernels = [image for image in manifest.images if image.role == "kernels"]
    if len(kernels) != 1:
        raise ArtifactError(f"manifest.json: {len(kernels)} images of role kernels where one is expected; compile again")
    image = load_image(descriptors[kernels[0].path], sha256=kernels[0].sha256, role="kernels", shared=False)

    def bind(weights: Weights) -> Executor:
        return NodesExecutor(entry=entry, kv=manifest.kv, program=program, kernels=image, weights=weights, num_threads=num_threads)

    return LoadedCode(bind=bind)
