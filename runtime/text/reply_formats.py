"""Which way a model writes reasoning and tool calls, read from reply_formats.toml, chosen by name or from the chat template."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeVar

from llmc.errors import ConfigError

NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Detect:
    """Texts of a chat template that make a format certain."""

    all: tuple[str, ...]
    none: tuple[str, ...] = ()

    def certain(self, template: str) -> bool:
        return all(text in template for text in self.all) and not any(text in template for text in self.none)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelFormat:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningFormat:
    """Reasoning between two tags, or in a channel."""

    name: str
    open: str = ""
    close: str = ""
    starts_open: bool = False
    history: tuple[str, ...] = ()
    channels: ChannelFormat | None = None
    detect: Detect | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyFormats:
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


def choose_formats(*, reasoning: str | None, tools: str | None, template: str | None) -> ReplyFormats:
    """The formats of a served model.

    Args:
        reasoning: name of a reasoning format; "none": leave replies as they are; None or "": from the template, where certain.
        tools: the same for tool calls.
        template: source of the model's chat template.

    Raises:
        ConfigError: an unknown name, or two formats that exclude each other.
    """
    known_reasoning, known_tools = _formats()
    chosen_reasoning = _choose("reasoning_parser", reasoning, known_reasoning, template)
    chosen_tools = _choose("tool_call_parser", tools, known_tools, template)
    chosen = ReplyFormats(reasoning=chosen_reasoning, tools=chosen_tools)
    parts = [part for part in (chosen_reasoning, chosen_tools) if part is not None]
    if len({part.channels for part in parts}) > 1:
        names = " and ".join(part.name for part in parts)
        raise ConfigError(f"the formats {names} exclude each other: one is written in channels, the other in tags; choose one kind")
    return chosen


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
