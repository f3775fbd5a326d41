"""Tokenizer, incremental detokenizer and stop strings: pieces joined are the whole, however they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import ArtifactError
from llmc.runtime.text import Detokenizer, StopMatcher, TextStream, Tokenizer
from tests.server.tiny_tokenizers import byte_fallback_json, byte_level_json

TEXTS = ["Hello world", "naïve café", "你好世界 😀👩‍👩‍👧 x", " leading", "tab\tnew\nline ", "", "\u0000\uffff�"]


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_bytes(byte_level_json() if request.param == "byte_level" else byte_fallback_json())


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=60), st.booleans())
def test_any_byte_level_ids_join_to_the_whole(ids: list[int], skip: bool) -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    detokenizer = Detokenizer(tokenizer, skip)
    joined = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert joined == tokenizer.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="helo wrd你é😀", max_size=40))
def test_any_byte_fallback_text_joins_to_the_whole(text: str) -> None:
    tokenizer = Tokenizer.from_bytes(byte_fallback_json())
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="helo wrd", min_size=1, max_size=12), st.text(alphabet="helo wrd你é😀", max_size=20))
def test_a_text_behind_a_prompt_is_what_it_adds_to_it(before: str, text: str) -> None:
    tokenizer = Tokenizer.from_bytes(byte_fallback_json())
    prompt, ids = tokenizer.encode(before), tokenizer.encode(text)  # whose first token holds a leading space
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    joined = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert tokenizer.decode(prompt) + joined == tokenizer.decode(prompt + ids)


def test_a_prompt_that_ends_in_half_a_character_adds_nothing() -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    prompt = [tokenizer.token_id(c) or 0 for c in "ðŁĺ"]  # three of the four bytes of an emoji
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    assert "".join(detokenizer.push([i]) for i in tokenizer.encode("hello")) == "hello"


def test_half_a_character_is_held_until_it_is_whole() -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    halves = [tokenizer.token_id(c) for c in "ðŁĺ"]  # three of the four bytes of an emoji
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in halves if i is not None] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_endless_broken_bytes_do_not_pile_up() -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    broken = tokenizer.token_id("ÿ")
    assert broken is not None
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([broken]) for _ in range(500))
    assert len(detokenizer._window) < 80
    assert (text + detokenizer.flush()).count("\ufffd") == 500


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_ids_past_the_vocabulary_give_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.num_tokens + 7]) == ""
    assert tokenizer.token_bytes(tokenizer.num_tokens + 7) == b""


def test_token_bytes_of_parts_of_a_character_join_to_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("你😀")
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode().strip() == "你😀"


def test_a_broken_tokenizer_file_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer.from_bytes(b'{"version": "1.0", "model": {"type": "Nothing"}}')


def test_truncation_of_the_file_is_switched_off() -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_buffer(byte_level_json())
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    assert len(Tokenizer.from_bytes(inner.to_str().encode()).encode("a b c d e f g h i j")) > 8


def run_matcher(text: str, stops: list[str], include: bool, cuts: list[int]) -> tuple[str, str | None]:
    matcher, shown, start = StopMatcher(stops, include), "", 0
    for cut in [*sorted(min(c, len(text)) for c in cuts), len(text)]:
        piece, matched = matcher.push(text[start:cut])
        shown, start = shown + piece, cut
        if matched is not None:
            return shown, matched
    return shown + matcher.flush(), None


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, by brute force: the match that ends first; of equal ends the longest."""
    ends = [(i + len(s), i, s) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    if not ends:
        return text, None
    end, start, stop = min(ends)
    return text[: end if include else start], stop


@settings(max_examples=400, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    st.booleans(),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_do_not_depend_on_the_cuts(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    assert run_matcher(text, stops, include, cuts) == expected(text, stops, include)


def test_a_part_of_a_stop_string_is_never_shown_early() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.push("answer</e") == ("answer", None)
    assert matcher.push("n") == ("", None)
    assert matcher.push("x") == ("</enx", None)
    assert matcher.push("</end>tail") == ("", "</end>")


@pytest.mark.parametrize(("include", "text"), [(False, "Hello "), (True, "Hello world")])
def test_text_stream_stops_across_tokens(include: bool, text: str) -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    ids = tokenizer.encode("Hello world, how are you")
    stream = TextStream(tokenizer, stop=["world"], include_stop=include)
    assert stream.push(ids, last=True) == text
    assert stream.matched_stop == "world"
    assert stream.num_tokens < len(ids)


def test_text_stream_ignores_stops_within_min_tokens() -> None:
    tokenizer = Tokenizer.from_bytes(byte_level_json())
    ids = tokenizer.encode("Hello world, how are you")
    stream = TextStream(tokenizer, stop=["world"], min_tokens=len(ids))
    assert stream.push(ids, last=True) == "Hello world, how are you"
    assert stream.matched_stop is None
