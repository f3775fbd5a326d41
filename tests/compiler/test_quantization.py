"""Which captured constants a quantised graph's weights are made of, their dequantised values, and what the accuracy says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.artifacts.safetensors import Checkpoint
from llmc.compiler import accuracy
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.dequantized import dequantized_fetcher, quantized_bits
from llmc.compiler.input_key import input_key
from llmc.compiler.model import read_model
from llmc.compiler.packing import fetcher
from llmc.compiler.pipeline import group_of, pipeline
from llmc.compiler.targets import find_target
from llmc.config.compile import CompileConfig
from llmc.config.resolve import resolve
from llmc.errors import ConfigError, InternalError
from llmc.passes.base import PassContext
from llmc.passes.runner import run_passes
from llmc.passes.weights import Constant, WeightTable
from tests.architectures import save_tiny_model

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
TEXTS = [[5, 9, 21, 300, 7, 44], [45, 46, 8]]


def config(**settings: Any) -> CompileConfig:
    return CompileConfig(model=DEMO_MODEL, out=Path("out"), **settings)


def quantized(name: str, folder: Path, scheme: str) -> tuple[TracedModel, WeightTable, Checkpoint]:
    """The captured model as it was, and its weight table after the passes."""
    save_tiny_model(name, folder)
    traced = capture(read_model(folder), max_model_len=64)
    captured, weights = traced.untouched(), traced.weight_table()
    run_passes(traced.graph, pipeline(2, scheme), PassContext(weights=weights, max_positions=64))
    return captured, weights, Checkpoint(sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3_moe"])
def test_every_quantised_matrix_is_found_and_stays_near(name: str, tmp_path: Path) -> None:
    captured, weights, checkpoint = quantized(name, tmp_path, "int8")
    with checkpoint:
        plain = fetcher(captured.constants, checkpoint)
        fetch = dequantized_fetcher(captured, weights, checkpoint, tmp_path)
        changed = 0
        for constant in captured.constants:
            was, now = plain(constant), fetch(constant)
            assert (was.shape, was.dtype) == (now.shape, now.dtype)
            if not torch.equal(was, now):
                changed += 1
                assert (was - now).abs().max() <= was.abs().max() / 253
        assert changed >= len(quantized_bits(weights)) > 2
        cost = accuracy.measure(captured, plain, fetch, TEXTS)
        assert cost.tokens == 7 and 0 < cost.mean_kl < 1e-3
        assert cost.perplexity == pytest.approx(cost.reference_perplexity, rel=0.02)
        same = accuracy.measure(captured, plain, plain, TEXTS)
        assert same.mean_kl == 0 and same.perplexity == same.reference_perplexity == cost.reference_perplexity


def test_the_group_is_the_schemes_own_or_the_one_asked_for() -> None:
    for kind in ("cpu", "cuda"):
        for scheme, own in (("int8", 128), ("int4", 32)):
            groups = [pipeline(2, scheme, group=asked, kind=kind)[-1].group for asked in (None, 64)]  # type: ignore[attr-defined]
            assert groups == [own, 64] == [group_of(scheme, None), group_of(scheme, 64)]
    assert group_of("fp8", None) == 0
    key = {group: input_key(config(quantization="int8", quantization_group_size=group), find_target("cpu:x86-64-v3")).digest
           for group in (None, 32)}  # fmt: skip
    assert key[None] != key[32]


@pytest.mark.parametrize(("scheme", "found"), [(None, "this is no quantisation"), ("fp8", "--quantization fp8, with a scale per row")])
def test_a_group_of_nothing_is_refused(scheme: str | None, found: str) -> None:
    with pytest.raises(ConfigError, match=f"is for --quantization int8 and int4, and .*{found}"):
        config(quantization=scheme, quantization_group_size=64, target="cuda:sm_90")


@pytest.mark.parametrize("value", ["100", "0", "x"])
def test_a_group_is_a_multiple_of_32(value: str) -> None:
    with pytest.raises(ConfigError, match="96 and 128 are the nearest" if value == "100" else "--quantization-group-size"):
        resolve("compile", {"quantization_group_size": value}, environ={})


def test_a_matrix_of_other_parts_is_our_own_fault(tmp_path: Path) -> None:
    captured, weights, checkpoint = quantized("llama", tmp_path, "int4")
    name = next(iter(quantized_bits(weights)))
    recipe = {"op": "quantize", "bits": 4, "group": 32, "input": {"op": "source", "name": "elsewhere"}}
    weights.constants[name] = Constant(recipe=recipe, dtype=weights[name].dtype, shape=weights[name].shape)
    with checkpoint, pytest.raises(InternalError, match="not made of whole constants"):
        dequantized_fetcher(captured, weights, checkpoint, tmp_path)


def test_calibration_tokens() -> None:
    parts = accuracy.calibration_tokens(100, lambda text: [min(ord(c), 120) for c in text], 4096)
    assert [len(p) for p in parts] == [128] * 4 and all(i < 100 for p in parts for i in p)
    assert {len(p) for p in accuracy.calibration_tokens(100, None, 16)} == {16}
    assert accuracy.calibration_tokens(100, lambda text: [1, 2, 3], 2) == [[1, 2]]


def test_the_pipeline_ends_with_quantising() -> None:
    assert [p.name for p in pipeline(2, "int8")] == [*(p.name for p in pipeline(2)), "quantize-linear"]
    with pytest.raises(ConfigError, match="-O0 runs none"):
        pipeline(0, "int8")
