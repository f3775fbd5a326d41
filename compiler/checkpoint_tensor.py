"""Where one tensor of a checkpoint lies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensor:
    """Where one tensor of the checkpoint lies."""

    name: str
    file: str  # relative to the model folder
    dtype: str  # as safetensors spells it, "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int
