"""Structured output through the engine: documents from noise, whole ones, the same alone or in a batch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import jsonschema
import pytest

from llmc.errors import RequestRejected
from llmc.runtime.engine import Engine
from tests.runtime.grammar_world import END, TOKENIZER, asking, noise_engine, one, run

NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    "required": ["value", "children"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict] = {
    "object": {"type": "object"},
    "person": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "member": {"type": "boolean"}},
        "required": ["name", "age", "member"],
        "additionalProperties": False,
    },
    "optional": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "null"}}, "additionalProperties": False},
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "array", "items": {"type": "number"}}}, "required": ["b"]}},
        "required": ["a"],
    },
    "array": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"enum": ["a", "b"]}], "items": False, "minItems": 2},
    "enum": {"enum": ["red", 7, None, True, {"k": [1]}]},
    "const": {"const": {"fixed": "für alle"}},
    "any of": {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}]},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id"],
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "number": {"type": "number", "exclusiveMinimum": -1, "maximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7},
    "unicode": {"type": "object", "properties": {"Größe 🙂": {"type": "string", "minLength": 3}}, "required": ["Größe 🙂"]},
}
LARK = 'start: greeting ("," greeting)*\ngreeting: "hi" | "hello " NAME\nNAME: /[a-z]{2,6}/'
GBNF = 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+ | "x"'


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = noise_engine()
    yield engine
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_schemas_give_valid_documents(engine: Engine, temperature: float) -> None:
    seeds = range(1) if temperature == 0.0 else range(4)
    requests = [
        asking(f"{name}/{seed}", json=schema, temperature=temperature, seed=seed) for name, schema in SCHEMAS.items() for seed in seeds
    ]
    for key, output in run(engine, requests).items():
        assert output.finish_reason == "stop" and output.token_ids[-1] == END, (key, output)
        jsonschema.validate(json.loads(output.text), SCHEMAS[key.split("/")[0]])
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"[a-z]{3,8}-\d{2,4}"}, r"[a-z]{3,8}-\d{2,4}"),  # as in Python, other digits too
        ({"regex": r"(yes|no)( indeed)?"}, r"(yes|no)( indeed)?"),
        ({"choice": ["positive", "negative", 'with "quotes"\n']}, 'positive|negative|with "quotes"\n'),
        ({"choice": ["a", "aa", "aaa"]}, "a{1,3}"),
        ({"grammar": LARK}, r"(hi|hello [a-z]{2,6})(,(hi|hello [a-z]{2,6}))*"),
        ({"grammar": GBNF}, r"\[([0-9]+|x)(,([0-9]+|x))*\]"),
        ({"grammar": 'root ::= "SELECT " col ("," col)* " FROM t"\ncol ::= [a-z]+'}, r"SELECT [a-z]+(,[a-z]+)* FROM t"),
        ({"json_object": True}, r"\{.*\}"),
    ],
)
def test_other_kinds(engine: Engine, fields: dict, pattern: str, temperature: float) -> None:
    for seed in range(3):
        output = one(engine, seed=seed, temperature=temperature, **fields)
        assert output.finish_reason == "stop", output
        assert re.fullmatch(pattern, output.text, re.DOTALL), output.text


def mixed() -> list:
    return [
        asking("plain", max_tokens=30),
        asking("person", json=SCHEMAS["person"]),
        asking("object", json_object=True, seed=7),
        asking("greedy", json=SCHEMAS["nested"], temperature=0.0),
        asking("regex", regex="[a-f]{20,40}", top_k=50),
        asking("top_p", json=SCHEMAS["recursive"], top_p=0.9, repetition_penalty=1.3),
        asking("logprobs", json=SCHEMAS["array"], logprobs=2),
        asking("short", json=SCHEMAS["person"], max_tokens=7),
        asking("plain2", max_tokens=60, seed=4),
    ]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, list[int]]:
    return {request.request_id: run(engine, [request])[request.request_id].token_ids for request in mixed()}


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 3}, {"num_blocks": 33, "reserve_blocks": 0}], ids=["all", "three", "preempted"])
def test_tokens_are_the_same_alone_and_in_a_batch(alone: dict[str, list[int]], limits: dict) -> None:
    engine = noise_engine(**limits)
    found = {
        key: output.token_ids for key, output in run(engine, [*mixed(), *(asking(f"load{i}", max_tokens=200) for i in range(3))]).items()
    }
    assert {key: found[key] for key in alone} == alone
    assert (engine.stats().num_preemptions > 0) == ("num_blocks" in limits)
    engine.close()


@pytest.mark.parametrize("name", ["person", "recursive", "formats", "unicode"])
def test_a_document_that_fits_is_never_broken(engine: Engine, name: str) -> None:
    """From the first length that holds a document on, every greater one does, whatever the noise would rather say."""
    lengths = [*range(1, 48), 60, 99]
    for seed in range(2):
        found = run(engine, [asking(str(n), json=SCHEMAS[name], max_tokens=n, seed=seed) for n in lengths])
        ended = [found[str(n)].finish_reason == "stop" for n in lengths]
        assert ended == sorted(ended) and ended[-1] and not ended[0], (name, seed, ended)
        for n, stopped in zip(lengths, ended, strict=True):
            assert len(found[str(n)].token_ids) <= n
            if stopped:
                jsonschema.validate(json.loads(found[str(n)].text), SCHEMAS[name])
            else:
                assert found[str(n)].finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_choice_that_fits_is_made(engine: Engine, temperature: float) -> None:
    choices = ["positive and more", "possible", "pox", "negative", "no", "beta gamma"]
    shortest = min(len(TOKENIZER.encode(choice)) for choice in choices)
    for most in range(shortest, 9):
        for seed in range(3):
            output = one(engine, choice=choices, max_tokens=most, temperature=temperature, seed=seed)
            assert output.text in choices and len(output.token_ids) <= most, (most, output)
            assert most == shortest or output.finish_reason == "stop"


def test_without_max_tokens_the_context_is_the_limit(engine: Engine) -> None:
    output = one(engine, json={"type": "array", "items": {"type": "string"}, "minItems": 3}, max_tokens=None, logit_bias={END: -100.0})
    assert output.finish_reason == "stop" and len(json.loads(output.text)) >= 3


def test_other_parameters_stand_beside_a_grammar(engine: Engine) -> None:
    ended = one(engine, choice=["a"], min_tokens=20)
    assert (ended.text, ended.finish_reason, len(ended.token_ids)) == ("a", "stop", 2)  # complete: min_tokens cannot make it longer
    long = one(engine, regex="[a-z]{1,50}", min_tokens=12)
    assert len(long.token_ids) > 12 and re.fullmatch("[a-z]{1,50}", long.text)
    stuck = one(engine, choice=["a"], allowed_token_ids=[5])
    assert stuck.finish_reason == "error" and "no token to choose" in str(stuck.error)
    assert one(engine, choice=["a"]).text == "a"


def test_what_cannot_be_is_refused_at_once(engine: Engine) -> None:
    for fields, message in [
        ({"json_object": True, "regex": "a"}, "exactly one.*json_object, regex"),
        ({"choice": []}, "at least one choice"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": ["a"] * 5000}, "at most 4096"),
        ({"regex": "a" * 200_000}, "larger than the 131072 bytes"),
        ({"regex": "(" * 100 + ")" * 100}, "deeper than the 64"),
        ({"json": "[" * 100_000}, "deeper than the 64"),
        ({"json": {"a": float("nan")}}, "cannot be written as JSON"),
        ({"json_object": True, "ignore_eos": True}, "ignore_eos cannot be combined"),
        ({"json_object": False}, "found none"),
    ]:
        with pytest.raises(RequestRejected, match=message):
            engine.add(asking("refused", **fields))
    assert not engine.has_work()


def test_an_artifact_without_end_token_or_tokenizer_says_so() -> None:
    engine = noise_engine()
    engine.manifest.tokenizer.eos_token_ids.clear()
    with pytest.raises(RequestRejected, match="needs an end token"):
        engine.add(asking("refused", json_object=True))
    engine.close()


def test_nothing_is_loaded_before_the_first_structured_request() -> None:
    code = """
import sys
from tests.runtime.grammar_world import asking, noise_engine, run
engine = noise_engine()
run(engine, [asking("plain")])
parts = lambda: sorted(m for m in sys.modules if "grammar" in m and not m.startswith("tests"))
assert parts() == [], parts()
run(engine, [asking("structured", json_object=True)])
assert "llmc.runtime.grammar.service" in parts()
assert not [m for m in sys.modules if m.split(".")[0] in ("llguidance", "torch", "zmq")]  # the worker's business
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
