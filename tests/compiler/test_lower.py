"""Lowering: the image answers as the graph does, gives a row the same bits in any company, and comes out the same twice."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.artifacts.manifest import KVFacts
from llmc.compiler.capture import capture
from llmc.compiler.image import only_libtorch_has
from llmc.compiler.inductor import SHIM_NAMES, GeneratedCode
from llmc.compiler.lower import LoweredModel, called_ops, check_caches, lower_aoti
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import pipeline
from llmc.errors import InternalError, UnsupportedModel
from llmc.kernels.build import BuiltKernels, build_kernels
from llmc.kernels.isa import resolve_target
from llmc.passes import PassContext, run_passes
from tests.architectures import VOCAB, save_tiny_model
from tests.compiler.image_job import ImageJob
from tests.compiler.paged_steps import PagedSteps
from tests.compiler.weights import load_constants, with_weights
from tests.kernels.paged_attention_world import kernel_cache

TARGET = resolve_target("cpu:x86-64-v3")
PROMPT = list(range(5, 26))
OTHERS = [(1, [400, 17, 9]), (2, list(range(100, 137)))]


@dataclass(frozen=True, kw_only=True)
class World:
    """A tiny qwen3, compiled."""

    graph: torch.fx.GraphModule
    lowered: LoweredModel
    kv: KVFacts
    constants: dict[str, Tensor]
    captured: torch.nn.Module  # the graph before any pass, with weights: the oracle
    kernels: BuiltKernels

    def job(self, folder: Path) -> ImageJob:
        return ImageJob(folder=folder, lowered=self.lowered, kernels=self.kernels, kv=self.kv, constants=self.constants, width=VOCAB)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> World:
    return _compile("float32", tmp_path_factory)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> World:
    return _compile("bfloat16", tmp_path_factory)


@pytest.fixture(params=["fp32", "bf16"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


def _compile(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    # sizes that fill no vector: the last lanes of a row are where company could show
    save_tiny_model("qwen3", folder, getattr(torch, dtype), num_hidden_layers=2, hidden_size=72, intermediate_size=140)
    source = read_model(folder)
    traced = capture(source)
    captured = with_weights(traced.graph, load_constants(source, traced.constants))
    traced = capture(source)
    table = traced.weight_table()
    run_passes(traced.graph, pipeline(2), PassContext(weights=table, max_positions=traced.max_model_len))
    lowered = lower_aoti(traced.graph, TARGET, folder / "model.so")
    return World(
        graph=traced.graph,
        lowered=lowered,
        kv=traced.kv,
        constants=load_constants(source, table.constants),
        captured=captured,
        kernels=build_kernels(TARGET.isa, kernel_cache(tmp_path_factory)),
    )


def test_image_without_torch_agrees_with_the_captured_graph(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path)
    ours = job.world()
    job.step(ours, [(0, PROMPT[:9])])
    job.step(ours, [(0, PROMPT[9:]), *OTHERS], padding=2, threads=2)
    job.step(ours, [(2, [7]), (0, [8])])
    found = job.run()
    theirs = PagedSteps(world.kv)
    expected = [
        theirs.run(world.captured, [(0, PROMPT[:9])]),
        theirs.run(world.captured, [(0, PROMPT[9:]), *OTHERS], padding=2),
        theirs.run(world.captured, [(2, [7]), (0, [8])]),
    ]
    tolerance = 1e-4 if world.kv.dtype == "float32" else 0.08  # logits reach 3; bf16 carries 8 bits through two layers
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


def test_a_row_has_the_same_bits_alone_and_in_company(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path)
    alone, company, chunked, threaded = (job.world() for _ in range(4))
    first = [
        job.step(alone, [(0, PROMPT)]),
        job.step(company, [*OTHERS, (0, PROMPT)], padding=5),
        job.step(threaded, [(0, PROMPT), *OTHERS], threads=2),
    ]
    job.step(chunked, [(0, PROMPT[:4]), OTHERS[0]])
    job.step(chunked, [(0, PROMPT[4:-1])])
    first.append(job.step(chunked, [OTHERS[1], (0, PROMPT[-1:])], threads=2))
    second = [
        job.step(alone, [(0, [33])]),
        job.step(company, [(2, [44]), (1, [55]), (0, [33])], padding=1),
        job.step(threaded, [(0, [33]), (1, [66])], threads=2),
        job.step(chunked, [(1, [7]), (0, [33])]),
    ]
    found = job.run()
    place = [0, 2, 0, 1]
    for steps, places in ((first, place), (second, [0, 2, 0, 1])):
        rows = [found[step][row] for step, row in zip(steps, places, strict=True)]
        for row in rows[1:]:
            assert torch.equal(row, rows[0])


def test_our_tensors_give_the_bits_that_libtorchs_give(world: World, tmp_path: Path) -> None:
    assert only_libtorch_has(world.lowered.path) == []
    job = world.job(tmp_path)
    sequences = job.world()
    job.step(sequences, [(0, PROMPT), *OTHERS], threads=2)
    job.step(sequences, [(2, [7]), (0, [8])], padding=2)
    for ours, theirs in zip(job.run(), job.run(libtorch=True), strict=True):
        assert torch.equal(ours, theirs)


def test_two_compiles_in_different_folders_give_the_same_bytes(bf16: World, tmp_path: Path) -> None:
    again = lower_aoti(bf16.graph, TARGET, tmp_path / "another_name.so", jobs=2)
    assert again.sha256 == bf16.lowered.sha256
    assert str(tmp_path).encode() not in again.path.read_bytes()


def test_lowered_code_calls_only_llmc_ops_and_lists_them(world: World) -> None:
    assert set(world.lowered.calls) == {
        "llmc::embedding",
        "llmc::rms_norm",
        "llmc::add_rms_norm",
        "llmc::linear",
        "llmc::rope_kv_write",
        "llmc::paged_attend",
        "llmc::silu_mul",
    }
    assert world.lowered.calls["llmc::rope_kv_write"] == world.lowered.calls["llmc::paged_attend"] == 2


def test_every_constant_of_the_graph_is_one_of_the_image(world: World) -> None:
    read = {str(node.target) for node in world.graph.graph.nodes if node.op == "get_attr"}
    assert set(world.lowered.constants) == read  # same-shaped weights are not merged, though all fakes have address 0


def test_image_for_v3_has_no_avx512_instruction(world: World) -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(["objdump", "-d", str(world.lowered.path)], capture_output=True, text=True, check=True).stdout
    assert "%ymm" in listing
    assert "%zmm" not in listing
    assert "{%k" not in listing


def test_a_library_matrix_product_is_refused(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path, num_hidden_layers=1)
    traced = capture(read_model(tmp_path))
    with pytest.raises(UnsupportedModel, match="aoti_torch_cpu_mm_out"):
        lower_aoti(traced.graph, TARGET, tmp_path / "model.so")


_STEP = """
void AOTInductorModel::run_impl(
    auto arg3_1 = std::move(inputs[0]);
    auto arg4_1 = std::move(inputs[1]);
    auto arg3_1_size = arg3_1.sizes();
    {line}
    AOTI_TORCH_ERROR_CODE_CHECK({attention}(buf2, arg3_1, arg4_1, &buf7_handle));
    arg3_1.reset();
    arg4_1.reset();
"""


@pytest.mark.parametrize("line", ["aoti_torch_clone(arg4_1, &buf3)", "cpp_fused_copy_0((const float*)(arg4_1.data_ptr()), 7L)"])
def test_a_cache_used_outside_attention_is_refused(line: str) -> None:
    graph = torch.fx.Graph()
    caches = [graph.placeholder(name) for name in ("k_cache_0", "v_cache_0")]
    graph.output(caches[0])
    module = torch.fx.GraphModule(torch.nn.Module(), graph)

    def code(extra: str) -> GeneratedCode:
        return GeneratedCode(wrapper=_STEP.format(line=extra, attention=SHIM_NAMES["llmc::paged_attention"]), kernels="")

    check_caches(code(""), module)
    check_caches(code("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_llmc_rope_kv_write(buf1, arg3_1, arg4_1, &buf6_handle));"), module)
    assert called_ops(code("")) == {"llmc::paged_attention": 1}
    with pytest.raises(InternalError, match="v_cache_0 outside attention"):
        check_caches(code(line), module)
