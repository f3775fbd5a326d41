"""The ops that GPU graphs are made of, as torch sees them: schema, fake rule and reference agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.compiler.pipeline import size_pipeline
from llmc.errors import ConfigError, UnsupportedModel
from llmc.kernels import gpu_ops, moe, ops, registry

ROW, ROWS = torch.randn(6), torch.randn(3, 6)
Q, CACHE = torch.randn(3, 4, 8), torch.randn(4, 2, 16, 8)
TABLES = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.int32)
LENGTHS, STARTS = torch.tensor([20, 3], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
K, ROW8, TABLE = torch.randn(3, 2, 8), torch.randn(8), torch.randn(30, 4)
POSITIONS, SLOTS = torch.tensor([3, 19, 2]), torch.tensor([[0, 40, -1]])
THREE = torch.ones(3)
SORTED = moe.sort.reference(torch.tensor([[1, 0], [1, 0], [0, 1]]), 2, 16)
SAMPLES: dict[str, tuple[Any, ...]] = {
    "rms_norm": (ROWS, ROW, 1e-6, 1.0, False),
    "add_rms_norm": (ROWS, ROWS, ROW, 1e-6, 0.0, True),
    "silu_mul": (ROWS, ROWS),
    "gelu_mul": (ROWS, ROWS, True),
    "rope_kv_write": (Q, K, K, POSITIONS, TABLE, TABLE, ROW8, None, 1e-6, 0.0, True, CACHE.clone(), CACHE.clone(), SLOTS, 0),
    "paged_attend": (Q, CACHE, CACHE, TABLES, LENGTHS, STARTS, 0, 0, 0.5, 0, 0.0, None),
    "plain_linear": (ROWS, torch.randn(5, 6), torch.randn(5)),
    "plain_grouped_linear": (ROWS, torch.randn(4, 5, 6), torch.tensor([3, 0, 3]), None),
    "plain_quantized_linear": (ROWS, torch.ones(5, 6, dtype=torch.int8), torch.rand(5, 1), torch.randn(5), 32),
    "moe_route": (ROWS, 2, True, True, False),
    "moe_sort": (torch.tensor([[3, 0], [0, 1]]), 4, 16),
    "moe_linear": (ROWS, torch.randn(2, 5, 6), *SORTED, torch.randn(2, 5), 6, 2),
    "moe_combine": (torch.randn(6, 5), torch.rand(3, 2)),
    "argmax": (ROWS,),
    "sample": (ROWS, THREE, torch.zeros(3, dtype=torch.int32), THREE.double(), -THREE.double(), POSITIONS, POSITIONS, True),
    "adjust_logits": (ROWS, None, POSITIONS[:, None].int() % 6, THREE[:, None], THREE[:, None], torch.ones(3, 3)),
    "token_logprobs": (ROWS, torch.tensor([0, 5, 2]), 2),
    "checked_tokens": (ROWS, torch.tensor([0, -1, 2])),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_op_is_well_made(name: str) -> None:
    torch.library.opcheck(ops.overload(name), SAMPLES[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_compiled_cpu_version_is_promised_where_there_is_one(name: str) -> None:
    shims = "".join(path.read_text() for path in Path(gpu_ops.__file__).parent.glob("*/cpu/*.cpp"))
    assert (ops.overload(name) in ops.C_SHIMS) is (re.search(rf"aoti_torch_cpu_llmc_{name}\b", shims) is not None)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [m for m in sys.modules if m.startswith("llmc.kernels.") and m.endswith("triton_impl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"pip install 'llmc\[cuda\]'"):
        registry.choose("argmax", ROWS)


def test_an_op_without_a_gpu_kernel_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no GPU kernel for llmc::embedding: none is registered"):
        registry.choose("embedding", ROWS)


def test_every_gpu_op_has_an_implementation() -> None:
    """But for products that the passes of a size put in the order of their experts: one that stays as it was is refused by name."""
    assert set(registry.OPS) == {*gpu_ops.GPU_OPS, "paged_attention"} - {"plain_grouped_linear"}
    assert "sort-experts" in [p.name for p in size_pipeline()]


def test_sizes_that_disagree_are_refused() -> None:
    with pytest.raises(RuntimeError, match="weight must be"):
        ops.overload("rms_norm")(ROWS, torch.ones(5), 1e-6, 0.0, True)
    with pytest.raises(RuntimeError, match="must agree"):
        ops.overload("add_rms_norm")(ROWS, ROW, ROW, 1e-6, 0.0, True)
    with pytest.raises(RuntimeError, match="must agree"):
        ops.overload("silu_mul")(ROWS, ROW)
