"""`llmc compile` from end to end: a model folder becomes an artifact.

    key -> (cache) -> read -> capture -> passes -> lower -> reference -> pack -> check -> publish

What is written here is the order; each step is a module of its own. torch is imported by `build` alone, so a cache hit never
waits for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from llmc.artifacts.store import Store
from llmc.artifacts.writer import ArtifactWriter, check_output
from llmc.compiler.cached import CompileResult, publish_from_cache, remember, result
from llmc.compiler.input_key import input_key
from llmc.compiler.stages import Checked, Silent, StageLog, StageObserver
from llmc.compiler.targets import Target, find_target
from llmc.compiler.tokenizer_files import Render
from llmc.config.compile import CompileConfig

# Runs a finished, unpublished artifact; raises if it answers otherwise than the reference.
Check = Callable[[Path], Checked]


def compile_model(
    config: CompileConfig,
    *,
    observer: StageObserver | None = None,
    render: Render | None = None,
    check: Check | None = None,
    store: Store | None = None,
) -> CompileResult:
    """Compile a model folder into an artifact at `config.out`.

    Args:
        observer: told of each stage as it starts and ends.
        render: the runtime's chat-template engine, to be compared with Jinja2.
        check: run on the finished folder before it gets its name.
        store: the compile cache, for whole artifacts and for lowered code; None compiles without one.

    Raises:
        ConfigError, UnsupportedModel, ArtifactError: nothing is published, and an artifact at `out` stays as it was.
    """
    log = StageLog(observer or Silent())
    check_output(config.out, force=config.force)
    target = find_target(config.target)
    with log.stage("key") as note:
        key = input_key(config, target)
        note.detail = key.digest[:12]
    if store is None:
        _build(config, target, log, render, check, None)
        return result(config, key, log, hit=False)
    with store.lock(key):  # of several compiles of one input, the first works and the others find its result
        if config.use_cache and (hit := publish_from_cache(config, store, key, log)) is not None:
            return hit
        _build(config, target, log, render, check, store)
        remember(config, store, key, log)
    return result(config, key, log, hit=False)


def _build(config: CompileConfig, target: Target, log: StageLog, render: Render | None, check: Check | None, store: Store | None) -> None:
    with log.stage("imports") as note:
        from llmc.compiler.build import build_artifact

        note.detail = "torch, transformers"
    with ArtifactWriter(config.out, force=config.force) as writer, tempfile.TemporaryDirectory(prefix="llmc-") as scratch:
        built = build_artifact(config, target, writer, Path(scratch), log=log, render=render, store=store)

        startup_ms: dict[str, float] = {}

        def checked(folder: Path) -> None:
            if check is not None:
                with log.stage("check") as note:
                    answer = check(folder)
                    note.detail = answer.detail
                    startup_ms.update(answer.startup_ms)

        writer.finish(built.manifest, before_naming=checked)
    built.write_measured(log.stages, config.out, startup_ms)
