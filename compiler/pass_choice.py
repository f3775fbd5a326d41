"""`--passes +name,-name`: a level's list with passes left out, or with passes that another level of the target has.

    "-fuse-silu-mul,+merge-qkv"   ->   PassChoice(added={"merge-qkv"}, removed={"fuse-silu-mul"})

Order is never chosen here: an added pass stands where the pipeline of the highest level puts it. What writes the ops that lowering needs
cannot be left out, or a row's bits would depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.errors import ConfigError

if TYPE_CHECKING:  # torch stands behind it, and a cache hit does not wait for torch
    from llmc.passes.base import Pass

REQUIRED = ("lower-linear", "lower-experts", "lower-plain-linear", "lower-plain-experts", "lower-moe-route", "quantize-linear",
            "quantize-plain-linear")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PassChoice:
    """Names of passes to add to a level's list and to leave out of it."""

    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    def apply(self, chosen: Sequence[Pass], highest: Sequence[Pass]) -> list[Pass]:
        """The passes of `highest` that are in `chosen` or added, and not removed, in order.

        Args:
            chosen: the level's own list. highest: that of the target's highest level, which holds every pass of `chosen`.

        Raises:
            ConfigError: a name that the target has no pass of, or one that must stay.
        """
        known, names = [p.name for p in highest], {p.name for p in chosen}
        for name in sorted(self.added | self.removed):
            if name not in known:
                raise ConfigError(f"--passes: no pass {name!r} for this target; there are {', '.join(known)}")
        if kept := sorted(self.removed & set(REQUIRED)):
            raise ConfigError(f"--passes -{kept[0]}: the kernels need what it writes, so it cannot be left out; use -O0 for no pass at all")
        return [p for p in highest if (p.name in names or p.name in self.added) and p.name not in self.removed]


def parse_choice(text: str) -> PassChoice:
    """Read the value of --passes.

    Raises:
        ConfigError: an entry without + or -, an empty one, or a name with both.
    """
    added: set[str] = set()
    removed: set[str] = set()
    for entry in (part.strip() for part in text.split(",")) if text else ():
        sign, name = entry[:1], entry[1:]
        if sign not in ("+", "-") or not name:
            raise ConfigError(f"--passes: {entry!r} is neither +name nor -name; for example --passes -fuse-silu-mul,+merge-qkv")
        (added if sign == "+" else removed).add(name)
    if both := sorted(added & removed):
        raise ConfigError(f"--passes: {both[0]} is both added and left out; keep one")
    return PassChoice(added=frozenset(added), removed=frozenset(removed))
