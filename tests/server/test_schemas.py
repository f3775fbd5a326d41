"""Every field of every request model has a bound, and what is not built is refused by name."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmc.errors import RequestRejected
from llmc.runtime.server import schemas
from llmc.runtime.server.parse import parse_body

REQUESTS = [schemas.CompletionRequest, schemas.ChatCompletionRequest, schemas.TokenizeRequest, schemas.DetokenizeRequest]


def unbounded(annotation: Any, metadata: list[Any], where: str) -> list[str]:
    """Places within a type that have no bound."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        flat = [x for m in more for x in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return unbounded(inner, [*metadata, *flat], where)
    if get_origin(annotation) in (Union, types.UnionType):
        return [p for arm in get_args(annotation) for p in unbounded(arm, metadata, where)]
    if annotation in (bool, type(None)) or get_origin(annotation) is Literal:
        return []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return walk(annotation, where)
    kinds = {type(m) for m in metadata}
    if schemas.BoundedJson in kinds:
        return []
    if annotation in (int, float):
        low = kinds & {annotated_types.Ge, annotated_types.Gt}
        high = kinds & {annotated_types.Le, annotated_types.Lt}
        return [] if low and high else [where]
    if annotation is str:
        return [] if annotated_types.MaxLen in kinds else [where]
    if get_origin(annotation) in (list, dict):
        problems = [] if annotated_types.MaxLen in kinds else [where]
        return problems + [p for inner in get_args(annotation) for p in unbounded(inner, [], where + "[]")]
    return [f"{where}: {annotation} is not known to this test"]


def walk(model: type[BaseModel], where: str = "") -> list[str]:
    assert model.model_config.get("extra") == "forbid" and model.model_config.get("strict")
    return [
        p for name, f in model.model_fields.items() for p in unbounded(f.annotation, list(f.metadata), f"{where}{model.__name__}.{name} ")
    ]


@pytest.mark.parametrize("model", REQUESTS)
def test_every_field_is_bounded(model: type[BaseModel]) -> None:
    assert walk(model) == []


def test_the_walk_finds_a_missing_bound() -> None:
    class Bad(schemas.RequestModel):
        free: list[int] | None = None
        fine: Annotated[int, annotated_types.Ge(0), annotated_types.Le(1)]

    assert len(walk(Bad)) == 2


@pytest.mark.parametrize("name", sorted(schemas.NOT_BUILT))
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestRejected, match=name) as caught:
        parse_body(b'{"messages":[{"role":"user","content":"x"}],"%s":[1]}' % name.encode(), schemas.ChatCompletionRequest)
    assert caught.value.param == name
    parse_body(b'{"messages":[{"role":"user","content":"x"}],"%s":null}' % name.encode(), schemas.ChatCompletionRequest)


def test_values_that_ask_for_nothing_are_as_if_absent() -> None:
    assert set(schemas.ASKS_NOTHING) <= set(schemas.NOT_BUILT)
    nothing = {name: values[0] for name, values in schemas.ASKS_NOTHING.items()}
    bare = {"messages": [{"role": "user", "content": "x"}]}
    read = parse_body(json.dumps(bare | nothing | {"length_penalty": 1.0}).encode(), schemas.ChatCompletionRequest)
    assert read == parse_body(json.dumps(bare).encode(), schemas.ChatCompletionRequest)
    choice = {
        "choice": ["a"],
        "regex": None,
        "disable_fallback": False,
        "disable_any_whitespace": False,
        "structural_tag": None,
    }  # vLLM's own
    assert (
        parse_body(json.dumps(bare | {"structured_outputs": choice}).encode(), schemas.ChatCompletionRequest).structured_outputs is not None
    )
    for name, value in {
        "use_beam_search": 0,
        "length_penalty": True,
        "store": True,
        "modalities": ["text", "audio"],
        "metadata": {"a": "b"},
    }.items():
        with pytest.raises(RequestRejected, match=name):
            parse_body(json.dumps(bare | {name: value}).encode(), schemas.ChatCompletionRequest)


def test_no_field_is_both_built_and_refused() -> None:
    built = {name for model in REQUESTS for name in model.model_fields}
    assert not built & set(schemas.NOT_BUILT)


def test_explicit_nulls_mean_absent() -> None:
    names = [n for n in schemas.ChatCompletionRequest.model_fields if n != "messages"]
    body = '{"messages":[{"role":"user","content":"x"}],' + ",".join(f'"{n}":null' for n in names) + "}"
    assert parse_body(body.encode(), schemas.ChatCompletionRequest).model_fields_set == {"messages"}


def test_free_json_is_bounded_in_all() -> None:
    tool = '{"type":"function","function":{"name":"f","parameters":{"a":[%s]}}}'
    body = '{"messages":[{"role":"user","content":"x"}],"tools":[' + tool + "]}"
    for count, fine in ((schemas.MAX_JSON_VALUES - 2, True), (schemas.MAX_JSON_VALUES, False)):
        data = (body % ",".join(["[]"] * count)).encode()
        if fine:
            parse_body(data, schemas.ChatCompletionRequest)
        else:
            with pytest.raises(RequestRejected, match="JSON values"):
                parse_body(data, schemas.ChatCompletionRequest)


@pytest.mark.parametrize("value", ["1.0", "true", '"1"', "1e400", "99999999999999999999", "-5"])
def test_integers_are_strict(value: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        parse_body(b'{"prompt":"x","n":%s}' % value.encode(), schemas.CompletionRequest)
    assert value.strip('"') not in str(caught.value) or len(value) < 3


def test_a_million_wrong_entries_give_a_short_answer() -> None:
    body = b'{"prompt":[1' + b',"x"' * 1_000_000 + b"]}"
    with pytest.raises(RequestRejected) as caught:
        parse_body(body, schemas.CompletionRequest)
    assert len(str(caught.value)) < 1000


def test_many_unknown_fields_give_at_most_ten_errors() -> None:
    body = "{" + ",".join(f'"field{i}":1' for i in range(1000)) + "}"
    with pytest.raises(RequestRejected) as caught:
        parse_body(body.encode(), schemas.CompletionRequest)
    assert str(caught.value).count("is not a field") == 10 and "990 more" in str(caught.value)
    wide = "{" + ",".join(f'"field{i}":1' for i in range(5000)) + "}"
    with pytest.raises(RequestRejected, match="5000 keys"):
        parse_body(wide.encode(), schemas.CompletionRequest)
