"""Cutting a graph into layers: the parts are the whole, and equal layers have one key."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.cuda.cross import cross_cuda
from llmc.compiler.cuda.layers import cut
from llmc.compiler.cuda.program import with_next_tokens
from llmc.compiler.cuda.schedule import direct_schedule
from llmc.compiler.cuda.specialise import specialise
from llmc.compiler.model import read_model
from llmc.compiler.pipeline import pipeline
from llmc.kernels.cuda_targets import cuda_target
from llmc.passes import PassContext, run_passes
from tests.architectures import save_tiny_model

H200 = cuda_target("cuda:h200")
DIMS = {"T": 8, "B": 2, "N": 2, "M": 8, "NB": 64}


def lowered(name: str, folder: Path, *, layers: int, level: int = 2) -> tuple[TracedModel, GraphModule]:
    """A traced model after the passes, and its graph at fixed sizes."""
    save_tiny_model(name, folder, torch.bfloat16, num_hidden_layers=layers)
    traced = capture(read_model(folder))
    run_passes(traced.graph, pipeline(level, kind="cuda"), PassContext(weights=traced.weight_table(), max_positions=traced.max_model_len))
    with_next_tokens(traced.graph)
    with cross_cuda(H200):
        return traced, specialise(traced.graph, traced.inputs, DIMS)


@pytest.mark.parametrize("level", [1, 2])
def test_parts_are_the_whole_and_equal_layers_are_one(level: int, tmp_path: Path) -> None:
    _, graph = lowered("llama", tmp_path / "model", layers=6, level=level)
    parts = cut(graph)
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    cut_calls = Counter(str(node.target) for part in parts for node in part.graph.graph.nodes if node.op == "call_function")
    assert cut_calls == calls
    read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr") if node.users}
    assert {name for part in parts for name in part.constants} == read
    # the first has the embedding, the last works on wanted rows, one part follows: all others are one program
    assert len(parts) == 7 and len({part.key for part in parts}) == 4
    assert len({part.key for part in parts[1:5]}) == 1


def test_a_part_takes_and_gives_tensors_that_exist_by_then(tmp_path: Path) -> None:
    _, graph = lowered("qwen3", tmp_path / "model", layers=4)
    known = set(graph.graph.find_nodes(op="placeholder"))
    for part in cut(graph):
        assert set(part.inputs) <= known
        known |= set(part.outputs)
    assert set(graph.graph.output_node().args[0]) <= known  # type: ignore[arg-type]


def test_layers_that_differ_have_different_keys(tmp_path: Path) -> None:
    """gemma3's layers alternate between a window and none, and take other rotary tables."""
    _, graph = lowered("mistral", tmp_path / "mistral", layers=4)
    _, wider = lowered("llama", tmp_path / "llama", layers=4)
    assert {part.key for part in cut(graph)}.isdisjoint(part.key for part in cut(wider)[:-1])


def test_a_fused_layer_needs_no_inductor(tmp_path: Path) -> None:
    _, graph = lowered("llama", tmp_path / "model", layers=4)
    middle = direct_schedule(cut(graph)[1].graph)
    assert middle is not None and not middle.kernels
    assert middle.calls["llmc.plain_linear.default"] == 4 and middle.calls["llmc.paged_attend.default"] == 1
    assert direct_schedule(cut(graph)[0].graph) is None  # an embedding is looked up by Inductor's kernel
