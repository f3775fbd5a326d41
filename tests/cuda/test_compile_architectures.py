"""Every architecture compiles for a GPU: a decode and a prefill plan each, every constant in both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.compiler.capture import capture
from llmc.compiler.cuda.program import CudaProgram, compile_program, with_next_tokens
from llmc.compiler.cuda.sizes import PlanSize
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import pipeline
from llmc.kernels.cuda_targets import cuda_target
from llmc.passes import PassContext, run_passes
from tests.architectures import NAMES, save_tiny_model

SIZES = [
    PlanSize(decode=True, num_tokens=4, num_seqs=4, num_logits=4),
    PlanSize(decode=False, num_tokens=96, num_seqs=8, num_logits=8),
]
# Models of which no layer is made of ops of ours alone: of LayerNorm there is none, and gpt_oss gates in a way of its own.
EVERY_LAYER_INDUCTORS = ("gpt2", "opt", "gpt_neox", "gpt_oss")


def kernels(program: CudaProgram) -> set[str]:
    """Names of the functions that plans launch."""
    return {source.function for made in program.plans.values() for source in made.sources}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_has_plans(name: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path, torch.bfloat16)
    traced = capture(read_model(tmp_path))
    table = traced.weight_table()
    run_passes(traced.graph, pipeline(2, kind="cuda"), PassContext(weights=table, max_positions=traced.max_model_len))
    with_next_tokens(traced.graph)
    program = compile_program(traced.graph, traced.inputs, SIZES, cuda_target("cuda:sm_90"), table_blocks=32)
    for made in program.plans.values():
        assert {region.name for region in made.plan.regions if region.kind == "weight"} == set(table)
        assert len(made.plan.launches) > 30
    assert (program.inductor == program.layers) is (name in EVERY_LAYER_INDUCTORS)
    experts = {"qwen3_moe": 6, "mixtral": 6, "gpt_oss": 6}
    assert program.size_passes == {"sort-experts": experts.get(name, 0)}
    assert ("moe_linear_kernel" in kernels(program)) == (name in experts)
