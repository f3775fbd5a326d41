"""The whole list over captured models: what matched, the same bits while exact, the same answers within tolerance at the end."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmc.artifacts import recipes
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import LEVELS, pipeline
from llmc.errors import ConfigError
from llmc.passes import Numerics, Pass, PassContext
from tests.architectures import save_tiny_model
from tests.compiler.paged_steps import PagedSteps
from tests.passes.support import Case, assert_close

# Prompts in one step, then a decode with a prompt's rest; only the last row of each sequence wants logits.
STEPS = ([(0, [5, 9, 21, 300, 7]), (1, [44, 45, 46])], [(1, [8]), (0, [1, 2])])


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Case, TracedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder, num_hidden_layers=2)
    traced = capture(read_model(folder), max_model_len=64)
    ctx = PassContext(weights=traced.weight_table(), max_positions=64)
    return request.param, Case(traced.graph, ctx, load_file(folder / "model.safetensors"), ()), traced


def answers(case: Case, traced: TracedModel) -> list[Tensor]:
    """Logits of both steps and the caches after them."""
    steps = PagedSteps(traced.kv)
    found = []
    for work in STEPS:
        logits, *after = case.run(*steps.inputs(work, padding=1))
        found.append(logits)
        steps.caches = after[-len(steps.caches) :]
    return found + steps.caches


def exact(passes: list[Pass]) -> list[Pass]:
    return [p for p in passes if p.numerics is Numerics.EXACT]


def test_exact_passes_keep_every_bit_and_lowering_keeps_answers(captured: tuple[str, Case, TracedModel]) -> None:
    _, before, traced = captured
    expected = answers(before, traced)
    pruned, _ = before.apply(*exact(pipeline(2)))
    assert_close(expected, answers(pruned, traced), None)
    lowered, _ = before.apply(*pipeline(2))
    for want, have in zip(expected, answers(lowered, traced), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)  # ten times the table's: the sums of all layers follow each other


def test_every_pass_matches_once_per_layer(captured: tuple[str, Case, TracedModel]) -> None:
    name, case, traced = captured
    layers, experts = len(traced.kv.head_dim), 2 if name == "qwen3_moe" else 0
    lowered, reports = case.apply(*pipeline(2))
    matches = {r.applied.name: r.result.matches for r in reports}
    assert matches["merge-qkv"] == layers
    assert matches["merge-gate-up"] == (0 if experts else layers)
    assert matches["prune-to-needed-rows"] == 1
    assert matches["constant-fold-rope"] == 2
    assert matches["lower-experts"] == experts * layers
    assert matches["fuse-rms-norm"] == 2 * layers + 1
    assert matches["fuse-rope-kv-write"] == layers
    assert matches["fuse-add-rms-norm"] == 2 * layers
    assert matches["fuse-silu-mul"] == layers
    refusals = {r.applied.name: dict(r.result.refusals) for r in reports if r.result.refusals}
    of_heads = {} if name == "llama" else {"fuse-rms-norm": {"its rows are not evenly spaced": 2 * layers}}
    assert refusals == of_heads
    text = lowered.text()
    assert "= linear(" not in text and "bmm(" not in text and "cos(" not in text
    assert text.count("llmc.rope_kv_write(") == text.count("llmc.paged_attend(") == layers
    assert "rsqrt(" not in text and "llmc.paged_attention(" not in text


def test_levels() -> None:
    assert pipeline(0) == []
    assert pipeline(1)[0].name == "no-op-elimination"
    assert all(p.numerics is Numerics.EXACT for p in pipeline(1) if not p.name.startswith("lower-"))
    names = [p.name for p in pipeline(2)]
    assert len(set(names)) == len(names)
    assert pipeline(3) == pipeline(2)
    with pytest.raises(ConfigError, match="optimisation level 4: expected one of 0, 1, 2, 3"):
        pipeline(4)
    assert LEVELS == (0, 1, 2, 3)


def test_recipes_are_what_the_packer_understands(captured: tuple[str, Case, TracedModel]) -> None:
    _, case, _ = captured
    lowered, _ = case.apply(*pipeline(2))
    weights = lowered.ctx.weights
    specs = {name: spec(t) for name, t in case.sources.items()}
    computed = {name: spec(t) for name, t in weights.computed.items()}
    for name in weights:
        constant = weights[name]
        assert recipes.infer(constant.recipe, specs, computed) == (str(constant.dtype).removeprefix("torch."), constant.shape)


def spec(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
