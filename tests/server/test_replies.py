"""Reasoning and tool calls taken out of replies: the same however the text was cut, nothing raised, no half tag shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.server.chat_reply import ChatReply
from llmc.runtime.text.channel_reply import ChannelReply
from llmc.runtime.text.reply import Piece, Reply, ReplyParser
from llmc.runtime.text.reply_formats import choose_formats, format_names, read_stored_formats, stored_formats
from llmc.runtime.text.tagged_reply import TaggedReply
from tests.server.test_chat_template import CHATML, TOOLS_LIKE

NAMES = frozenset({"get_weather", "f"})
CALL = '{"name": "get_weather", "arguments": {"city": "Paris \\u00e9 \\"x\\"", "days": [1, 2.5e3, null, true]}}'
HARMONY = choose_formats(reasoning="openai_gptoss", tools="openai", template=None)
ARGUMENTS = CALL.partition('"arguments": ')[2][:-1]


def parser(reasoning: str = "none", tools: str = "none", *, in_reasoning: bool | None = None) -> ReplyParser:
    formats = choose_formats(reasoning=reasoning, tools=tools, template=None)
    if formats.channels is not None:
        return ChannelReply(formats.channels, calls=formats.tools is not None)
    return TaggedReply(reasoning=formats.reasoning, tools=formats.tools, tool_names=NAMES, in_reasoning=in_reasoning)


def read(made: ReplyParser, pieces: list[str], *, cut: bool = False) -> Reply:
    reply = Reply()
    for piece in pieces:
        reply.add(made.push(piece))
    reply.add(made.finish(cut=cut))
    return reply


def shown(reply: Reply) -> tuple[str, str, list[tuple[str, str]]]:
    return "".join(reply.reasoning), "".join(reply.content), [(c.name, c.arguments) for c in reply.calls.values()]


def test_one_call_alone_however_many_come_at_once() -> None:
    reply = ChatReply(parser(tools="hermes"), reasoning=None, tools=None, include_reasoning=True, parallel=False)
    pieces = reply.add(f"<tool_call>{CALL}</tool_call>" * 2, "stop")
    assert [piece.text for piece in pieces if piece.kind == "call"] == ["get_weather"]
    assert len(reply.message("")["tool_calls"]) == 1


# (reasoning, tools, in_reasoning, text) -> (reasoning, content, calls)
CASES: dict[str, tuple[tuple[str, str, bool | None], str, tuple[str, str, list[tuple[str, str]]]]] = {
    "qwen3": (("qwen3", "none", None), "<think>\nhm < 3\n</think>\n\nYes. \n", ("hm < 3", "Yes. \n", [])),
    "prompt opened": (("qwen3", "none", True), "hm\n</think>\n\nYes", ("hm", "Yes", [])),
    "tag repeated": (("qwen3", "none", True), "<think>\nhm</think>Yes", ("hm", "Yes", [])),
    "no thinking": (("qwen3", "none", False), " <think> is a tag", ("", " <think> is a tag", [])),
    "later tag is text": (("qwen3", "none", None), "The <think> tag and </think>", ("", "The <think> tag and </think>", [])),
    "never closed": (("qwen3", "none", None), "<think>hm </thin king", ("hm </thin king", "", [])),
    "mistral thinks": (("mistral", "none", None), "[THINK]a[/THINK]b", ("a", "b", [])),
    "hermes": (
        ("qwen3", "hermes", None),
        f"<think>x</think>\nLet me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{\"name\":\"f\"}}</tool_call>",
        ("x", "Let me see.", [("get_weather", ARGUMENTS), ("f", "{}")]),
    ),
    "hermes, text after": (("none", "hermes", None), f"a <tool_call>{CALL}</tool_call> b ", ("", "ab ", [("get_weather", ARGUMENTS)])),
    "no end mark": (("none", "hermes", None), f"<tool_call>{CALL}", ("", "", [("get_weather", ARGUMENTS)])),
    "arguments first": (
        ("none", "hermes", None),
        '<tool_call>{"id": [1], "arguments": {"a": {}}, "x": 1.5, "name": "f"}</tool_call>',
        ("", "", [("f", '{"a": {}}')]),
    ),
    "arguments as text": (
        ("none", "hermes", None),
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", "", [("f", '{"a": 1}')]),
    ),
    "line end in a string": (
        ("none", "hermes", None),
        '<tool_call>{"name":"f","arguments":{"a":"x\ny"}}',
        ("", "", [("f", '{"a":"x\\ny"}')]),
    ),
    "not JSON": (("none", "hermes", None), "<tool_call>nothing</tool_call>", ("", "<tool_call>nothing</tool_call>", [])),
    "half a call": (
        ("none", "hermes", None),
        '<tool_call>{"name": "f", "arguments": {"a": ',
        ("", '<tool_call>{"name": "f", "arguments": {"a": ', []),
    ),
    "a call after a broken one": (
        ("none", "hermes", None),
        f'<tool_call>{{"name": "f", "arguments": {{oops}}}}</tool_call><tool_call>{CALL}</tool_call>',
        ("", '<tool_call>{"name": "f", "arguments": {oops}}</tool_call>', [("get_weather", ARGUMENTS)]),
    ),
    "llama": (("none", "llama3_json", None), ' {"name": "f", "parameters": {"a": 1}}', ("", "", [("f", '{"a": 1}')])),
    "llama, several": (
        ("none", "llama3_json", None),
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {"a": 1}}',
        ("", "", [("f", "{}"), ("get_weather", '{"a": 1}')]),
    ),
    "llama, JSON that is no call": (("none", "llama3_json", None), '{"name": "Ada", "age": 36}', ("", '{"name": "Ada", "age": 36}', [])),
    "llama, text": (("none", "llama3_json", None), 'It is {"name": "f"} ', ("", 'It is {"name": "f"} ', [])),
    "mistral list": (
        ("none", "mistral", None),
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]',
        ("", "", [("f", '{"a": 1}'), ("get_weather", "{}")]),
    ),
    "mistral named": (
        ("none", "mistral", None),
        'Hi[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]x[ARGS]{}',
        ("", "Hi", [("f", '{"a": 1}'), ("get_weather", "{}")]),
    ),
    "mistral, half a list": (
        ("none", "mistral", None),
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name"',
        ("", ', {"name"', [("f", "{}")]),
    ),
    "harmony": (
        ("openai_gptoss", "openai", None),
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|> {} ",
        ("hm", "One moment.", [("f", '{"a": 1}'), ("get_weather", "{}")]),
    ),
    "harmony, answer": (
        ("openai_gptoss", "none", None),
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>x < y<|return|>",
        ("a\nb", "x < y", []),
    ),
    "harmony, broken call": (
        ("openai_gptoss", "openai", None),
        "<|channel|>commentary to=functions.f<|message|>{oops}<|call|><|start|>assistant<|channel|>final<|message|>x",
        ("", "{oops}\nx", []),
    ),
    "harmony, forgotten": (("openai_gptoss", "openai", None), " plain < text", ("", " plain < text", [])),
    "harmony, header never ends": (("openai_gptoss", "openai", None), "<|channel|>analysis", ("", "", [])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_replies_at_every_cut(name: str) -> None:
    (reasoning, tools, opened), text, expected = CASES[name]
    assert shown(read(parser(reasoning, tools, in_reasoning=opened), [text])) == expected
    assert shown(read(parser(reasoning, tools, in_reasoning=opened), list(text))) == expected
    for at in range(len(text) + 1):
        assert shown(read(parser(reasoning, tools, in_reasoning=opened), [text[:at], text[at:]])) == expected, at


@pytest.mark.parametrize("name", CASES)
def test_no_half_tag_is_shown_when_a_reply_is_cut_off(name: str) -> None:
    (reasoning, tools, opened), text, _ = CASES[name]
    formats = choose_formats(reasoning=reasoning, tools=tools, template=None)
    if name in ("no thinking", "later tag is text", "never closed") or (tools != "none" and formats.channels is None):
        return  # tags that are text there; and half a call is given as text
    for at in range(len(text)):
        seen = "".join(shown(read(parser(reasoning, tools, in_reasoning=opened), [text[:at]], cut=True))[:2])
        assert "think" not in seen.lower() and "<|" not in seen, seen


FORMATS = [(r, t) for r in ("none", "qwen3", "deepseek_r1") for t in ("none", "hermes", "llama3_json", "mistral")]
FORMATS += [("openai_gptoss", "openai"), ("openai_gptoss", "none"), ("none", "openai")]
FRAGMENTS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|channel|>", "<|message|>"]
FRAGMENTS += ["<|end|>", "<|call|>", "<|start|>assistant", "analysis", "final", " to=functions.f", CALL, '{"name":', '"f"', '"arguments":']
FRAGMENTS += ["{", "}", "[", "]", ",", ":", ";", '"', "\\", "\n", " ", "x", "<", "1", "null", "\x00", "é😀", "\ufffd", "\\ud800"]


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.randoms(use_true_random=False), st.booleans())
def test_any_text_at_any_cuts(chosen: tuple[str, str], fragments: list[str], random: Any, cut: bool) -> None:
    text = "".join(fragments)
    whole = shown(read(parser(*chosen), [text], cut=cut))
    assert shown(read(parser(*chosen), list(text), cut=cut)) == whole
    pieces, start = [], 0
    while start < len(text):
        size = random.randint(1, 9)
        pieces.append(text[start : start + size])
        start += size
    assert shown(read(parser(*chosen), pieces, cut=cut)) == whole
    for name, arguments in whole[2]:
        assert name and isinstance(json.loads(arguments), dict)
    json.dumps(whole, ensure_ascii=False).encode()  # nothing that an answer could not carry


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8), st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists), max_size=4
    )
)
def test_any_arguments_come_through(arguments: dict[str, Any]) -> None:
    text = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)
    ((name, read_back),) = shown(read(parser("none", "hermes"), [f"<tool_call>{text}</tool_call>"]))[2]
    assert name == "f" and json.loads(read_back) == arguments


def test_a_channel_that_the_prompt_opened() -> None:
    channels = choose_formats(reasoning="openai_gptoss", tools="openai", template=None).channels
    assert channels is not None
    text = "hm<|end|><|start|>assistant<|channel|>final<|message|>x"
    for header, expected in (("assistant<|channel|>analysis", ("hm", "x", [])), ("", ("", "hm\nx", []))):
        assert shown(read(ChannelReply(channels, calls=True, opened=header), list(text))) == expected


def test_arguments_are_streamed_as_they_are_written() -> None:
    made = parser("none", "hermes")
    made.push('<tool_call>\n{"name": "f", "argum')
    assert made.push('ents": {"text": "once') == [Piece("arguments", '{"text": "once', 0)]
    assert made.push(" upon") == [Piece("arguments", " upon", 0)]


def test_a_long_reply_takes_time_in_proportion() -> None:
    import time

    started = time.perf_counter()
    for text in ("x" * 50_000, "<" * 50_000, '<tool_call>{"name":"f","arguments":{"a":"' + "y" * 50_000):
        made = parser("qwen3", "hermes", in_reasoning=False)
        for at in range(0, len(text), 4):
            made.push(text[at : at + 4])
        made.finish(cut=True)
    assert time.perf_counter() - started < 10


def test_plain_content_is_not_touched() -> None:
    text = "  \n a  <b> \n\n"
    assert shown(read(parser("qwen3", "hermes"), list(text))) == ("", text, [])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, (None, None)),
        (TOOLS_LIKE, ("qwen3", None)),
        (TOOLS_LIKE + '<tool_call>{"name": <n>, "arguments": <a>}</tool_call>', ("qwen3", "hermes")),
        ("{% if '</think>' in content %}<｜Assistant｜>", ("deepseek_r1", None)),
        ("<tool_call><function=x></tool_call> arguments", (None, None)),
        ("[INST] [TOOL_CALLS]", (None, "mistral")),
        ('<|start_header_id|> Environment: ipython {"name": n, "parameters": d}', (None, "llama3_json")),
        ("<|start|><|channel|>analysis<|message|>functions.", ("openai_gptoss", "openai")),
        (None, (None, None)),
    ],
)
def test_formats_are_read_off_the_template(template: str | None, expected: tuple[str | None, str | None]) -> None:
    found = choose_formats(reasoning=None, tools="", template=template)
    assert (found.reasoning and found.reasoning.name, found.tools and found.tools.name) == expected
    assert choose_formats(reasoning="none", tools="none", template=template).markers == ()


def test_names_that_are_not_known_or_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"accepted: deepseek_r1.*none"):
        choose_formats(reasoning="magic", tools=None, template=None)
    with pytest.raises(ConfigError, match="exclude each other"):
        choose_formats(reasoning="openai_gptoss", tools="hermes", template=None)


@pytest.mark.parametrize(
    ("reasoning", "tools"), [("qwen3", "hermes"), ("openai_gptoss", "openai"), ("none", "llama3_json"), ("none", "none")]
)
def test_an_artifact_keeps_its_formats(reasoning: str, tools: str) -> None:
    """A later llmc reads replies by what the artifact holds, whatever its own table says by then."""
    chosen = choose_formats(reasoning=reasoning, tools=tools, template=None)
    data = stored_formats(chosen)
    own = read_stored_formats(data, "a")
    assert stored_formats(own) == data and own.markers == chosen.markers
    assert choose_formats(reasoning="", tools=None, template="[INST] [TOOL_CALLS]", own=own) == own
    if own.tools is not None and own.tools.begin:
        other = read_stored_formats(data.replace(own.tools.begin.encode(), b"<call>"), "a")
        named = choose_formats(reasoning="none", tools=tools, template=None, own=other).tools
        assert named is not None and named.begin == "<call>", "its own, where its name is asked for"
        elsewhere = choose_formats(reasoning="none", tools="mistral", template=None, own=other).tools
        assert elsewhere is not None and elsewhere.begin == "[TOOL_CALLS]"
    nothing = choose_formats(reasoning="none", tools="none", template=None, own=own)
    assert nothing.reasoning is None and nothing.tools is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["tools"].update(begin=""), "'hermes' has an empty mark"),
        (lambda d: d["tools"].update(arguments_keys=[]), "'hermes' has an empty mark or key"),
        (lambda d: d["reasoning"].update(close=""), "'qwen3' has an empty mark"),
        (lambda d: d["reasoning"].update(close="<think>x"), "holds another, '<think>'"),
        (
            lambda d: d["tools"].update(channels=json.loads(stored_formats(HARMONY))["tools"]["channels"]),
            "one format is written in channels",
        ),
        (lambda d: d["tools"].update(extra=1), "unknown field"),
        (lambda d: d["tools"].update(begin=7), "Expected `str`"),
        (lambda d: d.update(reasoning=[]), "Expected"),
        (lambda d: d["tools"].update(begin="x" * 70_000), "more than formats of replies take"),
    ],
)
def test_formats_that_no_reply_can_be_read_by_are_refused(change: Callable[[Any], None], says: str) -> None:
    formats = json.loads(stored_formats(choose_formats(reasoning="qwen3", tools="hermes", template=None)))
    change(formats)
    with pytest.raises(ArtifactError, match=says):
        read_stored_formats(json.dumps(formats).encode(), "tokenizer/reply_formats.json")


def test_no_mark_of_a_format_holds_another() -> None:
    """The search for the first mark relies on it."""
    for reasoning in [*format_names()[0], "none"]:
        for tools in [*format_names()[1], "none"]:
            try:
                marks = choose_formats(reasoning=reasoning, tools=tools, template=None).markers
            except ConfigError:
                continue
            assert not [(a, b) for a in set(marks) for b in set(marks) if a != b and a in b]
