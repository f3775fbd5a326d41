"""How two cache keys differ, in lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.artifacts.keys import PartDifference


def difference_lines(differences: Iterable[PartDifference]) -> Iterator[str]:
    """`part: a there, b here`; of a part that is a JSON object, only the members that differ, as `part.member`."""
    for difference in differences:
        there, here = _members(difference.a), _members(difference.b)
        if there is None or here is None:
            yield f"{difference.part}: {difference.a} there, {difference.b} here"
            continue
        for name in sorted(there.keys() | here.keys()):
            if name not in there or name not in here or there[name] != here[name]:
                a, b = (json.dumps(side[name]) if name in side else "nothing" for side in (there, here))
                yield f"{difference.part}.{name}: {a} there, {b} here"


def _members(part: str | None) -> dict[str, Any] | None:
    if part is None or not part.startswith("{"):
        return None
    try:
        value = json.loads(part)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
