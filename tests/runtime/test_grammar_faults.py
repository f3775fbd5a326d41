"""Hostile grammars and dying workers: a request may lose, the others do not notice."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from llmc.runtime.engine import Engine
from llmc.runtime.grammar import admission, matcher
from llmc.runtime.grammar.service import GrammarService
from llmc.runtime.kept_file import KeptFile
from tests.runtime.grammar_world import END, TOKENIZER_PATH, VOCAB, Output, asking, go_on, noise_engine, one, run

FRAGILE = (sys.executable, "-m", "tests.runtime.fragile_grammar_worker")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
BOMB = {"type": "integer", "multipleOf": 999983}  # half a minute of compiling


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = noise_engine()
    yield engine
    engine.close()


@pytest.fixture
def fragile() -> Iterator[Engine]:
    """An engine whose worker has bugs, see fragile_grammar_worker."""
    engine = noise_engine()
    engine._grammars = engine._runner.grammars = GrammarService(
        TOKENIZER_PATH.read_bytes, vocab_size=VOCAB, eos_token_ids=[END], max_sequence_tokens=512, max_waiting=20, command=FRAGILE
    )
    yield engine
    engine.close()


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"json": {"$ref": "http://127.0.0.1:9/schema.json"}}, "127.0.0.1"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "file:///etc/passwd"),
        ({"json": {"allOf": [{"$ref": "#"}, {"type": "object"}]}}, "circular"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": "{not json"}, ""),
        (
            {"json": {"type": "string", "allOf": [{"anyOf": [{"minLength": i * 10 + j} for i in range(10)]} for j in range(20)]}},
            "too large",
        ),
        ({"regex": "((a{1000}){1000}){1000}"}, None),
        ({"regex": r"(a?){200}a{200}"}, None),
        ({"regex": r"(x+x+)+y"}, None),
        ({"regex": r"[a-z]*a[a-z]{30}"}, None),
        ({"regex": "(" * 60 + "a" + ")*" * 60}, None),
        ({"regex": "(a"}, "regex"),
        ({"regex": "\\"}, None),
        ({"regex": "a\0b"}, None),
        ({"json": {"enum": [f"value {i}" for i in range(5000)]}}, None),
        ({"json": {"type": "string", "minLength": 10_000_000}}, None),
        ({"json": {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}}, None),
        ({"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, None),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "start: start start | start"}, None),
        ({"grammar": "root ::= root root | "}, None),
        ({"grammar": "neither"}, "Expected ::="),
        ({"grammar": 'start: "a" @other'}, ""),
        ({"grammar": 'start: %json { "$ref": "http://127.0.0.1:9/" }'}, "127.0.0.1"),
        ({"grammar": "start: " + " | ".join(f'"{i}"' for i in range(5000))}, None),
    ],
)
def test_hostile_grammars_are_bounded(shared: Engine, fields: dict, problem: str | None) -> None:
    """Refused with a sentence, or followed; either way soon, and the neighbour gets its answer."""
    began = time.monotonic()
    found = run(shared, [asking("hostile", max_tokens=20, **fields), asking("neighbour", json=PERSON)])
    assert time.monotonic() - began < 8
    assert found["neighbour"].finish_reason == "stop" and json.loads(found["neighbour"].text)
    hostile = found["hostile"]
    if problem is not None:
        assert (hostile.finish_reason, hostile.status, hostile.param) == ("error", 400, "structured_outputs"), hostile
        assert problem in str(hostile.error) and hostile.error.startswith("structured output: ")
        assert len(str(hostile.error)) < 300 and "\n" not in str(hostile.error)
    elif hostile.finish_reason == "error":
        assert (hostile.status, hostile.param) == (400, "structured_outputs") and hostile.error and len(hostile.error) < 300


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    engine = noise_engine()
    yield engine
    engine.close()


def test_a_bomb_is_stopped_and_holds_up_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "COMPILE_S", 0.7)
    run(engine, [asking("first", json=PERSON)])
    assert engine._grammars is not None
    checker, workers = engine._grammars.admission.pid, engine._grammars.matcher
    engine.add(asking("running", regex="[a-z]{300}", max_tokens=400))
    outputs = {name: Output(token_ids=[]) for name in ("running", "bomb", "plain", "again")}
    go_on(engine, outputs, steps=5)
    engine.add(asking("bomb", json=BOMB))
    engine.add(asking("plain", max_tokens=50))
    longest, began = 0.0, time.monotonic()
    while outputs["plain"].finish_reason is None:
        started = time.monotonic()
        go_on(engine, outputs, steps=1)
        longest = max(longest, time.monotonic() - started)
    assert outputs["bomb"].finish_reason is None and longest < 0.5  # it is still being compiled
    go_on(engine, outputs)
    assert outputs["bomb"].status == 400 and "longer than" in str(outputs["bomb"].error) and time.monotonic() - began < 5
    assert outputs["running"].finish_reason in ("stop", "length") and len(outputs["running"].text) > 200
    assert checker is not None and gone(checker) and workers.num_restarts == 0
    engine_knows = time.monotonic()
    with pytest.raises(Exception, match="longer than"):
        engine.add(asking("again", json=BOMB))  # remembered
    assert time.monotonic() - engine_knows < 0.1
    assert one(engine, json=PERSON).finish_reason == "stop"


def test_a_killed_matcher_changes_nothing(engine: Engine) -> None:
    requests = [asking("a", json=PERSON, seed=3), asking("b", regex="[a-z]{50,60}"), asking("c", json_object=True, seed=9, max_tokens=90)]
    expected = run(engine, requests)
    for name, wait in (("before a step", False), ("during a step", True)):
        outputs = {request.request_id: Output(token_ids=[]) for request in requests}
        for request in requests:
            engine.add(request)
        for _ in range(4):
            go_on(engine, outputs, steps=6)
            assert engine._grammars is not None
            pid = engine._grammars.matcher.pid
            if pid is not None and engine.has_work():
                os.kill(pid, signal.SIGSTOP if wait else signal.SIGKILL)
                if wait:
                    os.kill(pid, signal.SIGKILL)
        go_on(engine, outputs)
        assert outputs == expected, name
    assert engine._grammars is not None and engine._grammars.matcher.num_restarts >= 4


def test_a_killed_checker_is_replaced(engine: Engine) -> None:
    one(engine, json=PERSON)
    for pattern in ("[0-9]{3}", "[0-9]{4}"):
        assert engine._grammars is not None and engine._grammars.admission.pid is not None
        os.kill(engine._grammars.admission.pid, signal.SIGKILL)
        assert one(engine, regex=pattern).finish_reason == "stop"


@pytest.mark.parametrize("fault", [f"{what} when {when}" for what in ("crash", "hang", "rave") for when in ("compiled", "matched")])
def test_only_the_request_at_fault_ends(fragile: Engine, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((admission, "COMPILE_S"), (matcher, "STEP_S"), (matcher, "REPLAY_S")):
        if fault.startswith("hang"):
            monkeypatch.setattr(module, name, 1.5)
    healthy = [asking("a", json=PERSON, seed=3), asking("b", regex="[a-z]{150,160}", max_tokens=300), asking("plain", max_tokens=40)]
    expected = run(fragile, healthy)
    outputs = {request.request_id: Output(token_ids=[]) for request in [*healthy, asking("bad", choice=[fault])]}
    for request in healthy:
        fragile.add(request)
    go_on(fragile, outputs, steps=3)
    fragile.add(asking("bad", choice=[fault, "other"]))
    go_on(fragile, outputs)
    bad = outputs.pop("bad")
    assert bad.finish_reason == "error" and bad.status == (400 if "compiled" in fault else 500), bad
    assert outputs == expected
    assert fragile.stats().kv_blocks_used == 0


def test_waiting_requests_can_be_aborted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "COMPILE_S", 0.7)
    for name in ("a", "b"):
        engine.add(asking(name, json=BOMB))
    engine.add(asking("c", json=BOMB | {"minimum": 1}))
    engine.step()
    assert [event.finish_reason for name in ("a", "b", "c") for event in engine.abort(name)] == ["abort"] * 3
    assert not engine.has_work() and engine.abort("a") == []
    assert one(engine, json=PERSON).finish_reason == "stop"


def test_an_engine_that_waits_for_a_grammar_alone_makes_progress(fragile: Engine) -> None:
    # Else the front would take one that was idle before for one that hangs, and kill it.
    fragile._scheduler._counters.last_progress -= 1000
    fragile.add(asking("a", regex="a{7}"))
    before = time.monotonic()
    fragile.step()
    assert fragile.has_work() and not fragile._scheduler.has_work() and fragile.stats().time >= before
    go_on(fragile, {"a": Output(token_ids=[])})


def test_too_many_waiting_requests_are_refused(fragile: Engine) -> None:
    for index in range(20):
        fragile.add(asking(str(index), regex=f"a{{{index + 1}}}"))
    with pytest.raises(Exception, match="20 requests wait") as caught:
        fragile.add(asking("one too many", regex="b"))
    assert caught.value.status == 429
    outputs = go_on(fragile, {str(index): Output(token_ids=[]) for index in range(20)})
    assert all(output.finish_reason == "stop" for output in outputs.values())


def test_a_tokenizer_that_changed_on_disk_ends_the_request_alone() -> None:
    engine = noise_engine()
    with TOKENIZER_PATH.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        engine._tokenizer = KeptFile(file.fileno(), size_bytes=size, sha256="0" * 64, name="tokenizer.json")
    outputs = run(engine, [asking("a", json=PERSON), asking("plain", max_tokens=5)])
    assert outputs["a"].finish_reason == "error" and "tokenizer.json" in (outputs["a"].error or "")
    assert outputs["plain"].finish_reason == "length"
    engine.close()


def test_no_worker_outlives_its_engine() -> None:
    engine = noise_engine()
    one(engine, json=PERSON)
    assert engine._grammars is not None
    pids = [engine._grammars.matcher.pid, engine._grammars.admission.pid]
    engine.close()
    engine.close()
    assert all(pid is not None and gone(pid) for pid in pids)
    orphaned = noise_engine()
    orphaned.add(asking("bomb", json=BOMB))
    orphaned.step()
    assert orphaned._grammars is not None
    checker = orphaned._grammars.admission._checker
    assert checker is not None
    time.sleep(0.5)  # it compiles
    checker._socket.close()  # as a dying engine leaves it
    assert gone(checker.pid)
    orphaned.close()
