"""`llmc serve --enable-lora`: adapters as models of the API, loaded at the start and while it runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from torch import nn

from tests.end_to_end.served import continuation
from tests.end_to_end.workshop import Workshop
from tests.lora_adapters import draw, merged, write_adapter
from tests.server.running import assert_error

PROMPT, COUNT = [5, 60, 17, 33, 8], 10


@pytest.fixture(scope="module")
def models(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Adapters of the demo model, and the models they make; "late" lies where it may be loaded from."""
    reference, root = workshop.reference("demo"), tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, name in enumerate(("first", "second", "late")):
        tensors = draw(reference, seed=seed, size=0.2)
        made[name] = (write_adapter(root / ("loadable" if name == "late" else ".") / name, tensors), merged(reference, tensors))
    write_adapter(root / "loadable" / "other", draw(reference, seed=7, size=0.2))
    return made


def serve(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "llmc", "serve", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def client(workshop: Workshop, models: dict[str, tuple[Path, nn.Module]]) -> Iterator[httpx.Client]:
    artifact = workshop.artifact("demo", level=0, max_loras=1, max_lora_rank=8)
    described = json.dumps({"name": "second", "path": str(models["second"][0]), "base_model_name": "the-base"})
    flags = ["--enable-lora", "--lora-modules", f"first={models['first'][0]}", described, "--max-num-seqs", "8"]
    process = serve(
        str(artifact), "--port", "0", *flags, "--num-gpu-blocks-override", "200", "--served-model-name", "demo",
        "--allow-runtime-lora-updating", str(models["late"][0].parent),
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stderr is not None
        found = re.search(r"llmc ready at (\S+) ", process.stdout.readline())
        assert found is not None, process.stderr.read()
        with httpx.Client(base_url=found[1], timeout=60) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def refused(answer: httpx.Response, status: int, words: str = "") -> None:
    assert_error(answer, status)
    assert words in answer.json()["error"]["message"]


def complete(client: httpx.Client, model: str | None) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = client.post("/v1/completions", json=body | ({"model": model} if model is not None else {}))
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or "demo")
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_a_model_name_chooses_the_adapter(client: httpx.Client, workshop: Workshop, models: dict[str, tuple[Path, nn.Module]]) -> None:
    expected = {name: continuation(model, PROMPT, COUNT).tokens for name, (_, model) in models.items() if name != "late"}
    expected["demo"] = continuation(workshop.reference("demo"), PROMPT, COUNT).tokens
    names = ["first", "demo", "second", "second", "first", "demo", "second"]
    with ThreadPoolExecutor(len(names)) as pool:  # one slot for two adapters: they take turns
        found = list(pool.map(lambda name: complete(client, name), names))
    assert found == [expected[name] for name in names] and complete(client, None) == expected["demo"]
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answers = [client.post("/v1/chat/completions", json={**chat, "model": name}).json() for name in ("demo", "first")]
    assert [answer["model"] for answer in answers] == ["demo", "first"]
    refused(client.post("/v1/completions", json={"model": "third", "prompt": "x"}), 404, "served is: demo, first, second")


def test_adapters_are_listed_with_their_parents(client: httpx.Client, models: dict[str, tuple[Path, nn.Module]]) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["demo", "first", "second"]
    assert [cards[name]["parent"] for name in cards] == [None, "demo", "the-base"]
    assert cards["first"]["root"] == str(models["first"][0])
    assert client.get("/v1/models/second").json()["id"] == "second"
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith("llmc:lora_requests_info")]
    assert 'max_lora="1"' in line and 'running_lora_adapters=""' in line


def test_adapters_come_and_go(client: httpx.Client, models: dict[str, tuple[Path, nn.Module]]) -> None:
    folder, model = models["late"]
    body = {"lora_name": "late", "lora_path": str(folder)}
    refused(client.post("/v1/completions", json={"model": "late", "prompt": "x"}), 404)
    answer = client.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'late' added successfully.")
    assert complete(client, "late") == continuation(model, PROMPT, COUNT).tokens
    assert "late" in [card["id"] for card in client.get("/v1/models").json()["data"]]
    refused(client.post("/v1/load_lora_adapter", json=body), 400, "is served already")
    elsewhere = {"lora_name": "other", "lora_path": str(models["first"][0])}
    refused(client.post("/v1/load_lora_adapter", json=elsewhere), 400, "none of the folders of --allow-runtime-lora-updating")
    refused(client.post("/v1/load_lora_adapter", json={**elsewhere, "lora_path": f"{folder}/../../first"}), 400, "none of the folders")
    missing = {"lora_name": "other", "lora_path": str(folder.parent / "nothing")}
    refused(client.post("/v1/load_lora_adapter", json=missing), 400, "is no folder; name the folder of a PEFT adapter")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    refused(client.post("/v1/completions", json={"model": "late", "prompt": "x"}), 404)
    refused(client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}), 404, "there is no adapter")


def test_a_request_keeps_the_adapter_it_named(client: httpx.Client, models: dict[str, tuple[Path, nn.Module]]) -> None:
    """Also where the adapter goes, and another takes its name, while the request waits for its grammar."""
    body = {"lora_name": "late", "lora_path": str(models["late"][0])}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    request = {"model": "late", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "structured_outputs": {"regex": "[a-z ]{30,40}"}}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json=request)  # the first with a grammar, so its workers have to start
        while not client.get("/load").json()["server_load"]:
            assert not answer.done()
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
        other = {"lora_name": "late", "lora_path": str(models["late"][0].parent / "other")}
        assert client.post("/v1/load_lora_adapter", json=other).status_code == 200
        early = answer.result()
    assert early.status_code == 200, early.text
    assert client.post("/v1/completions", json=request).json()["choices"] != early.json()["choices"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert client.post("/v1/completions", json=request).json()["choices"] == early.json()["choices"]
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200


def refusal(*arguments: str) -> str:
    with serve(*arguments) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode != 0 and "Traceback" not in said
    return said


def test_one_bad_adapter_at_the_start_is_one_sentence(
    workshop: Workshop, models: dict[str, tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    artifact = str(workshop.artifact("demo", level=0, max_loras=1, max_lora_rank=8))
    said = refusal(artifact, "--port", "0", "--enable-lora", "--lora-modules", f"first={models['first'][0]}", f"bad={tmp_path}")
    assert f"adapter bad: {tmp_path}/adapter_config.json: is not there; it is no PEFT adapter" in said
    said = refusal(artifact, "--port", "0", "--lora-modules", f"first={models['first'][0]}")
    assert "--lora-modules is about LoRA adapters; give --enable-lora too" in said
