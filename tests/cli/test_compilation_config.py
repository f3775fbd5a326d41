"""-cc key by key, performance modes, and --passes from the command line to the configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from llmc.cli.options import rewrite
from llmc.config.compilation_config import FLAGS, REFUSED, arguments
from llmc.config.compile import CompileConfig, compile_config
from llmc.config.performance import MODES
from llmc.config.resolve import resolve
from llmc.errors import ConfigError

SPEC = tomllib.loads((Path(__file__).parents[1] / "data" / "flags.toml").read_text(encoding="utf-8"))


def keys(text: str) -> set[str]:
    """Keys of vLLM's CompilationConfig that the specification names, without nested ones."""
    found = {part for line in text.splitlines() if (part := line.partition('cli = "--compilation-config.')[2].rstrip('"'))}
    return {key.split(".")[0] for key in found}


def compiled(**flags: object) -> CompileConfig:
    return compile_config(Path("m"), Path("o"), resolve("compile", flags, environ={}), force=False, use_cache=True)


def test_every_key_of_the_specification_is_mapped_or_refused() -> None:
    named = keys((Path(__file__).parents[1] / "data" / "flags.toml").read_text(encoding="utf-8"))
    assert named
    assert named <= set(FLAGS) | set(REFUSED)
    assert not set(FLAGS) & set(REFUSED)


@pytest.mark.parametrize(
    ("spelling", "value", "expected"),
    [
        ("-cc", '{"mode": 1, "compile_sizes": [64, 128]}', ["--optimization-level=1", "--compile-sizes=64,128"]),
        ("--compilation-config", "2", ["--optimization-level=2"]),
        ("-cc.mode", "1", ["--optimization-level=1"]),
        ("-cc.cudagraph_capture_sizes", "[1,2,4]", ["--cudagraph-capture-sizes=1,2,4"]),
        ("-cc.cudagraph_capture_sizes", "1,2", ["--cudagraph-capture-sizes=1,2"]),
        ("-cc", '{"compile_sizes": null}', []),
    ],
)
def test_keys_become_flags(spelling: str, value: str, expected: list[str]) -> None:
    assert arguments(spelling, value) == expected
    assert rewrite("compile", ["model", f"{spelling}={value}", "--force"]) == ["model", *expected, "--force"]
    assert rewrite("compile", ["model", spelling, value]) == ["model", *expected]


@pytest.mark.parametrize(
    ("spelling", "value", "message"),
    [
        *((f"-cc.{key}", "1", key) for key in REFUSED),
        ("-cc", '{"pass_config": {"fuse_norm_quant": true}}', "--passes"),
        ("-cc.nonsense", "1", "'nonsense' is no key of it; llmc takes mode"),
        ("-cc", "{", "expected JSON"),
        ("-cc", "[1]", "expected JSON"),
        ("-cc", "true", "expected JSON"),
        ("-cc.mode", '{"a": 1}', "expected a number"),
        ("-cc.compile_sizes", "[[1]]", "expected a number"),
        ("-cc", "[" * 70000, "at most 65536"),
        ("-cc", "[" * 60000, "expected JSON"),
    ],
)
def test_other_keys_and_values_are_refused(spelling: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(spelling, value)


def test_a_missing_value_and_the_other_command_are_refused() -> None:
    with pytest.raises(ConfigError, match="-cc: its value is missing"):
        rewrite("compile", ["model", "-cc"])
    with pytest.raises(ConfigError, match="acts in `llmc compile`, not in `llmc serve`"):
        rewrite("serve", ["artifact", "-cc.mode=1"])
    with pytest.raises(ConfigError, match="read on the command line"):
        resolve("compile", {}, environ={"LLMC_COMPILATION_CONFIG": "{}"})


def test_a_performance_mode_sets_what_was_not_given() -> None:
    for name, mode in MODES.items():
        config = compiled(performance_mode=name)
        assert (config.max_num_seqs, config.max_num_batched_tokens) == (mode.max_num_seqs, mode.max_num_batched_tokens)
    assert compiled() == compiled(performance_mode="balanced")
    given = compiled(performance_mode="throughput", max_num_seqs="8", max_num_batched_tokens="64")
    assert (given.max_num_seqs, given.max_num_batched_tokens) == (8, 64)


def test_passes_are_part_of_what_is_compiled() -> None:
    config = compiled(passes="-fuse-silu-mul")
    assert config.passes == "-fuse-silu-mul"
    assert config.key_fields()["passes"] == "-fuse-silu-mul"
    with pytest.raises(ConfigError, match="neither .name nor -name"):
        compiled(passes="fuse-silu-mul")
    with pytest.raises(ConfigError, match="-O0 runs none"):
        compiled(passes="-fuse-silu-mul", optimization_level="0")
