"""`--lora-modules`: which adapters are served under which names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from llmc.errors import ConfigError

MAX_ADAPTERS = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}", re.ASCII)  # what a client may send as `model`


class AdapterPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter to serve: what clients call it, and its folder."""

    name: str
    path: str
    base_model_name: str | None = None  # the parent that /v1/models shows; None: the first served name


def adapter_paths(given: Sequence[str]) -> list[AdapterPath]:
    """Parse values of `--lora-modules`: name=path, or a JSON object {"name", "path", "base_model_name"}.

    Raises:
        ConfigError: a value is neither, a name is used twice or holds more than letters, digits and "_.:/-".
    """
    found = [_parse(value) for value in given]
    if len(found) > MAX_ADAPTERS:
        raise ConfigError(f"--lora-modules names {len(found)} adapters, at most {MAX_ADAPTERS} are kept")
    names = [one.name for one in found]
    for one in found:
        check_name(one.name)
        if names.count(one.name) > 1:
            raise ConfigError(f"--lora-modules names {one.name!r} twice; give each adapter a name of its own")
        if not one.path or "\0" in one.path:
            raise ConfigError(f"--lora-modules {one.name}: no folder is named; write {one.name}=FOLDER")
    return found


def check_name(name: str) -> None:
    """Raises ConfigError for a name that no adapter may have."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:140]!r} is no name for an adapter: up to 128 letters, digits and _ . : / -, beginning with one of the first two"
        )


def _parse(value: str) -> AdapterPath:
    if value.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(value, type=AdapterPath)
        except msgspec.DecodeError as error:
            raise ConfigError(f'--lora-modules {value[:100]}: expected {{"name": ..., "path": ...}}, found {error}') from error
    name, equals, path = value.partition("=")
    if not equals:
        raise ConfigError(f"--lora-modules {value[:100]}: expected NAME=FOLDER or a JSON object")
    return AdapterPath(name=name, path=path)
