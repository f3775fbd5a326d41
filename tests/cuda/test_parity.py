"""Plans through the whole runtime answer as Hugging Face does, in fp32: on the stand-in, their kernels in Triton's interpreter.

Prompts run together through the scheduler, over the paged cache: the step's budget cuts them into chunks, and while one is read others
decode. Graphs run in a random order that their edges allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from tests.cuda.interpreted import Interpreter, compile_recorded
from tests.cuda.parity import ARCHITECTURES, SIZES, assert_answers, clear_cut, save_model
from tests.cuda.served import HEAVY, Served, environment
from tests.cuda.stand_in import StandIn
from tests.end_to_end.served import Continuation

QUICK = ("qwen3",)


@dataclass(frozen=True)
class Work:
    """An artifact, the process that runs its kernels, and what it is expected to say."""

    artifact: Path
    interpreter: Interpreter
    prompts: list[list[int]]
    expected: list[Continuation]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Work]]:
    """Makes each model's once."""
    made: dict[str, Work] = {}

    def make(name: str) -> Work:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            prompts, expected = clear_cut(save_model(name, folder / "model", torch.float32))
            sources = compile_recorded(folder / "model", folder / "out", dtype="float32", **SIZES)
            made[name] = Work(folder / "out", Interpreter(sources), prompts, expected)
        return made[name]

    yield make
    for one in made.values():
        one.interpreter.close()


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES])
def test_plans_answer_as_hugging_face(
    name: str, work: Callable[[str], Work], libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work(name)
    driver = StandIn(libcuda, tmp_path, made.interpreter.path)
    driver.set(order=5)
    monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(driver.path))
    assert_answers(made.artifact, made.prompts, made.expected)
    assert (driver.get("live"), driver.get("graphs"), driver.get("modules")) == (0, 0, 0)


def test_a_served_model_says_what_hugging_face_says(work: Callable[[str], Work], libcuda: Path, tmp_path: Path) -> None:
    made = work("qwen3")
    known = environment(libcuda, made.interpreter.path, order=7)
    prompts = made.prompts[:2]  # each step takes the interpreter seconds; the other test has the long ones
    with Served(made.artifact, tmp_path, known, "--num-gpu-blocks-override", "40", "--no-canary") as served:
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = {"max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
            replies = list(pool.map(lambda prompt: served.complete(prompt, **asked).json(), prompts))
        assert [reply["choices"][0]["token_ids"] for reply in replies] == [want.tokens[:3] for want in made.expected[:2]]
        engine = served.engine
        assert served.stop() == 0
        assert not HEAVY & served.modules()[engine]
