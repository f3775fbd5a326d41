"""--executor: what the target and level have anyway may be named; anything else is refused with what to name instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.config.compile import CompileConfig, compile_config
from llmc.config.resolve import resolve
from llmc.errors import ConfigError


def compiled(**given: str) -> CompileConfig:
    return compile_config(Path("m"), Path("o"), resolve("compile", given, environ={}), force=False, use_cache=True)


@pytest.mark.parametrize(("executor", "target", "level"), [("nodes", "cpu", "0"), ("aoti", "cpu", "1"), ("plan", "cuda:sm_90", "2")])
def test_the_one_there_is_may_be_named(executor: str, target: str, level: str) -> None:
    given = {"target": target, "optimization_level": level}
    assert compiled(**given, executor=executor) == compiled(**given, executor="auto") == compiled(**given)


@pytest.mark.parametrize(
    ("executor", "target", "level", "says"),
    [
        ("plan", "cpu", "2", "a schedule of a GPU's kernels"),
        ("aoti", "cuda:h200", "2", "cannot be made without that GPU.*leave the flag out"),
        ("aoti", "cpu", "0", "-O0 compiles nothing"),
        ("nodes", "cpu", "2", "at -O0 alone"),
    ],
)
def test_another_is_refused(executor: str, target: str, level: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"--executor {executor} --target {target} -O{level}: .*{says}"):
        compiled(executor=executor, target=target, optimization_level=level)


def test_tvms_programs_are_not_aotinductors() -> None:
    with pytest.raises(ConfigError, match="those of --backend tvm; leave one of them out"):
        compiled(executor="aoti", backend="tvm")
