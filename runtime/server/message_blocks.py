"""The content blocks of an Anthropic message, and the events that tell of them while they grow."""

from __future__ import annotations

from typing import Any

import orjson

from llmc.runtime.text import Piece

_TYPES = {"content": "text", "broken": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"), "tool_use": ("input_json_delta", "partial_json")}


class MessageBlocks:
    """Blocks in the order they came; the last one may be open. Each piece adds to it or opens the next."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[list[str]] = []  # what each block holds: its text, or its arguments as JSON
        self._broken: set[int] = set()  # positions of calls that turned out to be text
        self._open = False

    def add(self, piece: Piece, call_id: str | None) -> list[dict[str, Any]]:
        """Take one piece; returns its events. Changes this object."""
        events: list[dict[str, Any]] = []
        kind = _TYPES[piece.kind]
        if piece.kind == "broken" and self._open and self._blocks[-1]["type"] == "tool_use":
            self._broken.add(len(self._blocks) - 1)
        if not self._open or self._blocks[-1]["type"] != kind or piece.kind == "call":
            events += self.close()
            events.append(self._begin(kind, piece, call_id))
        if piece.kind == "call" or not piece.text:
            return events
        self._texts[-1].append(piece.text)
        name, field = _DELTAS[kind]
        return [*events, {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": {"type": name, field: piece.text}}]

    def close(self) -> list[dict[str, Any]]:
        """End the open block; returns its event."""
        if not self._open:
            return []
        self._open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def content(self) -> list[dict[str, Any]]:
        """The finished blocks. A call whose arguments are no JSON object is text."""
        return [
            _whole(block, "".join(texts))
            for n, (block, texts) in enumerate(zip(self._blocks, self._texts, strict=True))
            if n not in self._broken
        ]

    def _begin(self, kind: str, piece: Piece, call_id: str | None) -> dict[str, Any]:
        block: dict[str, Any]
        if kind == "tool_use":
            block = {"type": kind, "id": call_id, "name": piece.text, "input": {}}
        elif kind == "thinking":
            block = {"type": kind, "thinking": "", "signature": ""}
        else:
            block = {"type": kind, "text": "", "citations": None}
        self._blocks.append(block)
        self._texts.append([])
        self._open = True
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}


def _whole(block: dict[str, Any], text: str) -> dict[str, Any]:
    if block["type"] != "tool_use":
        return {**block, block["type"]: text}
    try:
        arguments = orjson.loads(text) if text.strip() else {}
    except orjson.JSONDecodeError:  # valid JSON all the same, but deeper or with greater numbers than can be read
        arguments = None
    return {**block, "input": arguments} if isinstance(arguments, dict) else {"type": "text", "text": text, "citations": None}
