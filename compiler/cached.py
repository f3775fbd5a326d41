"""Whole artifacts in the compile cache: found by the input key, before torch is imported."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.artifacts.keys import Key
from llmc.artifacts.store import Store
from llmc.compiler.stages import Stage, StageLog
from llmc.config.compile import CompileConfig
from llmc.errors import ArtifactError


@dataclass(frozen=True, kw_only=True)
class CompileResult:
    """What a compile did. `hit`: the artifact came from the cache."""

    out: Path
    key: str
    hit: bool
    stages: list[Stage]
    size_bytes: int
    weights_bytes: int
    code_bytes: int
    level: int
    target: str
    report: Mapping[str, Any]


def publish_from_cache(config: CompileConfig, store: Store, key: Key, log: StageLog) -> CompileResult | None:
    """Publish the cached artifact of `key` as `config.out`; None if there is none."""
    started = time.perf_counter()
    if store.place(key, config.out, force=config.force) is None:
        return None
    log.record(Stage(name="cache", seconds=time.perf_counter() - started, detail=f"hit, {config.out}"))
    return result(config, key, log, hit=True)


def remember(config: CompileConfig, store: Store, key: Key, log: StageLog) -> None:
    """Keep a published artifact. A cache that cannot be written to costs the next compile time, and says so, but this one is done."""
    with log.stage("remember") as note:
        try:
            kept = store.put(key, config.out, {"what": "artifact", "model": config.model.resolve().name, "level": config.level})
            note.detail = "in the compile cache" if kept else "larger than the compile cache, not kept"
        except ArtifactError as error:
            note.detail = f"not kept: {error}"


def result(config: CompileConfig, key: Key, log: StageLog, *, hit: bool) -> CompileResult:
    """Look at what was published."""
    manifest = json.loads((config.out / "manifest.json").read_bytes())
    sizes = {record["path"]: record["size_bytes"] for record in manifest["files"]}
    return CompileResult(
        out=config.out,
        key=key.digest,
        hit=hit,
        stages=log.stages,
        size_bytes=sum(sizes.values()) + (config.out / "manifest.json").stat().st_size,
        weights_bytes=sum(size for path, size in sizes.items() if path.startswith("weights/")),
        code_bytes=sum(size for path, size in sizes.items() if path.startswith(("images/", "programs/", "plans/"))),
        level=manifest["level"],
        target=manifest["target"]["name"],
        report=json.loads((config.out / "report" / "report.json").read_bytes()),
    )
