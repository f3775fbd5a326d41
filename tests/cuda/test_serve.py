"""`llmc serve` on the stand-in: the answers, what is in the processes, and what becomes of requests when a kernel fails."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.served import HEAVY, Served, command, environment
from tests.cuda.stand_in_server import KernelServer
from tests.cuda.toy_plans import KERNELS, write_toy_plans
from tests.runtime.toy_artifact import WORDS, toy_greedy
from tests.runtime.toy_program import DIM, VOCAB


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(VOCAB, DIM)).astype(np.float32) for name in ("embed", "head")}


@pytest.fixture(scope="module")
def artifact(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_plans(tmp_path_factory.mktemp("served") / "toy", weights)


def words(token_ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in token_ids)


def test_served_answers_with_neither_torch_nor_triton_in_a_process(
    artifact: Path, weights: dict[str, np.ndarray], libcuda: Path, toy_server: KernelServer, tmp_path: Path
) -> None:
    prompts = [[5, 9, 2], [7], list(range(3, 30)), [11, 12]]
    with Served(artifact, tmp_path, environment(libcuda, toy_server.path), "--num-gpu-blocks-override", "64") as served:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda p: served.complete(words(p), max_tokens=8, ignore_eos=True).json(), prompts))
        for prompt, reply in zip(prompts, replies, strict=True):
            assert reply["choices"][0]["text"].split() == words(toy_greedy(weights, prompt, 8)[0]).split()
        processes = [served.process.pid, served.engine]
        assert "libcuda.so.1" in served.mapped(processes[1]) and "libcuda.so.1" not in served.mapped(processes[0])
        for pid in processes:
            assert not {name for name in served.mapped(pid) if name.startswith(("libtorch", "libtriton", "libc10"))}
        assert served.stop() == 0
        seen = served.modules()
        assert set(processes) <= set(seen)
        for modules in seen.values():
            assert not HEAVY & modules
        assert "llmc.runtime.cuda.executor" in seen[processes[1]]


def test_a_kernel_that_fails_ends_every_open_request_and_the_engine_starts_again(
    artifact: Path, weights: dict[str, np.ndarray], libcuda: Path, toy_server: KernelServer, tmp_path: Path
) -> None:
    knobs = environment(libcuda, toy_server.path, illegal_at=20 * len(KERNELS))  # in each engine process
    with Served(artifact, tmp_path, knobs, "--num-gpu-blocks-override", "64", "--no-canary") as served:
        first = served.engine
        with ThreadPoolExecutor(3) as pool:
            replies = list(pool.map(lambda p: served.complete(words([p]), max_tokens=200, ignore_eos=True), [4, 5, 6]))
        for reply in replies:
            assert reply.status_code == 500
            assert "the engine stopped while working on this request" in reply.json()["error"]["message"]
        deadline = time.monotonic() + 60
        while served.http.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert served.engine != first
        answer = served.complete(words([8, 9]), max_tokens=4, ignore_eos=True)
        assert answer.json()["choices"][0]["text"].split() == words(toy_greedy(weights, [8, 9], 4)[0]).split()
        assert "a kernel accessed memory that it must not" in (tmp_path / "log").read_text()
        assert served.stop() == 0


@pytest.mark.parametrize(
    ("knobs", "code", "says"),
    [
        ({"init": 100}, 2, "the driver finds no GPU"),
        ({"driver": 11080}, 2, "supports CUDA 11.8, this artifact needs 12.4"),
        ({"capability": 100}, 4, "is sm_100; compile again with --target cuda:sm_100"),
        ({"memory": 8192}, 2, "MB are free on stand-in"),
        ({"illegal_at": 2}, 70, "a kernel accessed memory that it must not"),
    ],
    ids=["no-gpu", "old-driver", "other-gpu", "little-memory", "illegal-access"],
)
def test_a_machine_that_cannot_serve_says_why_and_ends(
    artifact: Path, libcuda: Path, toy_server: KernelServer, knobs: dict[str, int], code: int, says: str
) -> None:
    made = environment(libcuda, toy_server.path, **knobs)
    done = subprocess.run(
        command(artifact, "--num-gpu-blocks-override", "64"),
        env=made,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
