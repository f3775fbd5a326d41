"""Artifacts for a GPU of few bits: what they hold, what their report says, and that their canaries pass in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from llmc.artifacts.verify import open_artifact
from llmc.cli.compile import _run_canaries
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError
from tests.architectures import save_tiny_model
from tests.cuda.interpreted import Interpreter, compile_recorded
from tests.cuda.served import environment
from tests.cuda.stand_in import StandIn

SIZES = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16, "cudagraph_capture_sizes": (2,), "compile_sizes": (16,)}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_plans_over_few_bits_answer_as_their_canaries(scheme: str, libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    save_tiny_model("qwen3", tmp_path / "model", torch.float32, num_hidden_layers=1)
    sources = compile_recorded(
        tmp_path / "model", tmp_path / "out", dtype="float32", quantization=scheme, kv_cache_dtype="fp8", max_kl=0.1, **SIZES
    )
    with open_artifact(tmp_path / "out") as opened:
        manifest = opened.manifest
    quantised, cache = manifest.quantization, manifest.kv_quantization
    assert quantised is not None and cache is not None and manifest.kv.dtype == "uint8"
    assert (quantised.scheme, quantised.group, cache.scheme) == (scheme, 32 if scheme == "int4" else 0, "fp8")
    assert sorted(quantised.tensors.values()) == [4 if scheme == "int4" else 8] * 4 + [8]
    assert 0 < (quantised.mean_kl or 0) <= (cache.mean_kl or 0) * 1.2
    held = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.tensors}
    projection = "model.layers.0.self_attn.o_proj"
    assert held[f"{projection}.quantized_weight"] == (("uint8", [64, 32]) if scheme == "int4" else ("float8_e4m3fn", [64, 64]))
    assert held[f"{projection}.scales_weight"] == ("float32", [64, 2 if scheme == "int4" else 1])
    assert not any("embed_tokens.weight" in name for name in held), "the table of a tied embedding is held once"

    interpreter = Interpreter(sources)
    try:
        driver = StandIn(libcuda, tmp_path, interpreter.path)
        monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(tmp_path / "no-driver"))
        assert "not run here, but by `llmc serve` before it is ready: " in _run_canaries(tmp_path / "out").detail
        monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(driver.path))
        for name, value in environment(libcuda, interpreter.path).items():
            monkeypatch.setenv(name, value)
        checked = _run_canaries(tmp_path / "out")
        assert int(checked.detail.removesuffix(" canary tokens as the reference")) >= 3 and checked.startup_ms["canary"] > 0
    finally:
        interpreter.close()


def test_fp8_is_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only GPUs have kernels over fp8 weights, not cpu; int8 has as many bits"):
        CompileConfig(model=tmp_path, out=tmp_path / "out", quantization="fp8")


def test_a_cost_above_the_bound_fails_the_compile(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_tiny_model("qwen3", tmp_path / "model", torch.bfloat16, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"--quantization int4 with --kv-cache-dtype fp8 costs .* above --max-kl 1e-07"):
        compile_recorded(tmp_path / "model", tmp_path / "out", quantization="int4", kv_cache_dtype="fp8", max_kl=1e-7, **SIZES)
    assert not (tmp_path / "out").exists()
