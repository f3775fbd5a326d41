"""AOTInductor images through ctypes: the toy program end to end, its errors, and a process without Python's torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest

from llmc.errors import ArtifactError, ConfigError, DeviceLost, InternalError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.executors.aoti import AotiExecutor
from llmc.runtime.executors.images import load_image
from llmc.runtime.executors.libtorch import load_libtorch
from llmc.runtime.messages import SamplingParams
from llmc.runtime.step import ScheduledSequence
from llmc.runtime.weights import Weights, WeightView
from tests.runtime.recall_executor import request, run_all, tokens_of
from tests.runtime.toy_artifact import toy_entry, toy_greedy, toy_kv, toy_logits, write_toy_artifact
from tests.runtime.toy_program import VOCAB


@pytest.fixture(scope="module")
def artifact_folder(toy_folder, toy_weights) -> Path:
    return write_toy_artifact(toy_folder / "artifact", toy_folder / "toy.so", toy_weights)


def _weights(arrays: dict[str, np.ndarray]) -> Weights:
    views = {name: WeightView(dtype="float32", array=array) for name, array in arrays.items()}
    return Weights(views=views, num_bytes=0, num_bytes_hashed=0, stage_ms={})


def _executor(toy_folder: Path, weights: dict[str, np.ndarray], **entry: object) -> AotiExecutor:
    libtorch = load_libtorch()
    fd = os.open(toy_folder / "toy.so", os.O_RDONLY)
    image = load_image(fd, sha256="toy", role="model", shared=False)
    os.close(fd)
    return AotiExecutor(entry=toy_entry(**entry), kv=toy_kv(), image=image, tensors=libtorch, weights=_weights(weights), num_threads=1)


def _builder() -> BatchBuilder:
    return BatchBuilder(block_size=16, num_groups=1, vocab_size=VOCAB, max_num_batched_tokens=64, max_num_seqs=8, max_model_len=64)


def _share(name: str, token_ids: list[int], start: int, end: int, blocks: list[int]) -> ScheduledSequence:
    return ScheduledSequence(
        request_id=name,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        start=start,
        end=end,
        block_ids=(blocks,),
        sampling=SamplingParams(),
        needs_prompt_logprobs=False,
    )


def test_steps_give_the_programs_logits(toy_folder, toy_weights):
    executor, builder = _executor(toy_folder, toy_weights), _builder()
    executor.allocate_kv(8)
    one, two = [3, 4, 5, 9, 10], list(range(20))
    for _ in range(2):  # the second round meets cached handles
        batch = builder.build([_share("1", one, 0, 4, [5]), _share("2", two, 0, 20, [2, 7])]).batch
        logits = executor.run(batch).to_float32()
        assert logits.shape == (1, VOCAB)  # the first sequence goes on
        np.testing.assert_allclose(logits[0], toy_logits(toy_weights, two), rtol=1e-4, atol=1e-4)
        logits = executor.run(builder.build([_share("1", one, 4, 5, [5])]).batch).to_float32()  # reads what the step before wrote
        np.testing.assert_allclose(logits[0], toy_logits(toy_weights, one), rtol=1e-4, atol=1e-4)
    executor.close()
    executor.close()


def test_weights_are_used_in_place(toy_folder, toy_weights):
    arrays = {name: array.copy() for name, array in toy_weights.items()}
    executor, builder = _executor(toy_folder, arrays), _builder()
    executor.allocate_kv(4)
    arrays["head"][:] = 0.0
    assert not executor.run(builder.build([_share("1", [3, 4], 0, 2, [1])]).batch).to_float32().any()
    executor.close()


def test_a_failing_program_says_why_and_goes_on(toy_folder, toy_weights, capfd):
    executor, builder = _executor(toy_folder, toy_weights), _builder()
    executor.allocate_kv(4)
    batch = builder.build([_share("1", [3, 4], 1, 2, [1])]).batch
    batch.input_ids[0] = 10_000
    with pytest.raises(InternalError, match="failed in a step of 1 tokens: index out of bounds"):
        executor.run(batch)
    batch.input_ids[0] = 4
    assert np.isfinite(executor.run(batch).to_float32()).all()
    executor.close()


def test_inputs_of_another_kind_are_refused(toy_folder, toy_weights):
    executor, builder = _executor(toy_folder, toy_weights), _builder()
    executor.allocate_kv(4)
    batch = builder.build([_share("1", [3, 4], 0, 2, [1])]).batch
    import dataclasses

    with pytest.raises(InternalError, match="seq_lens is int64"):
        executor.run(dataclasses.replace(batch, seq_lens=batch.seq_lens.astype(np.int64)))
    with pytest.raises(InternalError, match="input_ids is int64, contiguous: False"):
        executor.run(dataclasses.replace(batch, input_ids=np.zeros(4, dtype=np.int64)[::2]))
    executor.close()


@pytest.mark.parametrize(
    ("entry", "weights", "message"),
    [
        ({"constants": {"embed": "embed"}}, {}, "no weight is bound to the program's constant 'head'"),
        ({}, {"head": np.zeros((3, 16), dtype=np.float32)}, "192 bytes where the program expects 2048"),
        ({"inputs": toy_entry().inputs[:-1]}, {}, "takes 9 inputs, the manifest names 8"),
        (
            {"inputs": [msgspec.structs.replace(toy_entry().inputs[0], name="embeds"), *toy_entry().inputs[1:]]},
            {},
            "no input named 'embeds'",
        ),
        ({"outputs": []}, {}, "0 outputs where the logits alone are expected"),
    ],
)
def test_a_manifest_that_disagrees_with_the_image(toy_folder, toy_weights, entry, weights, message):
    with pytest.raises(ArtifactError, match=message):
        _executor(toy_folder, {**toy_weights, **weights}, **entry)


def test_what_is_no_image(tmp_path):
    path = tmp_path / "junk.so"
    path.write_bytes(b"not an image")
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(ArtifactError, match="model image junk cannot be loaded"):
        load_image(fd, sha256="junk", role="model", shared=False)
    os.close(fd)


def test_two_artifacts_kernels_cannot_share_a_process():
    from llmc.runtime.executors import images

    before = dict(images._global_roles)
    images._global_roles["kernels"] = "a" * 64
    try:
        with pytest.raises(ConfigError, match="one process per artifact"):
            load_image(0, sha256="b" * 64, role="kernels", shared=True)
    finally:
        images._global_roles.clear()
        images._global_roles.update(before)


def test_a_library_of_the_compilers_that_is_missing_is_named(tmp_path):
    for name, source in (
        ("libgomp", "int gomp_part(void) { return 1; }"),
        ("image", "int gomp_part(void); int f(void) { return gomp_part(); }"),
    ):
        (tmp_path / f"{name}.c").write_text(source)
    compiled = ["gcc", "-shared", "-fPIC"]
    subprocess.run([*compiled, "-Wl,-soname,libgomp.so.99", "libgomp.c", "-o", "libgomp.so.99"], cwd=tmp_path, check=True)
    subprocess.run([*compiled, "image.c", "./libgomp.so.99", "-o", "image.so"], cwd=tmp_path, check=True)
    fd = os.open(tmp_path / "image.so", os.O_RDONLY)
    with pytest.raises(ConfigError, match=r"needs libgomp\.so\.99, a library of the C\+\+ compiler's.*apt-get install libgomp1"):
        load_image(fd, sha256="no libgomp", role="model", shared=False)
    os.close(fd)


def test_a_tensor_runtime_is_bound_in_one_way(monkeypatch):
    from llmc.runtime.executors import images

    monkeypatch.setattr(images, "_by_hash", {("c" * 64, False, True): None})
    monkeypatch.setattr(images, "_global_roles", {"tensor_runtime": "c" * 64})
    with pytest.raises(ConfigError, match="bound in another way"):
        load_image(0, sha256="c" * 64, role="tensor_runtime", shared=False)
    with pytest.raises(ConfigError, match="one process per artifact"):
        load_image(0, sha256="d" * 64, role="tensor_runtime", shared=False, own_first=True)


STRANGER = """
import ctypes, os, sys
from llmc.errors import ConfigError
from llmc.runtime.executors.images import load_image
ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW | os.RTLD_GLOBAL)  # somebody else's kernels, loaded before ours
try:
    load_image(os.open(sys.argv[2], os.O_RDONLY), sha256="0" * 64, role="kernels", shared=True)
except ConfigError as error:
    print(error)
"""


def test_kernels_that_others_loaded_are_never_called(tmp_path):
    for name, answer in (("stranger", 1), ("ours", 2)):
        (tmp_path / f"{name}.c").write_text(f"int llmc_paged_attention(void *arguments) {{ return {answer}; }}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / f"{name}.so"), str(tmp_path / f"{name}.c")], check=True)
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "stranger.so"), str(tmp_path / "ours.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "already holds another library with llmc's kernels functions" in done.stdout


def test_engine_over_the_artifact(artifact_folder, toy_weights):
    engine = Engine(EngineConfig(artifact=str(artifact_folder), threads=1, num_blocks=40, max_num_seqs=2))
    assert {"verify", "load", "load.code", "load.weights", "bind", "kv", "canary"} <= set(engine.ready.startup_ms)
    wanted = {"a": ([3, 4, 5], 30), "b": (list(range(2, 22)), 9), "c": ([17], 12)}  # c takes the place that b leaves
    events = run_all(
        engine, [request(name, prompt, temperature=0.0, max_tokens=count, ignore_eos=True) for name, (prompt, count) in wanted.items()]
    )
    for name, (prompt, count) in wanted.items():
        assert tokens_of(events[name]) == toy_greedy(toy_weights, prompt, count)[0]
    engine.close()


def test_answers_from_mapped_weights_while_they_move(artifact_folder, toy_weights, monkeypatch):
    monkeypatch.setattr("llmc.runtime.load.EARLY_BYTES", 0)
    begun = []
    monkeypatch.setattr("llmc.runtime.weight_mover.WeightMover.start", lambda mover, head_start_s: begun.append(mover))
    engine = Engine(EngineConfig(artifact=str(artifact_folder), threads=1, num_blocks=40, early_start=True))
    (mover,) = begun

    def answers() -> list[int]:
        return tokens_of(run_all(engine, [request("a", [3, 4, 5], temperature=0.0, max_tokens=9, ignore_eos=True)])["a"])

    expected = toy_greedy(toy_weights, [3, 4, 5], 9)[0]
    assert mover.pending_bytes > 0 and answers() == expected
    mover._run(0.0)
    assert mover.pending_bytes == 0 and answers() == expected
    mover._fault = ValueError("changed on disk")
    with pytest.raises(DeviceLost, match="the weights could not move into memory: changed on disk"):
        answers()
    engine.close()


def test_a_wrong_canary_stops_the_start(toy_folder, toy_weights, tmp_path):
    folder = write_toy_artifact(tmp_path / "artifact", toy_folder / "toy.so", toy_weights, wrong_canary=True)
    with pytest.raises(ArtifactError, match="canary 0: token 2 is"):
        Engine(EngineConfig(artifact=str(folder), threads=1, num_blocks=40))
    Engine(EngineConfig(artifact=str(folder), threads=1, num_blocks=40, canary=False)).close()


def test_the_engine_needs_no_python_torch(artifact_folder):
    """In a fresh process: the in-process API runs, and neither torch nor anything heavy was imported."""
    script = """
        import json, sys
        import llmc
        assert not {"numpy", "msgspec", "torch"} & set(sys.modules), "import llmc must import nothing"
        with llmc.LLM(sys.argv[1], threads=1, num_blocks=40) as llm:
            output = llm.generate([[3, 4, 5]], llmc.SamplingParams(temperature=0.0, max_tokens=4, detokenize=False))[0].outputs[0]
        heavy = ("torch", "transformers", "sympy", "triton", "pydantic", "fastapi", "jinja2")
        print(json.dumps([output.token_ids, sorted(name for name in sys.modules if name.split(".")[0] in heavy)]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(artifact_folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, heavy = json.loads(done.stdout)
    assert len(tokens) == 4 and heavy == []
