"""`llmc compile` from end to end: a model folder becomes an artifact.

    key -> (cache) -> read -> capture -> passes -> reference -> lower -> pack -> check -> publish

What is written here is the order; each step is a module of its own. torch is imported by `build` alone, so a cache hit never
waits for it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmc.artifacts.store import Store
from llmc.artifacts.writer import ArtifactWriter, check_output
from llmc.compiler.cached import CompileResult, publish_from_cache, remember, result
from llmc.compiler.input_key import input_key
from llmc.compiler.search import OPTIONAL, refuse_unmeasurable, search, without
from llmc.compiler.stages import Checked, Silent, StageLog, StageObserver
from llmc.compiler.targets import Target, find_target
from llmc.compiler.tokenizer_files import TextSide
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError

# Runs a finished, unpublished artifact; raises if it answers otherwise than the reference.
Check = Callable[[Path], Checked]
# Times the decode step of a finished artifact in milliseconds, some runs.
TimeDecode = Callable[[Path], list[float]]


def compile_model(
    config: CompileConfig,
    *,
    observer: StageObserver | None = None,
    text: TextSide | None = None,
    check: Check | None = None,
    store: Store | None = None,
    time_decode: TimeDecode | None = None,
) -> CompileResult:
    """Compile a model folder into an artifact at `config.out`.

    Args:
        observer: told of each stage as it starts and ends.
        text: the runtime's chat-template engine, to be compared with Jinja2, and its formats of replies.
        check: run on the finished folder before it gets its name.
        store: the compile cache, for whole artifacts and for lowered code; None compiles without one.
        time_decode: times an artifact's decode step in a process of its own; -O3 needs it.

    Raises:
        ConfigError, UnsupportedModel, ArtifactError: nothing is published, and an artifact at `out` stays as it was.
    """
    log = StageLog(observer or Silent())
    check_output(config.out, force=config.force)
    target = find_target(config.target)
    with log.stage("key") as note:
        key = input_key(config, target)
        note.detail = key.digest[:12]
    if config.level == 3:
        refuse_unmeasurable(target, config.weights)
        if time_decode is None:
            raise ConfigError("-O3 times programs: compile with `llmc compile -O3`, or pass time_decode")
    if store is None:
        _build(_searched(config, log, text, store, time_decode), target, log, text, check, None)
        return result(config, key, log, hit=False)
    with store.lock(key):  # of several compiles of one input, the first works and the others find its result
        if config.use_cache and (hit := publish_from_cache(config, store, key, log)) is not None:
            return hit
        _build(_searched(config, log, text, store, time_decode), target, log, text, check, store)
        remember(config, store, key, log)
    return result(config, key, log, hit=False)


def _searched(
    config: CompileConfig, log: StageLog, text: TextSide | None, store: Store | None, time_decode: TimeDecode | None
) -> CompileConfig:
    """At -O3, the configuration with the fusions left out that do not pay here; any other as it is."""
    if config.level != 3:
        return config
    assert time_decode is not None
    with log.stage("search") as note, tempfile.TemporaryDirectory(prefix="llmc-search-") as folder:

        def artifact(removed: frozenset[str]) -> Path:
            out = Path(folder) / ("-".join(sorted(removed)) or "all")
            if not out.exists():
                # Other integers take the same time: what is timed is rounded to nearest, and bound by nothing.
                trial = replace(config, calibration="rtn", calibration_data=None, max_kl=None, trial=True)
                variant = replace(trial, level=2, passes=without(config.passes, removed), out=out, report=None, force=False)
                compile_model(variant, text=text, store=store)
            return out

        matched = {p["name"] for p in json.loads((artifact(frozenset()) / "manifest.json").read_bytes())["passes"] if p["matches"]}
        judged = search([n for n in OPTIONAL if n in matched], lambda removed: time_decode(artifact(removed)))
        note.detail = "; ".join(map(str, judged)) or "no fusion matches this model"
    return replace(config, passes=without(config.passes, frozenset(found.name for found in judged if not found.pays)))


def _build(config: CompileConfig, target: Target, log: StageLog, text: TextSide | None, check: Check | None, store: Store | None) -> None:
    with log.stage("imports") as note:
        from llmc.compiler.build import build_artifact

        note.detail = "torch, transformers"
    with ArtifactWriter(config.out, force=config.force) as writer, tempfile.TemporaryDirectory(prefix="llmc-") as scratch:
        built = build_artifact(config, target, writer, Path(scratch), log=log, text=text, store=store)

        startup_ms: dict[str, float] = {}

        def checked(folder: Path) -> None:
            if check is not None:
                with log.stage("check") as note:
                    answer = check(folder)
                    note.detail = answer.detail
                    startup_ms.update(answer.startup_ms)

        writer.finish(built.manifest, before_naming=checked)
    built.write_measured(log.stages, config.out, startup_ms)
