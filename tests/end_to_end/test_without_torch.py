"""A compiled artifact runs where no torch is to be found, and over libtorch with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.artifacts.verify import open_artifact
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig
from llmc.kernels import aoti_runtime
from tests.end_to_end.workshop import Workshop

# Imported by every interpreter that starts with this folder on its path, which then is as one without torch.
_HIDE_TORCH = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
_GENERATE = """
import importlib.util, json, sys
import llmc

found = importlib.util.find_spec("torch") is not None
prompts = [[5, 6, 7, 8, 9], list(range(40, 70))]
params = llmc.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)
with llmc.LLM(sys.argv[1], threads=1, num_blocks=64, max_num_seqs=4) as model:
    outputs = model.generate(prompts, params)
answers = [[(token, p.logprob.hex()) for entry in o.outputs[0].logprobs for token, p in sorted(entry.items())] for o in outputs]
libraries = sorted({line.split("/")[-1].strip() for line in open("/proc/self/maps") if "/lib" in line})
print(json.dumps({"found": found, "imported": "torch" in sys.modules, "libraries": libraries, "answers": answers}))
"""


def _generate(artifact: Path, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", _GENERATE, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3", torch.float32), ("qwen3", torch.bfloat16), ("mixtral", torch.float32)], ids=lambda value: str(value)
)
def test_an_artifact_runs_where_there_is_no_torch(name: str, dtype: torch.dtype, workshop: Workshop, tmp_path: Path) -> None:
    """A mixture of experts calls topk besides."""
    artifact = workshop.artifact(name, dtype=dtype)
    with open_artifact(artifact) as opened:
        assert opened.manifest.requirements.torch is None
        assert {image.role for image in opened.manifest.images} == {"kernels", "tensor_runtime", "model"}
        assert opened.manifest.op_implementations["tensors"].startswith("llmc's tensor runtime")
    (tmp_path / "sitecustomize.py").write_text(_HIDE_TORCH)
    ours = _generate(artifact, {"PYTHONPATH": str(tmp_path)})
    assert not ours["found"] and not ours["imported"]
    assert not [name for name in ours["libraries"] if name.startswith(("libtorch", "libc10"))]
    oracle = _generate(artifact, {"LLMC_TENSORS": "libtorch"})
    assert "libtorch_cpu.so" in oracle["libraries"] and not oracle["imported"]
    assert ours["answers"] == oracle["answers"]


def test_what_only_libtorch_has_is_named(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every supported architecture does without; the next one may not."""
    monkeypatch.setattr(aoti_runtime, "PROVIDED", aoti_runtime.PROVIDED - {"aoti_torch_cpu_topk"})
    out = tmp_path / "out"
    compile_model(CompileConfig(model=workshop.folder("mixtral"), out=out, level=1), store=None)
    with open_artifact(out) as opened:
        manifest = opened.manifest
    assert manifest.op_implementations["tensors"] == "libtorch, for aoti_torch_cpu_topk"
    assert manifest.requirements.torch == ".".join(torch.__version__.split(".")[:2])
    assert {image.role for image in manifest.images} == {"kernels", "aoti_shim", "model"}


def test_tensors_of_another_kind_are_refused(workshop: Workshop) -> None:
    command = [sys.executable, "-c", _GENERATE, str(workshop.artifact("qwen3"))]
    environment = {**os.environ, "LLMC_TENSORS": "numpy"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode != 0 and "LLMC_TENSORS=numpy: tensors are those of the artifact or of libtorch" in done.stderr
