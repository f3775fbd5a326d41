"""Weights from a checkpoint, for an artifact that carries recipes instead of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmc.artifacts.manifest import TensorRecord
from llmc.artifacts.recipes import evaluate_into, infer
from llmc.artifacts.safetensors import Checkpoint
from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.weights import Weights, place_weights


def bind_checkpoint(tensors: list[TensorRecord], folder: Path, *, num_threads: int) -> Weights:
    """Make every tensor of `tensors` from the safetensors files of a folder.

    The checkpoint is the operator's own and has no hash in the manifest; its shapes and dtypes are checked against the recipes.

    Raises:
        ConfigError: the folder has no safetensors files.
        ArtifactError: the checkpoint lacks a tensor, or one has another shape or dtype than the recipes need.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"--checkpoint {folder}: holds no *.safetensors file; name the folder of the model's checkpoint")
    with Checkpoint(files) as checkpoint:
        specs = checkpoint.specs()
        for record in tensors:
            made = infer(record.recipe, specs)
            if made != (record.dtype, tuple(record.shape)):
                raise ArtifactError(
                    f"--checkpoint {folder}: makes {record.name} {made[0]} {list(made[1])}, the artifact needs "
                    f"{record.dtype} {record.shape}; it belongs to another model"
                )

        def fill(record: TensorRecord, into: np.ndarray) -> None:
            evaluate_into(record.recipe, into.reshape(-1).view(np.uint8), checkpoint.fetch, specs)

        return place_weights(tensors, fill, num_threads=num_threads)
