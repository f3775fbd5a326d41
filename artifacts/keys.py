"""Cache keys: what went into a compile, part by part, and the digest of it.

Two kinds. The *input key* is made without importing torch and finds a whole artifact; the *graph key* finds lowered code.
The parts are kept with the entry, so that a miss can be explained. No part may hold a path, a time, or HOME.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from llmc.artifacts.chunks import sha256_hex
from llmc.artifacts.stamps import StampFolder
from llmc.errors import ConfigError, InternalError

Kind = Literal["input", "graph"]
_READ_BYTES = 4 << 20

# What of a model folder can change the result of a compile. Weights in other formats are not read, so they do not count.
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A cache key: digest over kind and parts."""

    kind: Kind
    digest: str
    parts: Mapping[str, str]

    def __str__(self) -> str:
        return self.digest


@dataclass(frozen=True, kw_only=True)
class PartDifference:
    """A part of a key that differs; None on the side that has no such part."""

    part: str
    a: str | None
    b: str | None


def make_key(kind: Kind, parts: Mapping[str, str]) -> Key:
    """Hash named parts. Equal parts give equal keys, in whatever order they come.

    Raises:
        InternalError: a part is not text, or names a place on this machine.
    """
    home = os.path.expanduser("~")
    for name, value in parts.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InternalError(f"cache key part {name!r} is {type(value).__name__}, expected text; please report this")
        if home not in ("", "/", "~") and home in value:
            raise InternalError(f"cache key part {name!r} holds the home folder, so no other machine could hit it; please report this")
    ordered = dict(sorted(parts.items()))
    return Key(kind=kind, digest=sha256_hex(msgspec.json.encode({"kind": kind, "parts": ordered})), parts=ordered)


def input_key(parts: Mapping[str, str]) -> Key:
    """The key of a whole artifact: configuration, checkpoint hashes, flags, target, llmc's sources, toolchain versions."""
    return make_key("input", parts)


def graph_key(parts: Mapping[str, str]) -> Key:
    """The key of lowered code: canonical graph, passes and versions, target, toolchain, kernel sources, weight layout."""
    return make_key("graph", parts)


def explain(a: Mapping[str, str], b: Mapping[str, str]) -> list[PartDifference]:
    """Which parts of two keys differ."""
    return [PartDifference(part=part, a=a.get(part), b=b.get(part)) for part in sorted(a.keys() | b.keys()) if a.get(part) != b.get(part)]


def model_parts(folder: Path, stamps: StampFolder | None = None, *, num_threads: int = 2) -> dict[str, str]:
    """The key parts of a model folder: "model/<file>" -> SHA-256, for every file that can matter.

    A file hashed before and unchanged since (device, inode, size, mtime_ns, ctime_ns) is not read again.

    Raises:
        ConfigError: the folder or a file in it cannot be read.
    """
    stamps = stamps or StampFolder()
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(_MODEL_SUFFIXES) and entry.is_file())
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read as a model folder: {os.strerror(error.errno or 0)}") from error
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        digests = list(pool.map(lambda name: file_sha256(folder / name, stamps), names))
    return {f"model/{name}": digest for name, digest in zip(names, digests, strict=True)}


def file_sha256(path: Path, stamps: StampFolder) -> str:
    """SHA-256 of a file, by its stamp where one is valid.

    Raises:
        ConfigError: the file cannot be read, or changed while it was hashed.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            known = stamps.find(before)
            if known is not None and known.startswith("sha256:"):
                return known.removeprefix("sha256:")
            hasher = hashlib.sha256()
            while piece := file.read(_READ_BYTES):
                hasher.update(piece)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"{path}: was written to while it was hashed; compile again when it stands still")
    digest = hasher.hexdigest()
    stamps.remember(before, after, f"sha256:{digest}")
    return digest


def source_digest(folders: Mapping[str, Path], suffixes: tuple[str, ...] = (".py", ".cpp", ".h", ".toml", ".json", ".jinja")) -> str:
    """One SHA-256 over the sources in some folders, by relative name and content: the key part for llmc's own code.

    Args:
        folders: a name that stands for each folder -> the folder. The name is hashed, the place is not.
    """
    lines = []
    for name, folder in sorted(folders.items()):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file()):
            lines.append(f"{name}/{path.relative_to(folder).as_posix()} {sha256_hex(path.read_bytes())}\n")
    return sha256_hex("".join(lines).encode())
