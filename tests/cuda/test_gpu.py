"""On a real GPU: plans answer as Hugging Face does, and what goes wrong is one sentence and the right exit code."""

from __future__ import annotations

import copy
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from llmc import SamplingParams
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig
from llmc.passes.tolerances import LOGITS
from tests import gpu
from tests.cuda.parity import ARCHITECTURES, NEW_TOKENS, SIZES, assert_answers, clear_cut, save_model
from tests.cuda.planted import astray_kernel
from tests.cuda.served import HEAVY, Served, command
from tests.end_to_end import test_bfloat16
from tests.end_to_end.served import Recorder, generate

pytestmark = pytest.mark.gpu
ONE_PLAN = {**SIZES, "cudagraph_capture_sizes": (4,)}


@pytest.fixture(scope="module", autouse=True)
def target() -> str:
    return gpu.target()


def compiled(model: Path, out: Path, target: str, dtype: str, **sizes: object) -> Path:
    compile_model(CompileConfig(model=model, out=out, target=target, dtype=dtype, **sizes), store=None)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp32_plans_answer_as_hugging_face(name: str, target: str, tmp_path: Path) -> None:
    prompts, expected = clear_cut(save_model(name, tmp_path / "model", torch.float32))
    assert_answers(compiled(tmp_path / "model", tmp_path / "out", target, "float32", **SIZES), prompts, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_plans_are_as_near_to_fp32_as_hugging_face(name: str, target: str, tmp_path: Path) -> None:
    """As tests/end_to_end/test_bfloat16.py asks it of a CPU: here matrix instructions run, which fp32 has none of."""
    narrow = save_model(name, tmp_path / "model", torch.bfloat16)
    wide, forced = copy.deepcopy(narrow).float(), test_bfloat16.FORCED
    sequences = [test_bfloat16.clear_cut(wide, length + forced, seed) for seed, length in enumerate(test_bfloat16.PROMPT_LENGTHS)]
    artifact = compiled(tmp_path / "model", tmp_path / "out", target, "bfloat16", **SIZES)
    recorder = Recorder(forced={f"{row}.0": sequence[-forced:] for row, sequence in enumerate(sequences)})
    params = SamplingParams(temperature=0.0, max_tokens=forced, ignore_eos=True, logprobs=1)
    prompts = [sequence[:-forced] for sequence in sequences]
    generate(artifact, prompts, params, recorder=recorder, max_num_seqs=4, max_num_batched_tokens=16, num_blocks=40)
    ours = torch.from_numpy(np.concatenate([np.stack(recorder.logits[f"{row}.0"]) for row in range(len(prompts))]))

    def logits(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([one])).logits[0, -forced - 1 : -1].float() for one in sequences])

    right, theirs, allowed = logits(wide), logits(narrow), LOGITS[torch.bfloat16]
    assert float((ours - right).square().mean().sqrt()) <= allowed.rms * float((theirs - right).square().mean().sqrt())
    assert float((ours - right).abs().max()) <= allowed.largest * float((theirs - right).abs().max())


def test_a_served_model_says_what_hugging_face_says(target: str, tmp_path: Path) -> None:
    prompts, expected = clear_cut(save_model("qwen3", tmp_path / "model", torch.float32))
    artifact = compiled(tmp_path / "model", tmp_path / "out", target, "float32", **SIZES)
    with Served(artifact, tmp_path, dict(os.environ)) as served:
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
            replies = list(pool.map(lambda prompt: served.complete(prompt, **asked).json(), prompts))
        assert [reply["choices"][0]["token_ids"] for reply in replies] == [want.tokens for want in expected]
        engine = served.engine
        assert served.stop() == 0
        assert not HEAVY & served.modules()[engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "model"
    save_model("qwen3", folder, torch.bfloat16)
    return folder


def refused(artifact: Path, *flags: str) -> tuple[int, str]:
    done = subprocess.run(command(artifact, *flags), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def test_more_cache_than_there_is_memory_is_refused(model: Path, target: str, tmp_path: Path) -> None:
    artifact = compiled(model, tmp_path / "out", target, "bfloat16", **ONE_PLAN)
    code, said = refused(artifact, "--num-gpu-blocks-override", str(10**9))
    assert code == 2 and "MB of GPU memory are needed" in said and "MB are free on" in said


def test_an_artifact_for_another_gpu_is_refused(model: Path, target: str, tmp_path: Path) -> None:
    other = "cuda:sm_80" if target != "cuda:sm_80" else "cuda:sm_90"
    code, said = refused(compiled(model, tmp_path / "out", other, "bfloat16", **ONE_PLAN))
    assert code == 4 and f"compile again with --target {target}" in said


@pytest.fixture
def astray(model: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact whose norms store where no memory is."""
    monkeypatch.setattr("llmc.kernels.rms_norm.triton_impl.rms_norm_kernel", astray_kernel)
    return compiled(model, tmp_path / "out", target, "bfloat16", **ONE_PLAN)


def test_a_kernel_that_goes_astray_ends_the_start(astray: Path) -> None:
    code, said = refused(astray)
    assert code == 70 and "a kernel accessed memory that it must not" in said


def test_a_kernel_that_goes_astray_ends_every_open_request(astray: Path, tmp_path: Path) -> None:
    with Served(astray, tmp_path, dict(os.environ), "--no-canary") as served:
        first = served.engine
        with ThreadPoolExecutor(3) as pool:
            replies = list(pool.map(lambda token: served.complete([token], max_tokens=20, ignore_eos=True), [4, 5, 6]))
        for reply in replies:
            assert reply.status_code == 500
            assert "the engine stopped while working on this request" in reply.json()["error"]["message"]
        deadline = time.monotonic() + 60
        while served.http.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert served.engine != first
        assert "a kernel accessed memory that it must not" in (tmp_path / "log").read_text()
        assert served.stop() == 0
