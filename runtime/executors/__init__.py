"""Running the compiled program. `make_executor` picks the kind the artifact names; nothing else knows which it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmc.artifacts.manifest import Entry, Manifest
from llmc.errors import ArtifactError
from llmc.runtime.executors.openmp import bound_spinning
from llmc.runtime.step import Executor
from llmc.runtime.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedCode:
    """The code of one entry, mapped into the process, before it has weights. `bind` makes the executor."""

    bind: Callable[[Weights], Executor]


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
        ConfigError: torch is missing, or this process runs another artifact's kernels.
    """
    bound_spinning()
    if entry.executor == "aoti":
        return _load_aoti(manifest, entry, descriptors, num_threads)
    return _load_nodes(manifest, entry, descriptors, num_threads)


def _load_aoti(manifest: Manifest, entry: Entry, descriptors: Mapping[str, int], num_threads: int) -> LoadedCode:
    from llmc.runtime.executors.aoti import AotiExecutor
    from llmc.runtime.executors.images import load_image
    from llmc.runtime.executors.libtorch import load_libtorch

    libtorch = load_libtorch()
    # The shim leaves the kernels undefined and the model the shim, so each must stand before the next
    for role in ("kernels", "aoti_shim"):
        for image in manifest.images:
            if image.role == role:
                load_image(descriptors[image.path], sha256=image.sha256, role=role, shared=True)
    model = next((image for image in manifest.images if image.path == entry.program), None)
    if model is None:
        raise ArtifactError(f"manifest.json: entry {entry.name} runs {entry.program}, which is no image; compile again")
    program = load_image(descriptors[model.path], sha256=model.sha256, role="model", shared=False)

    def bind(weights: Weights) -> Executor:
        return AotiExecutor(entry=entry, kv=manifest.kv, image=program, libtorch=libtorch, weights=weights, num_threads=num_threads)

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
