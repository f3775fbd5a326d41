"""What a captured graph promises besides the right answers: its inputs, its constants, its groups, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.compiler.attention_hook import LayerProbe, _forward
from llmc.compiler.canonical import canonical_graph
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.model import read_model
from llmc.errors import UnsupportedModel
from tests.architectures import save_tiny_model
from tests.compiler.paged_steps import PagedSteps
from tests.compiler.weights import load_constants, with_weights

aten = torch.ops.aten


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TracedModel]:
    folder = tmp_path_factory.mktemp("qwen3")
    save_tiny_model("qwen3", folder, torch.bfloat16)
    return folder, capture(read_model(folder))


def test_inputs_stand_in_the_documented_order(qwen3: tuple[Path, TracedModel]) -> None:
    _, traced = qwen3
    names = [spec.name for spec in traced.inputs]
    assert names[:7] == ["input_ids", "positions", "logits_indices", "slot_mapping", "block_tables", "seq_lens", "query_start_loc"]
    assert names[7:] == ["k_cache.0", "v_cache.0", "k_cache.1", "v_cache.1", "k_cache.2", "v_cache.2"]
    placeholders = [node.name for node in traced.graph.graph.nodes if node.op == "placeholder"]
    assert placeholders == [name.replace(".", "_") for name in names]
    assert traced.inputs[7].shape == ["NB", 2, 16, 16]
    assert traced.outputs[0].shape == ["N", 512]


def test_every_parameter_is_a_constant_once_and_none_has_memory(qwen3: tuple[Path, TracedModel]) -> None:
    folder, traced = qwen3
    source = read_model(folder)
    assert len(traced.parameters) == len(source.tensors)  # tied embeddings are one
    assert sorted(traced.constants[name].recipe["name"] for name in traced.parameters) == sorted(source.tensors)
    assert traced.num_parameters == sum(t.nbytes for t in source.tensors.values()) // 2
    assert all(isinstance(traced.graph.get_parameter(name).data, FakeTensor) for name in traced.parameters)


def test_the_only_write_is_attentions(qwen3: tuple[Path, TracedModel]) -> None:
    _, traced = qwen3
    calls = [node for node in traced.graph.graph.nodes if node.op == "call_function"]
    writing = [node for node in calls if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable]
    assert [str(node.target) for node in writing] == ["llmc.paged_attention.default"] * 3
    assert not [node for node in calls if "scaled_dot_product" in str(node.target)]
    assert {node.meta["module"] for node in writing} == {f"model.layers.{i}.self_attn" for i in range(3)}


def test_sizes_of_one_run_through_the_general_graph(qwen3: tuple[Path, TracedModel]) -> None:
    folder, traced = qwen3
    step = with_weights(traced.graph, load_constants(read_model(folder), traced.constants))
    one = PagedSteps(traced.kv, width=1).run(step, [(0, [5])])
    two = PagedSteps(traced.kv).run(step, [(0, [5]), (1, [9, 9])], padding=1)
    torch.testing.assert_close(one[0], two[0], atol=0.02, rtol=0)  # bf16; -O0 promises tokens, not bits


def test_layers_with_equal_windows_share_a_group(tmp_path: Path) -> None:
    save_tiny_model("gemma2", tmp_path)
    kv = capture(read_model(tmp_path)).kv
    assert [(group.layers, group.window) for group in kv.groups] == [([0, 2], 8), ([1], 0)]


def test_longrope_takes_the_set_of_the_length_compiled_for(tmp_path: Path) -> None:
    save_tiny_model("phi3_longrope", tmp_path)
    source = read_model(tmp_path)
    short, long = (capture(source, max_model_len=length).constants["model.rotary_emb.inv_freq"].value for length in (64, 65))
    assert short is not None and long is not None
    torch.testing.assert_close(short, 2 * long)


def test_dynamic_rope_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModel, match=r"model\.rotary_emb: rope type 'dynamic'"):
        capture(read_model(tmp_path))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(UnsupportedModel, match=r"gate_proj.weight' has shape \[128, 64\], the configuration needs \[96, 64\]"):
        capture(read_model(tmp_path))


class _OwnAttention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class _Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class _WritesItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1).add_(1)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [(_OwnAttention(), "past the attention interface"), (_Noise(), "random numbers"), (_WritesItsInput(), "writes in place")],
)
def test_what_the_graph_may_not_hold_is_refused(module: nn.Module, sentence: str) -> None:
    exported = torch.export.export(module, (torch.zeros(1, 2, 4, 8),), strict=False)
    with pytest.raises(UnsupportedModel, match=sentence):
        canonical_graph(exported.graph, {"x": "x"}, {})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"alibi": torch.zeros(1)}, "called with alibi"), ({"attention_mask": torch.zeros(1)}, "mask of its own")],
)
def test_attention_that_the_op_cannot_express_is_refused(arguments: dict[str, torch.Tensor], sentence: str) -> None:
    heads = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedModel, match=sentence):
        _forward(nn.Module(), heads, heads, heads, **{"attention_mask": None, "llmc_paged": LayerProbe(), **arguments})
