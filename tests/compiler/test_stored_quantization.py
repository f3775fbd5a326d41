"""Checkpoints of GPTQ, AWQ and compressed-tensors: the values they stand for, the integers as they are, and what is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc import LLM, SamplingParams
from llmc.artifacts.recipes import evaluate
from llmc.artifacts.safetensors import Checkpoint
from llmc.artifacts.verify import open_artifact
from llmc.compiler.capture import capture
from llmc.compiler.driver import compile_model
from llmc.compiler.model import read_model
from llmc.compiler.packing import fetcher, to_torch
from llmc.compiler.pipeline import STORED, pipeline
from llmc.compiler.stored_quantization import read_stored
from llmc.config.compile import CompileConfig
from llmc.errors import ArtifactError, ConfigError, UnsupportedModel
from llmc.kernels.plain_quantized_linear.reference import dequantize_plain
from llmc.kernels.quantized_linear.reference import dequantize
from llmc.passes.base import PassContext
from llmc.passes.runner import run_passes
from tests.stored_checkpoints import Scheme, save_stored

SCHEMES = {
    "gptq": Scheme(form="gptq"),
    "gptq zeros": Scheme(form="gptq", symmetric=False),
    "gptq_v2 zeros, 64": Scheme(form="gptq_v2", symmetric=False, group=64),
    "gptq 8 bits, rows": Scheme(form="gptq", bits=8, group=None),
    "awq": Scheme(form="awq", symmetric=False),
    "packed": Scheme(form="packed"),
    "packed zeros": Scheme(form="packed", symmetric=False, group=64),
    "packed 8 bits, rows": Scheme(form="packed", bits=8, group=None),
    "int8 rows": Scheme(form="int8", bits=8, group=None),
    "int8 groups": Scheme(form="int8", bits=8, group=32),
}
FP8 = {"rows": Scheme(form="fp8", bits=8, group=None), "whole": Scheme(form="fp8 tensor", bits=8, group=None)}


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, id=n, marks=[pytest.mark.slow] * (n in ("gptq", "packed", "int8 rows"))) for n, s in SCHEMES.items()]
)
def test_values_and_kept_integers(scheme: Scheme, tmp_path: Path) -> None:
    """Every constant is the one of the dequantised checkpoint, and what the artifact holds stands for exactly that."""
    plain, quantized = save_stored("llama", tmp_path, scheme)
    source = read_model(quantized)
    assert source.stored is not None and source.dtype == "float16"
    traced, wanted = capture(source, max_model_len=64), capture(read_model(plain), max_model_len=64)
    with Checkpoint([quantized / "model.safetensors"]) as checkpoint, Checkpoint([plain / "model.safetensors"]) as other:
        ours, theirs = fetcher(traced.constants, checkpoint), fetcher(wanted.constants, other)
        for name in wanted.constants:
            assert torch.equal(ours(name), theirs(name)), name
        weights = traced.weight_table()
        reports = run_passes(traced.graph, pipeline(2, STORED), PassContext(weights=weights, max_positions=64))
        assert reports[-1].applied.name == "keep-quantized" and reports[-1].result.matches == 3 * 4  # qkv, o, gate_up, down
        assert reports[-1].result.refusals == {"the checkpoint holds it unquantised": 1}  # the head
        held = [name for name in weights if "quantized_" in name]
        assert {weights[name].dtype for name in held} == {torch.uint8 if scheme.bits == 4 and scheme.symmetric else torch.int8}
        for name in held:
            recipe = weights[name].recipe
            scales = weights[name.replace("quantized_", "scales_")]
            quants = to_torch(evaluate(recipe, checkpoint.fetch, checkpoint.specs()), weights[name].dtype)
            factors = to_torch(evaluate(scales.recipe, checkpoint.fetch, checkpoint.specs()), scales.dtype)
            matrix = to_torch(evaluate(recipe["input"], checkpoint.fetch, checkpoint.specs()), torch.float16)
            assert torch.equal(dequantize(quants, factors, *matrix.shape, recipe["group"]), matrix), name


@pytest.mark.parametrize("scheme", [pytest.param(s, id=n) for n, s in FP8.items()])
def test_fp8_is_kept_for_a_gpu(scheme: Scheme, tmp_path: Path) -> None:
    """Every constant is the one of the dequantised checkpoint; what a GPU's artifact holds is the checkpoint's fp8, a CPU's is not."""
    plain, quantized = save_stored("llama", tmp_path, scheme)
    traced, wanted = capture(read_model(quantized), max_model_len=64), capture(read_model(plain), max_model_len=64)
    with Checkpoint([quantized / "model.safetensors"]) as checkpoint, Checkpoint([plain / "model.safetensors"]) as other:
        ours, theirs = fetcher(traced.constants, checkpoint), fetcher(wanted.constants, other)
        for name in wanted.constants:
            assert torch.equal(ours(name), theirs(name)), name
        again = capture(read_model(quantized), max_model_len=64)
        context = PassContext(weights=again.weight_table(), max_positions=64)
        for_cpu = run_passes(again.graph, pipeline(2, STORED), context)[-1].result
        assert not for_cpu.changed and for_cpu.refusals["the checkpoint holds it as fp8, which no kernel of a CPU reads"] == 12
        weights = traced.weight_table()
        report = run_passes(traced.graph, pipeline(2, STORED, kind="cuda"), PassContext(weights=weights, max_positions=64))[-1]
        assert report.applied.name == "keep-plain-fp8" and report.result.matches == 3 * 4
        assert report.result.refusals == {"the checkpoint does not hold it as fp8": 1}  # the head
        held = [name for name in weights if "quantized_" in name]
        assert len(held) == 12 and {weights[name].dtype for name in held} == {torch.float8_e4m3fn}
        for name in held:
            recipe, scales = weights[name].recipe, weights[name.replace("quantized_", "scales_")]
            codes = to_torch(evaluate(recipe, checkpoint.fetch, checkpoint.specs()), torch.float8_e4m3fn)
            factors = to_torch(evaluate(scales.recipe, checkpoint.fetch, checkpoint.specs()), scales.dtype)
            matrix = to_torch(evaluate(recipe["input"], checkpoint.fetch, checkpoint.specs()), torch.float16)
            assert torch.equal(dequantize_plain(codes, factors, matrix.shape[1], matrix.shape[1]), matrix), name


def test_a_damaged_fp8_checkpoint(tmp_path: Path) -> None:
    _, quantized = save_stored("llama", tmp_path, FP8["rows"])
    file = quantized / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    broken = tensors[name].view(torch.uint8).clone()
    broken[0, 0] = 0x7F
    save_file({**tensors, name: broken.view(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    traced = capture(read_model(quantized), max_model_len=64)
    with Checkpoint([file]) as checkpoint, pytest.raises(ArtifactError, match="holds a NaN; the checkpoint is damaged"):
        fetcher(traced.constants, checkpoint)(next(n for n in traced.constants if n.endswith("layers.0.mlp.down_proj.weight")))
    scale = name + "_scale"
    save_file({**tensors, scale: tensors[scale][:7].contiguous()}, file, metadata={"format": "pt"})
    traced = capture(read_model(quantized), max_model_len=64)
    with Checkpoint([file]) as checkpoint, pytest.raises(ArtifactError, match="do not belong together"):
        fetcher(traced.constants, checkpoint)(next(n for n in traced.constants if n.endswith("layers.0.mlp.down_proj.weight")))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gptq", "float32"),
        pytest.param("gptq", "auto", marks=pytest.mark.slow),
        *(pytest.param(n, d, marks=pytest.mark.slow) for n in ("awq", "packed zeros") for d in ("float32", "auto")),
    ],
)
def test_answers_are_those_of_the_dequantised_checkpoint(name: str, dtype: str, tmp_path: Path) -> None:
    """Compiled and served. In fp32 only the order of sums differs, so the tokens are equal; in fp16 roundings fall elsewhere."""
    answers = []
    for folder in save_stored("qwen3", tmp_path, dataclasses.replace(SCHEMES[name], exact=True)):
        out = tmp_path / f"{folder.name}-artifact"
        compile_model(CompileConfig(model=folder, out=out, dtype=dtype))
        with LLM(out, threads=1, max_num_seqs=4, num_blocks=64) as llm:
            prompts = [[5, 9, 300, 44, 8], [7] * 20, list(range(40, 64))]
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, prompt_logprobs=0)
            answers.append(
                [
                    (o.outputs[0].token_ids, [next(iter(row.values())).logprob for row in o.prompt_logprobs or [] if row])
                    for o in llm.generate(prompts, params)
                ]
            )
    assert [len(rows) for _, rows in answers[0]] == [4, 19, 23]
    # a logit of fp16 has a step of 1/512 at 2
    tolerance = 1e-4 if dtype == "float32" else 4e-3
    for (tokens, quantised), (wanted, plain) in zip(*answers, strict=True):
        assert dtype != "float32" or tokens == wanted
        assert quantised == pytest.approx(plain, abs=tolerance)
    with open_artifact(out) as opened:
        held = [t for t in opened.manifest.tensors if "quantized_" in t.name]
    assert len(held) == 12


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def compressed(weights: dict[str, Any] | None = None, scheme: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": CT_WEIGHTS | (weights or {}), **(scheme or {})}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}, **top}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'.*it reads gptq, awq, compressed-tensors"),
        ({**GPTQ, "desc_act": True}, "act-order"),
        ({**GPTQ, "bits": 3}, "3 bits"),
        ({**GPTQ, "bits": 8, "sym": False}, "needs 9 bits"),
        ({**GPTQ, "group_size": 16}, "groups of 16"),
        ({**GPTQ, "group_size": "all"}, "group size is 'all'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**GPTQ, "dynamic": {"-:lm_head": {}}}, "per module"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, "8 bits"),
        (compressed({"actorder": "group"}), "act-order"),
        (compressed({"strategy": "block"}), "'block'"),
        (compressed({"type": "float"}), "of 'float'"),
        (compressed({"type": "float", "num_bits": 8, "strategy": "block"}, format="float-quantized"), "reads channel and tensor of fp8"),
        (compressed({"type": "float", "strategy": "channel"}, format="float-quantized"), "to 4 bits, one to a byte"),
        (compressed(format="float-quantized"), "'float-quantized'"),
        (compressed(scheme={"input_activations": {"num_bits": 8}}), "activations included"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv-cache-dtype"),
        (compressed(config_groups={}), "one config group"),
    ],
)
def test_refusals(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        read_stored({"quantization_config": config}, "config.json")
    assert read_stored({}, "config.json") is None


def test_what_only_the_tensors_say(tmp_path: Path) -> None:
    _, quantized = save_stored("llama", tmp_path, SCHEMES["gptq zeros"])
    with pytest.raises(UnsupportedModel, match="cannot hold it exactly; compile with --dtype float16"):
        capture(read_model(quantized, dtype="bfloat16"), max_model_len=64)
    with pytest.raises(ConfigError, match="quantised already, by gptq"):
        compile_model(CompileConfig(model=quantized, out=tmp_path / "out", quantization="int8"))
    config = quantized / "config.json"
    config.write_text(config.read_text().replace('"sym": false', '"sym": true'))
    traced = capture(read_model(quantized), max_model_len=64)
    with Checkpoint([quantized / "model.safetensors"]) as checkpoint:
        fetch = fetcher(traced.constants, checkpoint)
        with pytest.raises(ArtifactError, match="said to be symmetric"):
            fetch(next(name for name in traced.constants if name.endswith("layers.0.mlp.down_proj.weight")))
    config.write_text(config.read_text().replace('"group_size": 32', '"group_size": 64'))
    traced = capture(read_model(quantized), max_model_len=64)
    with Checkpoint([quantized / "model.safetensors"]) as checkpoint, pytest.raises(ArtifactError, match="do not belong together"):
        fetcher(traced.constants, checkpoint)(next(name for name in traced.constants if name.endswith("layers.0.mlp.down_proj.weight")))
