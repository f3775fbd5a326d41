"""--passes and --explain."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from llmc.compiler.explain_pass import all_passes, explain
from llmc.compiler.pass_choice import PassChoice, parse_choice
from llmc.compiler.pipeline import KINDS, LEVELS, pipeline
from llmc.errors import ConfigError
from llmc.passes import base


def names(level: int, passes: str = "", kind: str = "cpu", quantization: str | None = None) -> list[str]:
    return [p.name for p in pipeline(level, quantization, kind=kind, passes=passes)]


def test_a_pass_is_left_out_or_added_where_the_pipeline_puts_it() -> None:
    assert names(2, "-merge-qkv, -fuse-silu-mul") == [n for n in names(2) if n not in ("merge-qkv", "fuse-silu-mul")]
    added = names(1, "+fuse-rms-norm,-merge-gate-up")
    assert added == [n for n in names(2) if n in added]
    assert set(added) == {*names(1), "fuse-rms-norm"} - {"merge-gate-up"}
    assert names(2, "+merge-qkv") == names(2)


def test_every_list_is_a_part_of_the_highest_levels_in_its_order() -> None:
    for kind in KINDS:
        for level in LEVELS:
            assert names(level, kind=kind) == [n for n in names(LEVELS[-1], kind=kind) if n in names(level, kind=kind)]


@pytest.mark.parametrize(
    ("level", "passes", "message"),
    [
        (2, "fuse-silu-mul", "neither .name nor -name"),
        (2, "+", "neither .name nor -name"),
        (2, "-merge-qkv,", "neither .name nor -name"),
        (2, "-merge-qkv,+merge-qkv", "both added and left out"),
        (2, "-no-such-pass", "no pass 'no-such-pass' for this target; there are no-op-elimination"),
        (2, "+lower-moe-route", "no pass 'lower-moe-route' for this target"),
        (2, "-lower-linear", "the kernels need what it writes"),
        (0, "+merge-qkv", "-O0 runs none"),
    ],
)
def test_bad_choices_are_refused(level: int, passes: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(level, passes=passes)


def test_quantising_cannot_be_left_out_by_name() -> None:
    with pytest.raises(ConfigError, match="quantize-linear: the kernels need"):
        pipeline(2, "int8", passes="-quantize-linear")


def test_a_backend_without_an_ops_kernel_goes_without_its_pass() -> None:
    of_tvm = [p.name for p in pipeline(2, backend="tvm")]
    assert [n for n in names(2) if n not in of_tvm] == ["fuse-rope-kv-write"]
    with pytest.raises(ConfigError, match="no pass 'fuse-rope-kv-write' for this target"):
        pipeline(2, backend="tvm", passes="+fuse-rope-kv-write")


def test_an_empty_value_chooses_nothing() -> None:
    assert parse_choice("") == PassChoice()


def test_every_pass_explains_itself() -> None:
    for name in all_passes():
        found = explain(name)
        assert found.what.endswith(".")
        assert {"Before", "After", "Applies", "Why", "Order"} <= set(found.parts), name
        assert all(found.parts.values())
        assert found.runs, f"{name} runs nowhere"
        assert found.numerics.startswith(("exact", "close"))


def test_passes_that_no_level_runs_say_what_makes_them_run() -> None:
    where = {name: explain(name).runs for name in all_passes()}
    assert where["shard-tensor-parallel"] == {"cpu": ["--tensor-parallel-size"]}
    assert where["add-lora"] == {"cpu": ["--enable-lora"]}
    assert where["sort-experts"] == {"cuda": ["every level, for each size of a step"]}
    assert where["keep-quantized"] == {"cpu": ["checkpoints that are quantised already"]}
    assert {name: explain(name).optional for name in where} == {name: optional(name) for name in where}


def optional(name: str) -> bool:
    """By trying: whether some level's list goes without it when asked to."""
    for kind in KINDS:
        try:
            if name in names(LEVELS[-1], kind=kind) and name not in names(LEVELS[-1], f"-{name}", kind):
                return True
        except ConfigError:
            continue
    return False


def test_every_pass_file_is_explained() -> None:
    known = {type(applied) for applied in all_passes().values()}
    files = Path(base.__file__).parent.glob("*.py")
    made = {each for file in files for each in vars(importlib.import_module(f"llmc.passes.{file.stem}")).values() if isinstance(each, type)}
    assert {each for each in made if issubclass(each, base.Pass) and "name" in vars(each)} == known


def test_an_explanation_in_full() -> None:
    found = explain("fuse-silu-mul")
    assert found.what == "Fold silu(gate) * up into one op."
    assert found.parts["After"] == "llmc.silu_mul(gate, up)"
    assert found.runs == {"cpu": ["-O2", "-O3"], "cuda": ["-O2", "-O3"]}
    assert "bfloat16 0.016 relative" in found.numerics
    assert explain("prune-to-needed-rows").numerics == "exact: the same bits"
    with pytest.raises(ConfigError, match="no pass 'fuse'; there are no-op-elimination"):
        explain("fuse")
