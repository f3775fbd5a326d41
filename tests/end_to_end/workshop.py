"""Tiny models and their artifacts, made on demand and once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from llmc.artifacts.store import Store
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig
from tests.architectures import save_tiny_model

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


class Workshop:
    """Makes model folders and artifacts under `root`. Two workers that want the same artifact compile it once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store()
        self._models: dict[tuple[str, torch.dtype], nn.Module] = {}
        self._artifacts: dict[tuple[Any, ...], Path] = {}
        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()

    def folder(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        """The model folder of a tiny model, or of the demo model when `name` is "demo"."""
        if name == "demo":
            return DEMO_MODEL
        self.reference(name, dtype)
        return self._folder(name, dtype)

    def reference(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The Hugging Face model of `folder(name)`, with eager attention, computing in `dtype`."""
        key = (name, dtype)
        if key not in self._models:
            if name == "demo":
                model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, attn_implementation="eager", dtype=dtype)
                self._models[key] = model.eval().requires_grad_(False)
            else:
                self._models[key] = save_tiny_model(name, self._folder(name, dtype), dtype)
        return self._models[key]

    def artifact(self, name: str, *, level: int = 2, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        """An artifact of `folder(name, dtype)`; `settings` are fields of CompileConfig."""
        spelled = str(dtype).removeprefix("torch.")
        key = (name, level, spelled, *sorted(settings.items()))
        if key not in self._artifacts:
            out = self.root / "artifacts" / f"{len(self._artifacts)}-{name}-O{level}-{spelled}"
            config = CompileConfig(model=self.folder(name, dtype), level=level, dtype=spelled, out=out, **settings)
            compile_model(config, store=self.store)
            self._artifacts[key] = out
        return self._artifacts[key]

    def _folder(self, name: str, dtype: torch.dtype) -> Path:
        return self.root / "models" / f"{name}-{str(dtype).removeprefix('torch.')}"
