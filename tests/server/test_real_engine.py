"""The whole serve path over a real artifact: `llmc serve`, the engine process, the toy program, text out."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers

from llmc.artifacts.manifest import TokenizerFacts
from llmc.artifacts.weight_file import WeightTensor
from llmc.artifacts.writer import ArtifactWriter
from llmc.errors import ArtifactError
from llmc.runtime.server.served_model import load_served_model
from llmc.runtime.server.settings import ServerSettings
from llmc.runtime.text import choose_formats, stored_formats
from tests.runtime.conftest import toy_folder, toy_weights  # noqa: F401
from tests.runtime.toy_artifact import EOS, toy_entry, toy_greedy, toy_manifest
from tests.runtime.toy_program import VOCAB
from tests.server.running import alive, assert_error, children

HEAVY = {"torch", "transformers", "sympy", "triton", "jinja2"}


def toy_tokenizer() -> bytes:
    """One word per id: w0 w1 w2 ..."""
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([f"w{EOS}"])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path, toy_weights: dict[str, np.ndarray]) -> Path:  # noqa: F811
    return write_artifact(tmp_path_factory.mktemp("served") / "toy", toy_folder, toy_weights)


def write_artifact(
    out: Path,
    toy_folder: Path,  # noqa: F811
    toy_weights: dict[str, np.ndarray],  # noqa: F811
    tokenizer: bytes | None = None,
    formats: bytes | None = None,
) -> Path:
    """An artifact of the toy program with these weights. formats: of its replies."""
    with ArtifactWriter(out) as writer:
        image = writer.add_image((toy_folder / "toy.so").read_bytes(), "model")
        tensors = [
            WeightTensor(name=name, dtype="float32", shape=array.shape, recipe={}, blocks=lambda array=array: [array])
            for name, array in sorted(toy_weights.items())
        ]
        weight_file, records = writer.add_weights("weights/model.safetensors", tensors)
        writer.add_file("tokenizer/tokenizer.json", tokenizer or toy_tokenizer())
        writer.add_file("tokenizer/chat_template.jinja", b"{% for m in messages %}{{ m.content }} {% endfor %}")
        if formats is not None:
            writer.add_file("tokenizer/reply_formats.json", formats)
        facts = TokenizerFacts(
            reply_formats="tokenizer/reply_formats.json" if formats is not None else None,
            tokenizer_json="tokenizer/tokenizer.json",
            chat_template="tokenizer/chat_template.jinja",
            template_parity="same",
            bos_token_id=None,
            eos_token_ids=[EOS],
            pad_token_id=None,
            special_tokens={},
            num_tokens=VOCAB,
        )
        manifest = toy_manifest(
            entries=[toy_entry(program=image.path)],
            images=[image],
            weights=[weight_file],
            tensors=records,
            tokenizer=facts,
            generation_defaults={"temperature": 0.0},
        )
        writer.finish(manifest)
    return out


def test_replies_are_read_as_the_artifact_says(tmp_path: Path, toy_folder: Path, toy_weights: dict[str, np.ndarray]) -> None:  # noqa: F811
    def served(artifact: Path, **settings: Any) -> tuple[str | None, str | None]:
        replies = load_served_model(ServerSettings(artifact=artifact, engine={}, **settings)).replies
        return replies.reasoning and replies.reasoning.name, replies.tools and replies.tools.name

    formats = stored_formats(choose_formats(reasoning="deepseek_r1", tools="hermes", template=None))
    artifact = write_artifact(tmp_path / "own", toy_folder, toy_weights, formats=formats)
    assert served(artifact) == ("deepseek_r1", "hermes")
    assert served(artifact, tool_call_parser="mistral", reasoning_parser="none") == (None, "mistral")
    assert served(artifact, chat_template="[INST] [TOOL_CALLS]") == (None, "mistral"), "an operator's template is read off anew"
    broken = write_artifact(tmp_path / "broken", toy_folder, toy_weights, formats=b'{"tools":{"name":"x"}}')
    with pytest.raises(ArtifactError, match="reply_formats.json: the format 'x' has an empty mark or key"):
        load_served_model(ServerSettings(artifact=broken, engine={}))


@pytest.fixture(scope="module")
def url(artifact: Path) -> Iterator[str]:
    command = [sys.executable, "-c", "import sys; from llmc.cli import main; sys.exit(main())", "serve", str(artifact), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"llmc ready at (\S+) ", process.stdout.readline())
        assert found is not None, process.wait(10)
        (engine,) = children(process.pid)
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert not alive(engine)


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_greedy_text_is_the_programs(url: str, toy_weights: dict[str, np.ndarray]) -> None:  # noqa: F811
    expected, _ = toy_greedy(toy_weights, [3, 4, 5], 12)
    expected = expected[: expected.index(EOS)] if EOS in expected else expected
    body = {"prompt": "w3 w4 w5", "max_tokens": 12, "logprobs": 2}
    (choice,) = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert choice["text"].split() == words(expected).split()
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    chat = httpx.post(
        f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "w3 w4 w5"}], "max_tokens": 12}, timeout=60
    ).json()
    assert chat["choices"][0]["message"]["content"].split() == words(expected).split()
    assert chat["model"] == "toy"


def test_sampling_fields_reach_the_engine(url: str) -> None:
    fields = {"prompt": [3, 4, 5], "max_tokens": 8, "temperature": 1.0, "seed": 7, "n": 3, "ignore_eos": True, "prompt_logprobs": 1}
    first, second = (httpx.post(f"{url}/v1/completions", json=fields, timeout=60).json() for _ in range(2))
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in second["choices"]]
    assert len({c["text"] for c in first["choices"]}) > 1
    assert first["usage"]["completion_tokens"] == 24
    assert len(first["choices"][0]["prompt_logprobs"]) == 3 and first["choices"][0]["prompt_logprobs"][0] is None
    banned = {"prompt": [3, 4, 5], "max_tokens": 20, "logit_bias": {"9": 100}, "ignore_eos": True}
    assert set(httpx.post(f"{url}/v1/completions", json=banned, timeout=60).json()["choices"][0]["text"].split()) == {"w9"}
    few = {"prompt": [3, 4, 5], "max_tokens": 20, "allowed_token_ids": [9, 8], "bad_words": ["w8"], "ignore_eos": True}
    assert set(httpx.post(f"{url}/v1/completions", json=few, timeout=60).json()["choices"][0]["text"].split()) == {"w9"}


def test_the_end_token_is_no_stop_reason_unless_asked_for(url: str) -> None:
    fields = {"prompt": [3, 4, 5], "max_tokens": 8, "logit_bias": {str(EOS): 100}}
    for more, reason in (({}, None), ({"stop_token_ids": [EOS]}, EOS)):
        (choice,) = httpx.post(f"{url}/v1/completions", json=fields | more, timeout=60).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", reason)


def test_a_cache_salt_keeps_prefixes_apart(url: str) -> None:
    def cached(salt: str) -> int:
        fields = {"prompt": [7] * 100, "max_tokens": 1, "cache_salt": salt}
        usage = httpx.post(f"{url}/v1/completions", json=fields, timeout=60).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0 and cached("a") > 0 and cached("b") == 0


def test_errors_keep_the_engine_serving(url: str) -> None:
    for body in ({"prompt": [VOCAB]}, {"prompt": [3] * 300}, {"prompt": [3], "logit_bias": {str(VOCAB): 1}}):
        assert_error(httpx.post(f"{url}/v1/completions", json=body, timeout=60), 400)
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    assert "llmc:generation_tokens_total" in httpx.get(f"{url}/metrics", timeout=60).text


def test_no_process_of_the_tree_holds_heavy_modules(url: str, artifact: Path) -> None:
    """Asked of fresh processes, which import what the served ones import."""
    program = (
        "import sys, json\n"
        f"if {{role!r}} == 'engine':\n"
        "    from llmc.runtime.engine_process import _make_engine\n"
        f"    _make_engine({{{{'artifact': {str(artifact)!r}}}}})\n"
        "else:\n"
        "    import llmc.cli, llmc.runtime.server.main, llmc.runtime.server.run\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    for role in ("engine", "front"):
        done = subprocess.run([sys.executable, "-c", program.format(role=role)], capture_output=True, text=True, check=True)
        modules = set(done.stdout.strip().strip("[]").replace('"', "").split(", "))
        assert "llmc.errors" in modules and not HEAVY & modules, (role, HEAVY & modules)
