"""Write jobs for run_image.py and read their results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmc.artifacts.manifest import KVFacts
from llmc.compiler.lower import LoweredModel
from llmc.kernels.build import BuiltKernels, dlopen_order
from tests.compiler.paged_steps import PagedSteps


@dataclass
class ImageJob:
    """Steps to run in one process. `world(...)` makes a fresh cache, `step(...)` adds a step in it and returns its number."""

    folder: Path
    lowered: LoweredModel
    kernels: BuiltKernels
    kv: KVFacts
    constants: dict[str, Tensor]
    width: int  # of the logits
    worlds: list[PagedSteps] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def world(self) -> int:
        """A new set of caches and block tables."""
        self.worlds.append(PagedSteps(self.kv))
        return len(self.worlds) - 1

    def step(self, world: int, work: Sequence[tuple[int, Sequence[int]]], *, padding: int = 0, threads: int = 1) -> int:
        """Compute new tokens of some sequences; see PagedSteps.inputs."""
        arrays = self.worlds[world].inputs(work, padding=padding)[: -len(self.worlds[world].caches)]
        files = [[self._save(f"in_{len(self.steps)}_{i}", array), _name(array.dtype)] for i, array in enumerate(arrays)]
        self.steps.append({"world": world, "threads": threads, "inputs": files})
        return len(self.steps) - 1

    def run(self, *, libtorch: bool = False) -> list[Tensor]:
        """Logits of every step, in a fresh interpreter that never imports torch; with libtorch's tensors or with ours."""
        libraries = dlopen_order(self.kernels, Path(torch.__file__).parent / "lib" if libtorch else None)
        if libtorch:
            libraries.append(self.kernels.tensor_runtime_so)  # the image asks for it by name, and finds libtorch before it
        job = {
            "libraries": [str(path) for path in libraries],
            "image": str(self.lowered.path),
            "constants": {name: [self._save(f"constant_{i}", t), _name(t.dtype)] for i, (name, t) in enumerate(self._constants())},
            "caches": [list(cache.shape) for cache in PagedSteps(self.kv).caches],
            "dtype": self.kv.dtype,
            "width": self.width,
            "steps": self.steps,
        }
        (self.folder / "job.json").write_text(json.dumps(job))
        script = Path(__file__).with_name("run_image.py")
        done = subprocess.run([sys.executable, str(script), str(self.folder)], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return [self._load(f"out_{index}.npy") for index in range(len(self.steps))]

    def _constants(self) -> list[tuple[str, Tensor]]:
        return [(fqn, self.constants[name]) for fqn, name in self.lowered.constants.items()]

    def _save(self, name: str, tensor: Tensor) -> str:
        array = tensor.contiguous().view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.contiguous().numpy()
        np.save(self.folder / f"{name}.npy", array)
        return f"{name}.npy"

    def _load(self, file: str) -> Tensor:
        tensor = torch.from_numpy(np.load(self.folder / file))
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
