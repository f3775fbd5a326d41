"""Quantised weights from the flag to the token: size, stated cost, the same bits under load, bound checkpoints, and the bound on cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc import LLM, SamplingParams
from llmc.artifacts.inspect import describe
from llmc.artifacts.kv_bytes import block_bytes
from llmc.artifacts.manifest import Manifest
from llmc.artifacts.verify import open_artifact
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError
from tests.end_to_end.served import draw_prompts
from tests.end_to_end.workshop import DEMO_MODEL, Workshop

PROMPTS = draw_prompts((45, 3, 60, 17, 32, 1), 512, 11)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=2024, max_tokens=16, ignore_eos=True, logprobs=3)
BOUNDS = {"int8": 2e-3, "int4": 0.12}  # nats per token, of the demo model; measured 0.0007 and 0.06


def manifest_of(artifact: Path) -> Manifest:
    with open_artifact(artifact) as opened:
        return opened.manifest


def demo(workshop: Workshop, scheme: str | None, **settings: Any) -> Path:
    return workshop.artifact("demo", dtype=torch.bfloat16, **({"quantization": scheme} if scheme else {}), **settings)


def tokens(artifact: Path, prompts: list[list[int]], params: SamplingParams, **options: Any) -> list[list[int]]:
    with LLM(artifact, **{"threads": 1, "max_num_seqs": 8, "num_blocks": 128, **options}) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, [params] * len(prompts))]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_cost_and_size_are_stated_and_small(workshop: Workshop, scheme: str) -> None:
    plain, quantized = manifest_of(demo(workshop, None)), manifest_of(demo(workshop, scheme))
    facts = quantized.quantization
    assert facts is not None and (facts.scheme, facts.group) == (scheme, 128 if scheme == "int8" else 32)
    assert facts.calibration_tokens > 200 and facts.mean_kl is not None and facts.perplexity is not None
    assert 0 < facts.mean_kl < BOUNDS[scheme]
    assert facts.reference_perplexity is not None and facts.perplexity < 1.1 * facts.reference_perplexity
    assert sorted(set(facts.tensors.values())) == ([8] if scheme == "int8" else [4, 8])  # int4 keeps 8 bits in the head
    whole = sum(t.nbytes for t in plain.tensors if "packed" in t.name)
    held = sum(t.nbytes for t in quantized.tensors if "quantized" in t.name or "scales" in t.name)
    assert held < (0.54 if scheme == "int8" else 0.42) * whole
    assert any(p.name == "quantize-linear" and p.numerics == "close" for p in quantized.passes)
    report = json.loads((demo(workshop, scheme) / "report" / "report.json").read_text())
    assert report["quantization"]["mean_kl"] == facts.mean_kl
    assert plain.quantization is None


def test_int8_tokens_are_mostly_those_of_the_plain_weights(workshop: Workshop) -> None:
    """Greedy continuations part for good after one close call, so the first tokens are compared."""
    first = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    prompts = [prompt[:end] for prompt in PROMPTS for end in range(1, len(prompt) + 1, 3)]
    plain, quantized = (tokens(demo(workshop, scheme), prompts, first) for scheme in (None, "int8"))
    agreeing = sum(a == b for a, b in zip(plain, quantized, strict=True))
    assert agreeing >= 0.9 * len(prompts)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_seeded_request_has_the_same_bits_under_any_conditions(workshop: Workshop, scheme: str) -> None:
    artifact = demo(workshop, scheme)

    def seen(prompts: list[list[int]], **options: Any) -> tuple[Any, ...]:
        with LLM(artifact, **{"threads": 1, "max_num_seqs": 8, "num_blocks": 128, **options}) as llm:
            first = llm.generate(prompts, [SEEDED] * len(prompts))[0].outputs[0]
            return tuple(first.token_ids), str(first.logprobs)

    alone = seen(PROMPTS[:1])
    assert seen(PROMPTS) == alone
    assert seen(PROMPTS[:1], max_num_batched_tokens=16) == alone
    assert seen(PROMPTS, threads=2, max_num_batched_tokens=40) == alone


def test_a_bound_checkpoint_is_quantised_as_an_embedded_one(workshop: Workshop) -> None:
    artifact = demo(workshop, "int8", weights="external")
    facts = manifest_of(artifact).quantization
    assert facts is not None and facts.calibration_tokens == 0 and facts.mean_kl is None
    assert tokens(artifact, PROMPTS[:2], GREEDY, checkpoint=DEMO_MODEL) == tokens(demo(workshop, "int8"), PROMPTS[:2], GREEDY)


def test_transposed_and_tied_weights(workshop: Workshop) -> None:
    """gpt2 stores [K, N] and ties its head to the embedding; the engine compares the canaries, made with dequantised weights."""
    artifact = workshop.artifact("gpt2", quantization="int4")
    manifest = manifest_of(artifact)
    assert manifest.quantization is not None and len(manifest.quantization.tensors) > 4
    assert manifest.canaries
    assert all(len(found) == 12 for found in tokens(artifact, PROMPTS[:2], GREEDY))


def test_max_kl_fails_the_compile_with_the_measured_value(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = CompileConfig(model=DEMO_MODEL, out=out, quantization="int4", max_kl=0.0001)
    with pytest.raises(
        ConfigError, match=r"--quantization int4 costs .* mean KL divergence 0\.0\d+ nats over 508 tokens, above --max-kl 0\.0001"
    ):
        compile_model(config)
    assert not out.exists() and not list(tmp_path.iterdir())


KV_BOUNDS = {"int8": 2e-3, "fp8": 2e-2}  # nats per token, of the demo model


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_cache_of_eight_bits(workshop: Workshop, scheme: str) -> None:
    """Its cost and its bytes are stated, its answers are as independent of their surroundings as any."""
    artifact, plain = demo(workshop, None, kv_cache_dtype=scheme), manifest_of(demo(workshop, None))
    manifest = manifest_of(artifact)
    facts = manifest.kv_quantization
    assert facts is not None and facts.scheme == scheme and plain.kv_quantization is None and manifest.quantization is None
    assert facts.calibration_tokens > 200 and facts.mean_kl is not None and 0 < facts.mean_kl < KV_BOUNDS[scheme]
    size = plain.kv.head_dim[0]
    assert block_bytes(manifest.kv) * 2 * size == block_bytes(plain.kv) * (size + (4 if scheme == "int8" else 0))
    report = json.loads((artifact / "report" / "report.json").read_text())
    assert report["kv_quantization"]["mean_kl"] == facts.mean_kl
    assert report["memory"]["kv_bytes_per_token"] * manifest.kv.block_size == block_bytes(manifest.kv)
    assert describe(artifact)["kv"]["quantization"]["scheme"] == scheme
    alone = tokens(artifact, PROMPTS[:1], SEEDED)
    assert tokens(artifact, PROMPTS, SEEDED, max_num_batched_tokens=16)[:1] == alone
    assert tokens(artifact, PROMPTS, GREEDY) != [[]] * len(PROMPTS)


def test_weights_and_cache_together_are_bounded_together(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = CompileConfig(model=DEMO_MODEL, out=out, quantization="int8", kv_cache_dtype="fp8", max_kl=1e-6)
    with pytest.raises(ConfigError, match=r"--quantization int8 with --kv-cache-dtype fp8 costs .* above --max-kl 1e-06"):
        compile_model(config)
    assert not out.exists()


def test_the_oracle_takes_such_a_cache_too(workshop: Workshop) -> None:
    """-O0 and -O2 of a model in float32 choose the same tokens over the same eight bits."""
    levels = [workshop.artifact("llama", level=level, kv_cache_dtype="int8") for level in (0, 2)]
    oracle, lowered = (tokens(artifact, PROMPTS[:3], GREEDY) for artifact in levels)
    assert oracle == lowered


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_cache_dtype": "int8", "target": "cuda:sm_90"}, "only CPUs have attention over a cache with a scale"),
        ({"kv_cache_dtype": "fp8", "pooling": "last"}, "not measured"),
        ({"quantization": "int8", "level": 0}, "-O0 is the oracle"),
        ({"max_kl": 0.1}, "bounds what --quantization costs"),
        ({"quantization": "int8", "max_kl": 0.1, "weights": "external"}, "measured on embedded weights"),
    ],
)
def test_settings_that_disagree(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CompileConfig(model=DEMO_MODEL, out=Path("out"), **settings)
