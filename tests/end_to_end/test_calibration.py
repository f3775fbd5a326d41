"""Integers fitted to a text, from the flag to the token: they cost less than rounding to nearest, and the artifact says both."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llmc import LLM, SamplingParams
from llmc.artifacts.verify import open_artifact
from llmc.compiler.driver import compile_model
from llmc.compiler.fitting_text import TEXT
from llmc.config.compile import CompileConfig
from tests.end_to_end.workshop import Workshop

needs_library = pytest.mark.skipif(find_spec("auto_round") is None, reason='auto-round is not installed: pip install "llmc[calibrate]"')
METHODS = ["awq", pytest.param("signround", marks=pytest.mark.slow)]


@needs_library
@pytest.mark.parametrize("method", METHODS)
def test_fitting_costs_less_than_rounding(workshop: Workshop, method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"text": part}) for part in TEXT[:3000].split("\n\n")))
    artifact = workshop.artifact("demo", dtype=torch.bfloat16, quantization="int4", calibration=method, calibration_data=text)
    rounded = workshop.artifact("demo", dtype=torch.bfloat16, quantization="int4")
    with open_artifact(artifact) as opened, open_artifact(rounded) as other:
        facts, plain = opened.manifest.quantization, other.manifest.quantization
    assert facts is not None and facts.mean_kl is not None and plain is not None and plain.calibration is None
    fit = facts.calibration
    assert fit is not None and (fit.method, fit.tokens % 128, len(fit.text)) == (method, 0, 64) and fit.library.startswith("auto-round 0.")
    assert (fit.rounded_mean_kl, fit.rounded_perplexity) == (plain.mean_kl, plain.perplexity)
    assert 0 < facts.mean_kl < fit.rounded_mean_kl
    assert facts.tensors == plain.tensors  # as many bits, in the same places
    report = json.loads((artifact / "report" / "report.json").read_text())["quantization"]
    assert report["calibration"]["rounded_mean_kl"] == fit.rounded_mean_kl
    assert f"{method} by {fit.library}" in (artifact / "report" / "report.html").read_text()
    with LLM(artifact, threads=1, max_num_seqs=2, num_blocks=64) as llm:  # which compares the canaries
        [answer] = llm.generate("def main():", SamplingParams(temperature=0.0, max_tokens=8))
    assert answer.outputs[0].token_ids


@needs_library
@pytest.mark.slow
def test_the_same_seed_gives_the_same_integers(workshop: Workshop, tmp_path: Path) -> None:
    hashes = []
    for number in range(2):
        config = CompileConfig(
            model=workshop.folder("demo"), out=tmp_path / f"{number}", quantization="int4", calibration="signround", use_cache=False
        )
        compile_model(config, store=workshop.store)
        with open_artifact(config.out) as opened:
            hashes.append([file.chunks for file in opened.manifest.weights])
    assert hashes[0] == hashes[1]
