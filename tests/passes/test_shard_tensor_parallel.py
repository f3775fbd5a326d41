"""Attention and MLPs divided among ranks: what stays whole, whose part is whose, and the numbers of all ranks together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llmc.kernels.all_reduce import all_reduce_reference, in_threads
from llmc.kernels.ops import overload
from llmc.passes.base import PassContext
from llmc.passes.shard_tensor_parallel import ShardTensorParallel, is_sharded, of_rank
from llmc.passes.weights import WeightTable
from tests.passes.modules import BLOCK, HEAD_DIM, HIDDEN, GatedMLP
from tests.passes.support import Case, assert_close, capture, evaluate, fill, rejects, seeded


class Layer(nn.Module):
    """Attention of four query heads and `kv_heads` KV heads with its output projection, then a gated MLP."""

    def __init__(self, kv_heads: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, 4 * HEAD_DIM, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(HIDDEN, kv_heads * HEAD_DIM, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(4 * HEAD_DIM, HIDDEN, bias=bias)
        self.mlp = GatedMLP()

    def forward(
        self, x: Tensor, slots: Tensor, tables: Tensor, seq_lens: Tensor, starts: Tensor, k_cache_0: Tensor, v_cache_0: Tensor
    ) -> Tensor:
        q, k, v = (proj(x).view(x.shape[0], -1, HEAD_DIM) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = overload("paged_attention")(q, k, v, k_cache_0, v_cache_0, slots, tables, seq_lens, starts, 0, 0, 0.35, 0, 0.0, None)
        x = x + self.o_proj(attended.reshape(x.shape[0], -1))
        return x + self.mlp.down_proj(self.mlp.act(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


def layer_case(kv_heads: int = 2, bias: bool = False) -> Case:
    return capture(
        fill(Layer(kv_heads, bias)),
        seeded(6, HIDDEN),
        torch.tensor([[4, 5, 6, 8, 9, 10]]),
        torch.tensor([[[1], [2]]], dtype=torch.int32),
        torch.tensor([3, 3], dtype=torch.int32),
        torch.tensor([0, 3, 6], dtype=torch.int32),
        *(torch.zeros(4, kv_heads, BLOCK, HEAD_DIM) for _ in range(2)),
        dynamic={"x": {0: "T"}, "slots": {1: "T"}},
    )


def rank_case(case: Case, rank: int, ranks: int) -> Case:
    """What one rank runs: the divided graph, its own parts of the weights, and caches of its own heads."""
    after, (report,) = case.apply(ShardTensorParallel(ranks))
    assert report.result.matches == 2
    constants, sources = {}, dict(case.sources)
    for name, constant in after.ctx.weights.constants.items():
        recipe = of_rank(constant.recipe, rank)
        if is_sharded(constant.recipe):
            assert recipe["op"] == "slice"
            whole = evaluate(recipe["input"], case.sources, {})
            sources[f"own {name}"] = whole.narrow(recipe["axis"], recipe["start"], recipe["stop"] - recipe["start"])
            recipe = {"op": "source", "name": f"own {name}"}
        constants[name] = replace(constant, recipe=recipe)
    x, *rest, k, v = case.args
    args = (x, *rest, *(cache[:, : cache.shape[1] // ranks].clone() for cache in (k, v)))
    return Case(after.gm, PassContext(weights=WeightTable(constants=constants), max_positions=64), sources, args)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_ranks_together_answer_as_one(ranks: int, bias: bool) -> None:
    case = layer_case(kv_heads=4, bias=bias)
    want, *written = case.run()
    members = [rank_case(case, rank, ranks) for rank in range(ranks)]
    answers = in_threads([member.run for member in members])
    for answer in answers:
        assert_close([want], answer[:1], ShardTensorParallel(ranks))
        assert torch.equal(answer[0], answers[0][0])
    for at in (-2, -1):  # the caches of all ranks are the one cache, head by head
        assert_close([written[at]], [torch.cat([answer[at] for answer in answers], dim=1)], ShardTensorParallel(ranks))


def test_graph_of_a_rank() -> None:
    after, _ = layer_case().apply(ShardTensorParallel(2))
    calls = [str(node.target) for node in after.gm.graph.nodes if node.op == "call_function"]
    assert calls.count("llmc.all_reduce.default") == 2
    shapes = {name: constant.shape for name, constant in after.ctx.weights.constants.items()}
    assert shapes["q_proj.shard_weight"] == (16, 24) and shapes["o_proj.shard_weight"] == (24, 16)
    assert shapes["mlp.gate_proj.shard_weight"] == (20, 24) and shapes["mlp.down_proj.shard_weight"] == (24, 20)
    (cache,) = [node for node in after.gm.graph.nodes if node.op == "placeholder" and node.target == "k_cache_0"]
    assert tuple(cache.meta["val"].shape) == (4, 1, BLOCK, HEAD_DIM)


def test_parts_are_slices_in_order_and_nothing_else_is_divided() -> None:
    after, _ = layer_case().apply(ShardTensorParallel(2))
    weights = after.ctx.weights
    first, second = (of_rank(weights["q_proj.shard_weight"].recipe, rank) for rank in range(2))
    assert (first["start"], first["stop"], second["start"], second["stop"]) == (0, 16, 16, 32)
    nested = {"op": "pack", "input": {"op": "concat", "axis": 0, "inputs": [weights["q_proj.shard_weight"].recipe]}}
    assert of_rank(nested, 1) == {"op": "pack", "input": {"op": "concat", "axis": 0, "inputs": [second]}}
    plain = {"op": "source", "name": "norm.weight"}
    assert of_rank(plain, 1) is plain and not is_sharded(plain) and is_sharded(nested)


def test_says_why_it_refuses_heads_that_do_not_divide() -> None:
    assert "query or KV heads do not divide by the ranks" in rejects(ShardTensorParallel(3), layer_case())


def test_the_sum_is_that_of_every_rank_and_needs_them_all() -> None:
    parts = [seeded(3, 5, seed=rank) for rank in range(3)]
    sums = in_threads([lambda part=part: all_reduce_reference(part, 3) for part in parts])
    for found in sums:
        assert torch.equal(found, parts[0] + parts[1] + parts[2])
    with pytest.raises(RuntimeError, match="called outside a group"):
        all_reduce_reference(parts[0], 3)
