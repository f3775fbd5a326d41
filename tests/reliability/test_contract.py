"""The server's own OpenAPI: every field of a body has a bound, and nothing generated from it brings a 5xx or a hang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.reliability.served import Server

schemathesis = pytest.importorskip("schemathesis", reason="needs the dev dependency schemathesis")


_EXAMPLES = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(max_queue=64, enable_tokenizer_info_endpoint=True) as running:
        yield running
        assert running.complete().status_code == 200
        running.await_idle()


def unbounded(schema: Any, definitions: dict[str, Any], where: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """Places in a JSON schema where a value may be as large as its sender likes."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return [] if name in seen else unbounded(definitions[name], definitions, where, seen | {name})
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return [p for i, arm in enumerate(schema[key]) for p in unbounded(arm, definitions, f"{where}|{i}", seen)]
    if "enum" in schema or "const" in schema or "x-max-values" in schema:  # the last counts everything within
        return []
    kind = schema.get("type")
    if kind in ("boolean", "null"):
        return []
    if kind in ("integer", "number"):
        low = {"minimum", "exclusiveMinimum"} & schema.keys()
        high = {"maximum", "exclusiveMaximum"} & schema.keys()
        return [] if low and high else [where]
    if kind == "string":
        return [] if "maxLength" in schema else [where]
    if kind == "array":
        items = unbounded(schema["items"], definitions, where + "[]", seen) if "items" in schema else [where + "[]"]
        return ([] if "maxItems" in schema else [where]) + items
    if kind == "object":
        return _of_object(schema, definitions, where, seen)
    return [f"{where}: {sorted(schema)} is not known to this test"]


def _of_object(schema: Any, definitions: dict[str, Any], where: str, seen: frozenset[str]) -> list[str]:
    found = [p for name, inner in schema.get("properties", {}).items() for p in unbounded(inner, definitions, f"{where}.{name}", seen)]
    more = schema.get("additionalProperties", True)
    if more is not False and "maxProperties" not in schema:
        found.append(where + "{}")
    if isinstance(more, dict):
        found += unbounded(more, definitions, where + "{}", seen)
    return found


def test_every_field_of_every_body_has_a_bound(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    definitions = document["components"]["schemas"]
    bodies = {
        path: operation["requestBody"]["content"]["application/json"]["schema"]
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if "requestBody" in operation
    }
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"} <= set(bodies)
    assert [place for path, schema in bodies.items() for place in unbounded(schema, definitions, path)] == []


def test_the_walk_finds_what_is_missing() -> None:
    fine = {"type": "object", "additionalProperties": False, "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 2}}}
    assert unbounded(fine, {}, "") == []
    for hole in ({"type": "integer", "minimum": 0}, {"type": "string"}, {"type": "array", "items": {"const": 1}}, {"type": "object"}, {}):
        assert unbounded({**fine, "properties": {"hole": hole}}, {}, "") != [], hole


def test_every_post_path_describes_its_body(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert [path for path, operations in paths.items() if "post" in operations and "requestBody" not in operations["post"]] == []


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_generated_requests_bring_no_fault_and_no_hang(server: Server, mode: str) -> None:
    """A 5xx, an answer that is no JSON or an error of more than 4 kB fails; so does one that takes longer than the client waits."""
    from schemathesis import GenerationMode

    api = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    api.config.generation.update(modes=[GenerationMode(mode)])
    checked = 0
    for result in api.get_all_operations():
        operation = result.ok()
        if mode == "negative" and "requestBody" not in operation.definition.raw:
            continue

        @_EXAMPLES
        @_given(operation, GenerationMode(mode))
        def ask(case: Any) -> None:
            nonlocal checked
            answer = case.call(base_url=server.url, timeout=20)
            assert answer.status_code < 500, (case.method, case.path, answer.text)
            if answer.status_code >= 400:
                assert len(answer.content) < 4096 and "error" in answer.json()
            checked += 1

        ask()
    assert checked > 50


def _given(operation: Any, mode: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy(generation_mode=mode))
