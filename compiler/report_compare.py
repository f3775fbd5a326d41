"""Two reports side by side: what differs, as rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.compiler.report_page import kernel_name

_SECONDS = "compile, seconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that differs. Numbers of bytes end in "bytes" in `name`; None: not there."""

    part: str
    name: str
    a: Any
    b: Any

    @property
    def factor(self) -> float | None:
        """b over a, where both are numbers and a is not zero."""
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (self.a, self.b))
        return self.b / self.a if numbers and self.a else None


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """What differs between two reports (report.json), measured facts included where both have them. Pictures are left out."""
    first, other = _summed(a), _summed(b)
    names = [*first, *(name for name in other if name not in first)]
    parts = list(dict.fromkeys(part for part, _ in names))
    names.sort(key=lambda name: parts.index(name[0]))  # what is in one report alone stands with its part
    return [
        Difference(part=part, name=name, a=first.get((part, name)), b=other.get((part, name)))
        for part, name in names
        if first.get((part, name)) != other.get((part, name))
    ]


def _summed(report: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """The facts by name; seconds of stages of one name are added."""
    found: dict[tuple[str, str], Any] = {}
    for name, value in _facts(report):
        found[name] = round(found[name] + value, 3) if name in found and name[0] == _SECONDS else value
    return found


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    for part in ("model", "target", "limits", "memory"):
        for name, value in report[part].items():
            yield (part, name), ", ".join(map(str, value)) if isinstance(value, list) else value
    for one in report["passes"]:
        yield ("passes", one["name"]), f"{one['matches']} matches, {one['nodes_before']} -> {one['nodes_after']} nodes"
    for kernel in report.get("kernels") or []:
        yield ("kernels", f"{kernel_name(kernel)} {kernel['dtype']}"), f"{kernel['count']} {'call' if kernel['count'] == 1 else 'calls'}"
    for op, count in report["ops"].items():
        yield ("operations", op), count
    for group in report["weights"]:
        yield ("weights", f"{group['kind']} bytes"), group["bytes"]
    for name, value in (report.get("quantization") or {}).items():
        yield ("quantization", name), ", ".join(f"{key}: {each}" for key, each in value.items()) if isinstance(value, dict) else value
    for name, value in (report.get("kv_quantization") or {}).items():
        yield ("KV cache", name), value
    measured = report.get("measured") or {}
    for stage in measured.get("stages", []):
        yield (_SECONDS, stage["name"]), stage["seconds"]
    for name, ms in measured.get("startup_ms", {}).items():
        yield ("start, ms", name), ms
    if "artifact_bytes" in measured:
        yield ("artifact", "artifact_bytes"), measured["artifact_bytes"]
