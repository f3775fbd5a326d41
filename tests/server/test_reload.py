"""POST /v1/weights over a real artifact: other weights in the same server, and every way in which it is refused."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from llmc.errors import ConfigError
from llmc.runtime.server.settings import ServerSettings
from tests.runtime.conftest import toy_folder, toy_weights  # noqa: F401
from tests.runtime.toy_artifact import toy_greedy
from tests.server.running import RunningServer, assert_error
from tests.server.test_real_engine import toy_tokenizer, words, write_artifact

PROMPT = [3, 4, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reload")


@pytest.fixture(scope="module")
def other_weights(toy_weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # noqa: F811
    rng = np.random.default_rng(7)
    return {name: rng.permutation(array.ravel()).reshape(array.shape) for name, array in toy_weights.items()}


@pytest.fixture(scope="module")
def client(
    folder: Path,
    toy_folder: Path,  # noqa: F811
    toy_weights: dict[str, np.ndarray],  # noqa: F811
    other_weights: dict[str, np.ndarray],
) -> Iterator[httpx.Client]:
    first = write_artifact(folder / "allowed" / "first", toy_folder, toy_weights)
    write_artifact(folder / "allowed" / "second", toy_folder, other_weights)
    write_artifact(folder / "elsewhere", toy_folder, other_weights)
    write_artifact(folder / "allowed" / "foreign", toy_folder, other_weights, tokenizer=toy_tokenizer() + b"\n")
    (folder / "allowed" / "link").symlink_to(folder / "elsewhere")
    socket = folder / "socket"
    command = [sys.executable, "-m", "llmc", "serve", str(first), "--uds", str(socket), "--allow-weights", str(folder / "allowed")]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        assert re.search(r"llmc ready at unix:", process.stdout.readline()), (folder / "log").read_text()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://x", timeout=30) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def text(client: httpx.Client, num_tokens: int = 8) -> str:
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def expected(weights: dict[str, np.ndarray]) -> str:
    return words(toy_greedy(weights, PROMPT, 8)[0])


def replace(client: httpx.Client, artifact: Path) -> httpx.Response:
    return client.post("/v1/weights", json={"artifact": str(artifact)})


def test_other_weights_without_a_restart(
    client: httpx.Client,
    folder: Path,
    toy_weights: dict[str, np.ndarray],  # noqa: F811
    other_weights: dict[str, np.ndarray],
) -> None:
    assert expected(toy_weights) != expected(other_weights)
    names = client.get("/v1/models").json()["data"]
    for _ in range(2):
        for name, weights in (("second", other_weights), ("first", toy_weights)):
            before = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}).json()["system_fingerprint"]
            assert replace(client, folder / "allowed" / name).json() == {"status": "replaced"}
            assert text(client).strip() == expected(weights).strip()
            after = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}).json()["system_fingerprint"]
            assert before != after
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [card["id"] for card in names]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("elsewhere", "not_allowed"),
        ("allowed/link", "not_allowed"),
        ("allowed/../elsewhere", "not_allowed"),
        ("allowed/missing", "bad_artifact"),
        ("allowed", "bad_artifact"),
        ("allowed/foreign", "other_model"),
    ],
)
def test_what_may_not_be_served_is_refused(client: httpx.Client, folder: Path, name: str, code: str) -> None:
    before = text(client)
    assert_error(replace(client, folder / name), 400, param="artifact", code=code)
    assert text(client) == before


def test_damaged_weights_bring_the_former_back(
    client: httpx.Client,
    folder: Path,
    toy_folder: Path,  # noqa: F811
    other_weights: dict[str, np.ndarray],
) -> None:
    """The front reads the manifest and the tokenizer; that a weight is wrong only the engine finds."""
    bad = write_artifact(folder / "allowed" / "bad", toy_folder, other_weights)
    file = bad / "weights" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    before = text(client)
    assert "former artifact is served again" in assert_error(replace(client, bad), 500, code="reload_failed")
    assert text(client) == before


def test_requests_meanwhile_end_with_an_answer_or_a_503(client: httpx.Client, folder: Path) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        for _ in range(15):
            answers.append(client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert replace(client, folder / "allowed" / "second").status_code == 200
    assert replace(client, folder / "allowed" / "first").status_code == 200
    for thread in threads:
        thread.join(60)
    assert len(answers) == 60 and {answer.status_code for answer in answers} <= {200, 503}


def test_no_such_path_on_the_network(server: RunningServer) -> None:
    assert_error(server.post("/v1/weights", {"artifact": "/tmp"}), 404)
    with pytest.raises(ConfigError, match="needs uds"):
        ServerSettings(artifact="x", engine={}, allow_weights=("/tmp",))
