"""The Triton kernels: parity in Triton's interpreter, and machine code for sm_90 made without a GPU.

Whether Triton interprets is settled when it is first imported, so each half has a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install 'llmc[cuda]')")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def test_parity_and_bits_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1", LLMC_TRITON_TESTS="1"), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(builds: int, *cases: str, target: str = "cuda:h200") -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "llmc.kernels.aot", "--builds", str(builds), "--target", target, *cases],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


WEIGHT_FIRST = ("plain_linear bfloat16", "plain_quantized_linear", "moe_linear")


def check(kernels: list[dict[str, Any]]) -> None:
    """What every image must hold, and that decode and prefill are made of the same instructions: else a row's bits would differ."""
    assert {r["case"]: r["stack_bytes"] for r in kernels if r["stack_bytes"]} == {}, "registers were spilled"
    assert {r["case"]: r["shared_bytes"] for r in kernels if r["shared_bytes"] > 232448} == {}, "more shared memory than a block has"
    assert [r["case"] for r in kernels if r["images"] != 1] == [], "two builds of one kernel differ"
    for case in {r["case"] for r in kernels if r["case"].startswith("paged_attention ") and "fp32" not in r["case"]}:
        found = {r["entry"]: r for r in kernels if r["case"] == case}
        decode, prefill = found["segments_kernel"], found["prefill_kernel"]
        assert decode["matrix_instructions"] == prefill["matrix_instructions"] == ["wgmma"]
        assert decode["matrix_layouts"] == prefill["matrix_layouts"] != []
    for r in kernels:  # the weight's side of the instruction and its steps along K are the same for every number of rows
        if r["case"].startswith(WEIGHT_FIRST) and r["matrix_layouts"]:
            assert r["matrix_instructions"] == ["wgmma"]
            assert all(re.fullmatch(r"16, \d+, 16, 1", layout) for layout in r["matrix_layouts"]), r


def test_compiles_for_sm_90_without_a_gpu() -> None:
    cases = [
        "add_rms_norm",
        "silu_mul",
        "rope_kv_write qwen-0.6b",
        "paged_attention llama-8b",
        "plain_linear bfloat16 1",
        "plain_linear bfloat16 2048",
        "plain_linear bfloat16 tma 2048",
        "plain_quantized_linear uint8 64",
        "moe_sort 1024",
        "moe_linear 64",
        "sample",
    ]
    kernels = compiled(1, *cases)
    assert {r["case"] for r in kernels} == set(cases)
    check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_89"])
def test_attention_before_hopper_spills_nothing(target: str) -> None:
    cases = ("paged_attention llama-8b", "paged_attention llama-8b fp8", "paged_attention phi", "paged_attention gemma")
    kernels = compiled(1, *cases, target=target)
    assert {r["case"] for r in kernels} == set(cases)
    assert {(r["case"], r["entry"]): r["stack_bytes"] for r in kernels if r["stack_bytes"]} == {}, "registers were spilled"
    for case in cases:  # else a row's bits would depend on how many rows its sequence has in a step
        found = {r["entry"]: r for r in kernels if r["case"] == case}
        assert found["segments_kernel"]["matrix_layouts"] == found["prefill_kernel"]["matrix_layouts"] != []


@pytest.mark.slow
def test_every_kernel_twice_with_the_same_bits() -> None:
    check(compiled(2))
