"""The list for a GPU over every architecture: what each fusion matches, and the same answers by the ops' references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmc.compiler.capture import capture
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import pipeline
from llmc.errors import ConfigError
from llmc.passes import PassContext
from tests.architectures import NAMES, save_tiny_model
from tests.compiler.paged_steps import PagedSteps
from tests.passes.support import Case

STEPS = ([(0, [5, 9, 21, 300, 7]), (1, [44, 45, 46])], [(1, [8]), (0, [1, 2])])

# Per model of two layers: norms, norms with a sum, rotations; None: none of these patterns. One more layer where layers differ.
_LLAMA = {"fuse-rms-norm": 5, "fuse-add-rms-norm": 4, "fuse-rope-kv-write": 2, "fuse-silu-mul": 2, "fuse-gelu-mul": 0}
_GEMMA2 = {"fuse-rms-norm": 9, "fuse-add-rms-norm": 4, "fuse-rope-kv-write": 2, "fuse-silu-mul": 0, "fuse-gelu-mul": 2}
_NONE = dict.fromkeys(_LLAMA, 0)
EXPECTED = {
    **dict.fromkeys(("llama", "llama3_rope", "qwen2", "mistral", "phi3", "phi3_longrope", "smollm3"), _LLAMA),
    "mixtral": _LLAMA | {"lower-moe-route": 2, "combine-experts": 2},
    "qwen3": _LLAMA | {"fuse-rms-norm": 9, "lower-moe-route": 0},
    "qwen3_moe": _LLAMA | {"fuse-rms-norm": 9, "lower-moe-route": 2, "combine-experts": 2},
    "gemma2": _GEMMA2,
    "gemma3_text": {"fuse-rms-norm": 19, "fuse-add-rms-norm": 6, "fuse-rope-kv-write": 3, "fuse-silu-mul": 0, "fuse-gelu-mul": 3},
    "gpt_oss": {
        "fuse-rms-norm": 7,
        "fuse-add-rms-norm": 6,
        "fuse-rope-kv-write": 3,
        "fuse-silu-mul": 0,
        "fuse-gelu-mul": 0,
        "lower-moe-route": 3,
        "combine-experts": 3,
    },
    "olmo2": _LLAMA | {"fuse-rms-norm": 9, "fuse-add-rms-norm": 1},  # it normalises what is added, not the sum
    "gpt2": _NONE,
    "opt": _NONE,
    "gpt_neox": _NONE | {"fuse-rope-kv-write": 2},
    "glm4": _LLAMA | {"fuse-rms-norm": 9, "fuse-rope-kv-write": 0},
}
REFUSALS = {
    "gpt2": {"it is not rotated": 2},
    "opt": {"it is not rotated": 2},
    "glm4": {"neighbouring dimensions are rotated with each other": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_fusions_match_and_keep_answers(name: str, tmp_path: Path) -> None:
    layers = {} if name in ("gemma3_text", "gpt_oss") else {"num_hidden_layers": 2}
    save_tiny_model(name, tmp_path, **layers)
    traced = capture(read_model(tmp_path), max_model_len=64)
    ctx = PassContext(weights=traced.weight_table(), max_positions=64)
    before = Case(traced.graph, ctx, load_file(tmp_path / "model.safetensors"), ())
    after, reports = before.apply(*pipeline(2, kind="cuda"))
    found = {r.applied.name: r.result for r in reports}
    assert {p: found[p].matches for p in EXPECTED[name]} == EXPECTED[name]
    assert dict(found["fuse-rope-kv-write"].refusals) == REFUSALS.get(name, {})
    text = after.text()
    assert "= linear(" not in text and "addmm(" not in text and "bmm(" not in text
    steps = PagedSteps(traced.kv)
    for work in STEPS:
        inputs = steps.inputs(work, padding=1)
        expected, answered = (case.run(*inputs, torch_ops=True) for case in (before, after))
        for want, have in zip(expected, answered, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)  # ten times the table's: the sums of all layers follow each other
        steps.caches = expected[-len(steps.caches) :]


def test_levels_of_a_gpu() -> None:
    assert pipeline(0, kind="cuda") == []
    names = {level: [p.name for p in pipeline(level, kind="cuda")] for level in (1, 2)}
    assert not any(name.startswith("fuse-") for name in names[1])
    assert names[1][-4:] == names[2][-4:] == ["lower-plain-linear", "lower-plain-experts", "lower-moe-route", "combine-experts"]
    assert [p.name for p in pipeline(2, "int8", kind="cuda")] == [*names[2], "quantize-plain-linear"]
    with pytest.raises(ConfigError, match="-O0 runs none"):
        pipeline(0, "int8", kind="cuda")
