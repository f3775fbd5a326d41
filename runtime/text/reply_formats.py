"""Which way a model writes reasoning and tool calls: chosen by name or from the chat template when it is compiled, kept in the artifact.

What can be chosen stands in reply_formats.toml. An artifact holds its own two in whole, so that it is read the same by a later llmc.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

import msgspec

from llmc.errors import ArtifactError, ConfigError

NONE = "none"
MAX_STORED_BYTES = 64 << 10


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Read from files."""


class Detect(_Record, frozen=True):
    """Texts of a chat template that make a format certain."""

    all: tuple[str, ...]
    none: tuple[str, ...] = ()

    def certain(self, template: str) -> bool:
        return all(text in template for text in self.all) and not any(text in template for text in self.none)


class ChannelFormat(_Record, frozen=True):
    """Replies made of messages on channels. Fields as reply_formats.toml explains them."""

    start: str
    channel: str
    message: str
    constrain: str
    ends: tuple[str, ...]
    reasoning: tuple[str, ...]
    recipient: str
    tool_recipient: str

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.start, self.channel, self.message, self.constrain, *self.ends)


class ReasoningFormat(_Record, frozen=True):
    """Reasoning between two tags, or in a channel."""

    name: str
    open: str = ""
    close: str = ""
    starts_open: bool = False
    history: tuple[str, ...] = ()
    channels: ChannelFormat | None = None
    detect: Detect | None = None


class ToolFormat(_Record, frozen=True):
    """Tool calls as JSON between marks, or in a channel."""

    name: str
    begin: str = ""
    end: str = ""
    name_key: str = "name"
    arguments_keys: tuple[str, ...] = ()
    list: bool = False
    named: bool = False
    bare: bool = False
    separator: str = ""
    ids: Literal["long", "short"] = "long"
    channels: ChannelFormat | None = None
    detect: Detect | None = None


class ReplyFormats(_Record, frozen=True):
    """What is known of one model's replies."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None

    @property
    def channels(self) -> ChannelFormat | None:
        """Set when the whole reply is in channels."""
        for part in (self.reasoning, self.tools):
            if part is not None and part.channels is not None:
                return part.channels
        return None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that must reach the parser even where they are special tokens."""
        if self.channels is not None:
            return self.channels.markers
        tags = (self.reasoning.open, self.reasoning.close) if self.reasoning is not None else ()
        marks = (self.tools.begin, self.tools.end) if self.tools is not None else ()
        return tuple(text for text in (*tags, *marks) if text)


_Format = TypeVar("_Format", ReasoningFormat, ToolFormat)


def choose_formats(*, reasoning: str | None, tools: str | None, template: str | None, own: ReplyFormats | None = None) -> ReplyFormats:
    """The formats of a model.

    Args:
        reasoning: name of a reasoning format; "none": leave replies as they are; None or "": from the template, where certain.
        tools: the same for tool calls.
        template: source of the model's chat template.
        own: what the artifact holds. It stands in place of the template, and for its own names in place of reply_formats.toml.

    Raises:
        ConfigError: an unknown name, or two formats that exclude each other.
    """
    known_reasoning, known_tools = _formats()
    if own is None:
        chosen_reasoning = _choose("reasoning_parser", reasoning, known_reasoning, template)
        chosen_tools = _choose("tool_call_parser", tools, known_tools, template)
    else:
        chosen_reasoning = _choose_own("reasoning_parser", reasoning, known_reasoning, own.reasoning)
        chosen_tools = _choose_own("tool_call_parser", tools, known_tools, own.tools)
    chosen = ReplyFormats(reasoning=chosen_reasoning, tools=chosen_tools)
    if _mixed(chosen):
        names = " and ".join(part.name for part in (chosen_reasoning, chosen_tools) if part is not None)
        raise ConfigError(f"the formats {names} exclude each other: one is written in channels, the other in tags; choose one kind")
    return chosen


def stored_formats(formats: ReplyFormats) -> bytes:
    """What an artifact holds of them: JSON, without what only choosing needs."""

    def plain(part: _Format | None) -> _Format | None:
        return None if part is None else msgspec.structs.replace(part, detect=None)

    kept = ReplyFormats(reasoning=plain(formats.reasoning), tools=plain(formats.tools))
    return msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n"


def read_stored_formats(data: bytes, where: str) -> ReplyFormats:
    """The formats that `stored_formats` wrote.

    Args:
        where: names the file in errors.

    Raises:
        ArtifactError: something else.
    """
    if len(data) > MAX_STORED_BYTES:
        raise ArtifactError(f"{where}: {len(data)} bytes are more than formats of replies take ({MAX_STORED_BYTES}); compile again")
    try:
        found = msgspec.json.decode(data, type=ReplyFormats)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where}: no formats of replies: {error}; compile again") from None
    if (fault := _fault(found)) is not None:
        raise ArtifactError(f"{where}: {fault}, which no reply can be read by; compile again")
    return found


def _fault(formats: ReplyFormats) -> str | None:
    """What the parsers rely on and these do not hold, if anything: they look for the first mark and go on behind it."""
    for part in (formats.reasoning, formats.tools):
        if part is None:
            continue
        if part.channels is not None:
            needed = [*part.channels.markers, part.channels.recipient, "".join(part.channels.ends)]
        elif isinstance(part, ReasoningFormat):
            needed = [part.open, part.close]
        else:
            needed = [part.begin, part.name_key, *(part.arguments_keys or [""])]
        if not all(needed):
            return f"the format {part.name!r} has an empty mark or key"
    if _mixed(formats):
        return "one format is written in channels, the other in tags"
    marks = set(formats.markers)
    held = [(a, b) for a in marks for b in marks if a != b and a in b]
    return f"the mark {held[0][1]!r} holds another, {held[0][0]!r}" if held else None


def _mixed(formats: ReplyFormats) -> bool:
    return len({part.channels for part in (formats.reasoning, formats.tools) if part is not None}) > 1


def format_names() -> tuple[list[str], list[str]]:
    """Names of the reasoning formats and of the tool formats."""
    reasoning, tools = _formats()
    return sorted(reasoning), sorted(tools)


def _choose(setting: str, name: str | None, known: dict[str, _Format], template: str | None) -> _Format | None:
    if name == NONE:
        return None
    if name:
        if name not in known:
            raise ConfigError(f"{setting}={name!r} is not known; accepted: {', '.join([*sorted(known), NONE])}")
        return known[name]
    certain = [f for f in known.values() if template and f.detect is not None and f.detect.certain(template)]
    return certain[0] if len(certain) == 1 else None


def _choose_own(setting: str, name: str | None, known: dict[str, _Format], own: _Format | None) -> _Format | None:
    if not name or (own is not None and name == own.name):
        return own
    return _choose(setting, name, known, None)


@cache
def _formats() -> tuple[dict[str, ReasoningFormat], dict[str, ToolFormat]]:
    table = tomllib.loads((files("llmc.runtime.text") / "reply_formats.toml").read_text(encoding="utf-8"))
    channels = {name: ChannelFormat(**_tuples(entry)) for name, entry in table["channels"].items()}

    def fields(name: str, entry: dict[str, Any]) -> dict[str, Any]:
        detect = Detect(**_tuples(entry["detect"])) if "detect" in entry else None
        found = channels[entry["channels"]] if "channels" in entry else None
        return {**_tuples(entry), "name": name, "detect": detect, "channels": found}

    return (
        {name: ReasoningFormat(**fields(name, entry)) for name, entry in table["reasoning"].items()},
        {name: ToolFormat(**fields(name, entry)) for name, entry in table["tools"].items()},
    )


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
