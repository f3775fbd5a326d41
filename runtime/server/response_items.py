"""The output items of a response, and the events that tell of them while they grow."""

from __future__ import annotations

from typing import Any

from llmc.runtime.text import Piece

_KINDS = {"content": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call", "broken": "message"}


class ResponseItems:
    """Items in the order they came; the last one may be open. Each piece adds to it or opens the next."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._broken: set[int] = set()  # positions of calls that turned out to be text

    def add(self, piece: Piece, call_id: str | None) -> list[dict[str, Any]]:
        """Take one piece; returns its events. Changes this object."""
        events: list[dict[str, Any]] = []
        kind = _KINDS[piece.kind]
        if piece.kind == "broken" and self._open is not None and self._open["type"] == "function_call":
            self._broken.add(len(self._items) - 1)
        if self._open is None or self._open["type"] != kind or piece.kind == "call":
            events += self.close()
            events += self._begin(kind, piece, call_id)
        if piece.kind == "call":
            return events
        assert self._open is not None
        place = self._place()
        if kind == "function_call":
            self._open["arguments"] += piece.text
            return [*events, {"type": "response.function_call_arguments.delta", **place, "delta": piece.text}]
        part = self._open["content"][0]
        part["text"] += piece.text
        name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*events, {"type": name, **place, "content_index": 0, "delta": piece.text, **more}]

    def close(self, *, cut: bool = False) -> list[dict[str, Any]]:
        """End the open item; returns its events. `cut`: it was cut off."""
        item, self._open = self._open, None
        if item is None:
            return []
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        broken = place["output_index"] in self._broken
        if "status" in item:
            item["status"] = "incomplete" if broken or cut else "completed"
        done = {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}
        if item["type"] == "function_call":
            ended = {"type": "response.function_call_arguments.done", **place, "name": item["name"], "arguments": item["arguments"]}
            return [done] if broken else [ended, done]
        part = item["content"][0]
        text = {"content_index": 0, "text": part["text"]}
        if item["type"] == "reasoning":
            return [{"type": "response.reasoning_text.done", **place, **text}, done]
        return [
            {"type": "response.output_text.done", **place, **text, "logprobs": []},
            {"type": "response.content_part.done", **place, "content_index": 0, "part": part},
            done,
        ]

    def output(self, *, cut: bool) -> list[dict[str, Any]]:
        """The finished items; `cut`: the last one was cut off."""
        kept = [item for position, item in enumerate(self._items) if position not in self._broken]
        if cut and kept and "status" in kept[-1]:
            kept[-1] = {**kept[-1], "status": "incomplete"}
        return kept

    def reasoning_text(self) -> str:
        return "".join(item["content"][0]["text"] for item in self._items if item["type"] == "reasoning")

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items) - 1}

    def _begin(self, kind: str, piece: Piece, call_id: str | None) -> list[dict[str, Any]]:
        number = len(self._items)
        item: dict[str, Any]
        if kind == "function_call":
            item = {"type": kind, "id": f"fc_{self._request_id}_{number}", "status": "in_progress"}
            item |= {"call_id": call_id, "name": piece.text, "arguments": ""}
        elif kind == "reasoning":
            item = {"type": kind, "id": f"rs_{self._request_id}_{number}", "summary": []}
            item["content"] = [{"type": "reasoning_text", "text": ""}]
        else:
            item = {"type": kind, "id": f"msg_{self._request_id}_{number}", "status": "in_progress", "role": "assistant"}
            item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        self._items.append(item)
        self._open = item
        shown = {**item, "content": []} if kind != "function_call" else dict(item)
        events: list[dict[str, Any]] = [{"type": "response.output_item.added", "output_index": number, "item": shown}]
        if kind == "message":
            part = dict(item["content"][0])
            events.append({"type": "response.content_part.added", **self._place(), "content_index": 0, "part": part})
        return events
