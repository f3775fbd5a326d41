"""From a model to a plan, with no GPU: its launches, run in Triton's interpreter, answer as the captured graph does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.artifacts.plan import decode_plan, encode_plan
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.cuda.memory import pack
from llmc.compiler.cuda.planner import PlannedProgram, _inductor_accesses, scalar
from llmc.compiler.cuda.program import compile_program, with_next_tokens
from llmc.compiler.cuda.sizes import PlanSize
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import pipeline
from llmc.errors import InternalError
from llmc.kernels.cuda_targets import cuda_target
from llmc.passes import PassContext, run_passes
from tests.architectures import save_tiny_model
from tests.compiler.paged_steps import PagedSteps
from tests.compiler.weights import load_constants, with_weights

ROOT = Path(__file__).parents[2]
H200 = cuda_target("cuda:h200")
SIZES = {"T": 8, "B": 2, "N": 2, "M": 8}
NUM_BLOCKS = 12  # at run time; the plan was made for another number and must not care

MIXED = ("gemma3_text",)  # models that name the kind of each layer

Work = Sequence[tuple[int, Sequence[int]]]
STEPS: list[Work] = [[(0, [5, 6, 7]), (1, [300, 9])], [(0, [8]), (1, list(range(40, 47)))], [(1, [11]), (0, [12])]]


def planned(architecture: str, folder: Path, level: int) -> tuple[PlannedProgram, TracedModel, dict[str, Tensor], torch.nn.Module]:
    """The plan, the traced model it is of, its constants, and the captured graph with weights: the oracle."""
    layers = {} if architecture in MIXED else {"num_hidden_layers": 3}
    save_tiny_model(architecture, folder, torch.float32, **layers)
    source = read_model(folder)
    traced = capture(source)
    oracle = with_weights(traced.graph, load_constants(source, traced.constants))
    traced = capture(source)
    table = traced.weight_table()
    run_passes(traced.graph, pipeline(level, kind="cuda"), PassContext(weights=table, max_positions=traced.max_model_len))
    with_next_tokens(traced.graph)
    size = PlanSize(decode=False, num_tokens=SIZES["T"], num_seqs=SIZES["B"], num_logits=SIZES["N"])
    made = compile_program(traced.graph, traced.inputs, [size], H200, table_blocks=SIZES["M"])
    return made.plans[size], traced, load_constants(source, table.constants), oracle


def padded(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The seven inputs of a step at the plan's sizes: tokens of no sequence have slot -1, missing sequences have no tokens."""
    ids, positions, rows, slots, tables, lengths, starts = inputs[:7]
    tokens, sequences = SIZES["T"] - ids.numel(), SIZES["B"] - lengths.numel()

    def end(x: Tensor, count: int, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, count), value=value)

    return [
        end(ids, tokens, 0),
        end(positions, tokens, 0),
        end(rows, SIZES["N"] - rows.numel(), 0),
        end(slots, tokens, -1),
        torch.nn.functional.pad(tables, (0, 0, 0, sequences)),
        end(lengths, sequences, 0),
        end(starts, sequences, int(starts[-1])),
    ]


def run(program: PlannedProgram, traced: TracedModel, constants: dict[str, Tensor], folder: Path, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Logits and largest tokens of each of STEPS, from the plan as a file, in a process of its own."""
    (folder / "plan.json").write_bytes(encode_plan(program.plan))
    (folder / "sources.json").write_text(json.dumps([dataclasses.asdict(source) for source in program.sources]))
    names = [spec.name for spec in traced.inputs]
    world = PagedSteps(traced.kv, num_blocks=NUM_BLOCKS, width=SIZES["M"])
    memory = {region.name: constants[region.name].contiguous() for region in program.plan.regions if region.kind == "weight"}
    memory |= {name: torch.full_like(cache, float("nan")) for name, cache in zip(names[7:], world.caches, strict=True)}
    save_file({name: value.clone() for name, value in memory.items()}, folder / "memory.safetensors")
    steps = {
        f"{number}.{name}": value.contiguous()
        for number, work in enumerate(STEPS)
        for name, value in zip(names, padded(world.inputs(work)), strict=False)
    }
    save_file(steps, folder / "steps.safetensors")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    command = [sys.executable, "-m", "tests.cuda.run_plan", str(folder), str(seed)]
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = load_file(folder / "results.safetensors")
    return [(results[f"{number}.logits"], results[f"{number}.next_tokens"]) for number in range(len(STEPS))]


@pytest.mark.parametrize(
    ("architecture", "level"),
    [
        pytest.param(name, level, marks=pytest.mark.slow)  # test_parity.py runs qwen3's plans whenever tests are run
        for name in ("qwen3", "llama", "gemma3_text", "qwen3_moe", "gpt_oss")
        for level in (1, 2)
    ],
)
def test_a_plan_answers_as_the_captured_graph(architecture: str, level: int, tmp_path: Path) -> None:
    """The layers of a plan were compiled once each; at -O2 they are fused."""
    program, traced, constants, oracle = planned(architecture, tmp_path / "model", level)
    plan = program.plan
    assert decode_plan(encode_plan(plan), "plan") == plan
    weights = {region.name for region in plan.regions if region.kind == "weight"}
    assert weights == set(constants)
    (arena,) = [region for region in plan.regions if region.kind == "arena"]
    touched = sum((s.stop or 0) - s.start for launch in plan.launches for s in launch.writes if plan.regions[s.region].kind == "arena")
    assert arena.size_bytes is not None and 2 * arena.size_bytes < touched  # memory is used again
    world = PagedSteps(traced.kv, num_blocks=NUM_BLOCKS, width=SIZES["M"])
    expected = [world.run(oracle, work) for work in STEPS]
    for (got, tokens), want in zip(run(program, traced, constants, tmp_path, seed=1), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert torch.equal(tokens, want.argmax(-1))


def test_memory_that_only_changes_its_owner_is_not_read() -> None:
    """bf16 rotary kernels write through `in_out_ptr0` without loading it."""
    types = {"in_out_ptr0": "*bf16", "in_ptr0": "*bf16", "out_ptr1": "*bf16", "xnumel": "i32"}
    head = "import x\n\n@f(1)\n@triton.jit\ndef kernel(in_out_ptr0, in_ptr0, out_ptr1, xnumel):\n    a = tl.load(in_ptr0 + (i))\n"
    store = "    tl.store(in_out_ptr0 + (i), a)\n    tl.store(out_ptr1 + (i), a)\n"
    assert _inductor_accesses("k", types, head + store) == ({"in_ptr0"}, {"in_out_ptr0", "out_ptr1"})
    loaded = head + "    b = tl.load(in_out_ptr0 + (i))\n" + store
    assert _inductor_accesses("k", types, loaded) == ({"in_ptr0", "in_out_ptr0"}, {"in_out_ptr0", "out_ptr1"})
    with pytest.raises(InternalError, match="a pointer ws_ptr"):
        _inductor_accesses("k", {"ws_ptr": "*u8"}, loaded)
    with pytest.raises(InternalError, match="stores to its input in_ptr0"):
        _inductor_accesses("k", types, head + store + "    tl.store(in_ptr0 + (i), a)\n")


LIVES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 6)).map(lambda t: (t[0], t[1], t[1] + t[2])), max_size=12
)


@given(LIVES)
def test_packed_memory_overlaps_in_space_or_in_time_never_in_both(lives: list[tuple[int, int, int]]) -> None:
    offsets, size = pack(lives)
    for i, (nbytes, first, last) in enumerate(lives):
        assert offsets[i] % 256 == 0 and offsets[i] + nbytes <= size
        for j, (other, begin, end) in enumerate(lives[:i]):
            apart = offsets[i] + max(nbytes, 1) <= offsets[j] or offsets[j] + max(other, 1) <= offsets[i]
            assert apart or last < begin or end < first
    assert size <= sum(-(-max(n, 1) // 256) * 256 for n, _, _ in lives)


def test_scalars_are_the_bytes_a_kernel_gets() -> None:
    assert scalar("i32", -2).data == "feffffff"
    assert scalar("fp32", 1.0).data == "0000803f"
    assert scalar("i64", 1).data == "01" + "00" * 7
    with pytest.raises(InternalError, match="does not fit a kernel parameter of type i32"):
        scalar("i32", 1 << 40)
    with pytest.raises(InternalError, match="parameter of type tensordesc"):
        scalar("tensordesc", 0)
    assert msgspec.json.encode(scalar("i8", 1)) == b'{"kind":"scalar","data":"01"}'
