"""Integers as people write them (1k, 25.6k, 2M, -1, auto) and sizes as they read them (1.5 kB)."""

from __future__ import annotations

import re
from decimal import Decimal

from llmc.errors import ConfigError

AUTO = -1  # what `auto` and `-1` mean for settings that allow it

_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30}
_NUMBER = re.compile(r"(-?\d+)|(\d+(?:\.\d+)?)([kmgKMG])")


def human_int(text: str) -> int:
    """Parse `1000`, `1k` (1000), `1K` (1024), `25.6k` (25600) or `-1`. Fractions go with decimal suffixes alone.

    Raises:
        ConfigError: any other text, or a fraction that is not a whole number of units.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no integer; write 4096, 4k (4000), 4K (4096) or 25.6k")
    plain, number, suffix = match.groups()
    if plain is not None:
        return int(plain)
    if suffix in _BINARY:
        if "." in number:
            raise ConfigError(f"{text!r}: a fraction needs a decimal suffix (k, m or g), not {suffix}")
        return int(number) * _BINARY[suffix]
    value = Decimal(number) * _DECIMAL[suffix]
    if value != int(value):
        raise ConfigError(f"{text!r} is {value}, not a whole number")
    return int(value)


def human_int_or_auto(text: str) -> int:
    """As `human_int`, with `auto` for -1.

    Raises:
        ConfigError: no integer, nor `auto`.
    """
    return AUTO if text.strip() == "auto" else human_int(text)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 kB"; decimal units, as disks and networks are sold."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
