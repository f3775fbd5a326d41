"""Plans that sample, compiled for a GPU: in Triton's interpreter they choose what the host would; found again in the compile cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

import llmc.compiler.cuda.sampling as sampling
from llmc import SamplingParams
from llmc.artifacts.manifest import TensorSpec
from llmc.artifacts.store import Store
from llmc.compiler.cuda.sampling import sampling_plans
from llmc.kernels.cuda_targets import cuda_target
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.messages import GenerateRequest
from tests.architectures import save_tiny_model
from tests.cuda.interpreted import Interpreter, compile_recorded
from tests.cuda.stand_in import StandIn

SIZES = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16, "cudagraph_capture_sizes": (2,), "compile_sizes": (16,)}
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "top_k": 5, "top_p": 0.9, "seed": 4},
    {"temperature": 0.9, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}, "min_tokens": 3, "logprobs": 2, "seed": 5},
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Interpreter]]:
    folder = tmp_path_factory.mktemp("sampled")
    save_tiny_model("llama", folder / "model", torch.float32, num_hidden_layers=1)
    sources = compile_recorded(folder / "model", folder / "out", sampling_kinds=sampling.KINDS, **SIZES)
    interpreter = Interpreter(sources)
    yield folder / "out", interpreter
    interpreter.close()


@pytest.mark.slow
def test_a_compiled_models_tokens_are_those_of_its_logits(
    compiled: tuple[Path, Interpreter], libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, interpreter = compiled
    said = []
    for on_device in (True, False):
        driver = StandIn(libcuda, tmp_path, interpreter.path)
        driver.set(order=3)
        monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(driver.path))
        engine = Engine(EngineConfig(artifact=str(artifact), num_blocks=32, threads=1, canary=False))
        if not on_device:
            monkeypatch.setattr(engine._executor, "start", lambda *_: False)
        tokens: dict[str, list[int]] = {}
        for number, setting in enumerate(SETTINGS):
            engine.add(
                GenerateRequest(
                    request_id=str(number),
                    prompt_token_ids=[7, 9 + number, 11],
                    sampling=SamplingParams(max_tokens=5, ignore_eos=True, **setting),  # type: ignore[arg-type]
                )
            )
        while engine.has_work():
            for event in engine.step():
                assert event.error is None, event.error
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
        stats = engine.stats()
        assert (stats.steps_sampled_on_host == 0, stats.steps_sampled_on_device > 0, stats.steps_ahead > 0) == (on_device,) * 3
        said.append(tokens)
        engine.close()
    assert said[0] == said[1] and all(len(tokens) == 5 for tokens in said[0].values())


def test_models_of_one_vocabulary_share_them_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "KINDS", ("check",))
    (tmp_path / "cache").mkdir(mode=0o700)
    store, logits, target = (
        Store(tmp_path / "cache"),
        TensorSpec(name="logits", dtype="bfloat16", shape=["N", 5000]),
        cuda_target("cuda:sm_90"),
    )
    (tmp_path / "a").mkdir()
    first = sampling_plans([4, 1, 4], logits, target, tmp_path / "a", store=store)
    assert [(record.kind, record.num_logits) for record in first.records] == [("check", 1), ("check", 4)]
    monkeypatch.setattr(sampling, "compile_sampling", lambda *_: pytest.fail("it was compiled again"))
    (tmp_path / "b").mkdir()
    again = sampling_plans([1, 4], logits, target, tmp_path / "b", store=store)
    assert (again.records, again.plans, again.images) == (first.records, first.plans, first.images)
    wide = TensorSpec(name="logits", dtype="bfloat16", shape=["N", sampling.MAX_VOCAB + 1])
    (tmp_path / "c").mkdir()
    monkeypatch.undo()
    assert sampling_plans([4], wide, target, tmp_path / "c", store=None).records == []
