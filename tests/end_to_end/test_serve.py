"""`llmc serve` of the demo model, as its users start it: the answers, the processes, the ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI

from llmc import LLM, SamplingParams
from tests.end_to_end.workshop import Workshop
from tests.server.running import alive, children

MESSAGES: Any = [{"role": "user", "content": "What does textwrap.dedent do?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
HEAVY = {"transformers", "torch", "torch._dynamo", "torch._inductor", "sympy", "triton"}

# Python runs a module of this name at start; ours says at the end what was imported, in every process of the tree.
WITNESS = """
import atexit, json, os, sys
folder = os.environ["LLMC_TEST_WITNESS"]
atexit.register(lambda: open(os.path.join(folder, f"{os.getpid()}.json"), "w").write(json.dumps([sys.argv, sorted(sys.modules)])))
"""


@dataclass
class Served:
    """A running `llmc serve`. seen: folder in which each process leaves the names of its modules as it ends."""

    process: subprocess.Popen[str]
    url: str
    seen: Path

    @property
    def engine(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def artifact(workshop: Workshop) -> Path:
    import torch

    return workshop.artifact("demo", dtype=torch.bfloat16)


def start(artifact: Path, folder: Path) -> Served:
    (folder / "witness").mkdir()
    (folder / "seen").mkdir()
    (folder / "witness" / "sitecustomize.py").write_text(WITNESS)
    path = os.pathsep.join([str(folder / "witness"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "LLMC_TEST_WITNESS": str(folder / "seen"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmc", "serve", str(artifact), "--port", "0", "--max-num-batched-tokens", "256"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    found = re.search(r"llmc ready at (\S+) ", process.stdout.readline())
    assert found is not None, (folder / "log").read_text()
    return Served(process, found[1], folder / "seen")


@pytest.fixture
def served(artifact: Path, tmp_path: Path) -> Iterator[Served]:
    running = start(artifact, tmp_path)
    yield running
    running.stop()
    assert running.process.stdout is not None
    running.process.stdout.close()


def test_chat_says_what_the_engine_says_in_process(served: Served, artifact: Path) -> None:
    with LLM(artifact, threads=1) as llm:
        expected = llm.chat(MESSAGES, GREEDY)[0]
        completed = llm.generate("def fibonacci(n):", GREEDY)[0].outputs[0].text
    text = expected.outputs[0].text
    assert text.strip()
    client = served.client()
    (model,) = client.models.list().data
    whole = client.chat.completions.create(model=model.id, messages=MESSAGES, temperature=0, max_tokens=48)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == expected.outputs[0].finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert whole.usage.completion_tokens == len(expected.outputs[0].token_ids)
    stream = client.chat.completions.create(
        model=model.id, messages=MESSAGES, temperature=0, max_tokens=48, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 1
    last = chunks[-1].usage
    assert last is not None and last.prompt_tokens_details is not None
    assert (last.prompt_tokens, last.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert 0 < (last.prompt_tokens_details.cached_tokens or 0) < last.prompt_tokens  # of the first request
    plain = client.completions.create(model=model.id, prompt="def fibonacci(n):", temperature=0, max_tokens=48)
    assert plain.choices[0].text == completed


def test_no_process_imports_a_compiler_and_sigterm_ends_all_with_0(served: Served) -> None:
    served.client().chat.completions.create(model="demo_model", messages=MESSAGES, max_tokens=8)
    tree = [served.process.pid, served.engine]
    mapped = {
        pid: {line.split("/")[-1].strip() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line} for pid in tree
    }
    assert any(name.startswith("libgomp") for name in mapped[served.engine])  # the engine's list is read
    for files in mapped.values():
        assert not {name for name in files if name.startswith(("libtorch", "libc10", "libtriton"))}
    assert served.stop() == 0
    assert not alive(tree[1])
    reports = {int(path.stem): json.loads(path.read_text()) for path in served.seen.glob("*.json")}
    assert set(tree) <= set(reports)
    for argv, modules in reports.values():
        assert "llmc.errors" in modules
        assert not HEAVY & set(modules), (argv, HEAVY & set(modules))


def test_engine_killed_mid_stream(served: Served) -> None:
    """The stream ends with an error, readiness turns, a new engine takes over and answers as the old one did."""
    client = served.client()
    question: dict[str, Any] = {"model": "demo_model", "messages": MESSAGES, "temperature": 0}
    before = client.chat.completions.create(**question, max_tokens=32).choices[0].message.content
    first = served.engine
    stream = client.chat.completions.create(**question, max_tokens=1900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    os.kill(first, signal.SIGKILL)
    with pytest.raises(APIError, match="engine stopped"):
        for _ in stream:
            pass
    assert _status(served, "/health/live") == 200
    seen = set()
    deadline = time.monotonic() + 60
    while (status := _status(served, "/health/ready")) != 200:
        seen.add(status)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen == {503}
    assert served.engine != first
    assert client.chat.completions.create(**question, max_tokens=32).choices[0].message.content == before
    assert served.stop() == 0


def _status(served: Served, path: str) -> int:
    return httpx.get(served.url + path, timeout=20).status_code
