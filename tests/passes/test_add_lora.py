"""The terms of adapters behind linears: the graph, the numbers with and without adapters, and what the other passes make of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc.errors import PassError
from llmc.passes.add_lora import AddLora, adaptable, lora_layout, with_targets
from llmc.passes.base import Pass
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.merge_gate_up import MergeGateUp
from llmc.passes.merge_qkv import MergeQKV
from llmc.passes.prune_to_needed_rows import PruneToNeededRows
from tests.passes.modules import HIDDEN, Attention, GatedMLP, attention_case
from tests.passes.support import Case, assert_golden, capture, fill, seeded

RANK, SLOTS = 3, 2


class Layers(nn.Module):
    """What `make` gives as layer 0, and an output projection outside of it."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(width, 5, bias=False)


class MLPModel(Layers):
    def __init__(self) -> None:
        super().__init__(GatedMLP(), HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.layers[0](x))


class AttentionModel(Layers):
    def __init__(self) -> None:
        super().__init__(Attention((True, True, True)), 16)

    def forward(
        self, x: Tensor, slots: Tensor, tables: Tensor, seq_lens: Tensor, starts: Tensor, k_cache_0: Tensor, v_cache_0: Tensor
    ) -> Tensor:
        return self.head(self.layers[0](x, slots, tables, seq_lens, starts, k_cache_0, v_cache_0))


class PooledModel(MLPModel):
    """A second linear whose rows are not tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.layers[1](x.mean(0, keepdim=True)).sum()


class SelectingModel(MLPModel):
    def forward(self, x: Tensor, logits_indices: Tensor) -> Tensor:  # type: ignore[override]
        return self.head((x + self.layers[0](x))[logits_indices])


def mlp_case() -> Case:
    return capture(fill(MLPModel()), seeded(6, HIDDEN), dynamic={"x": {0: "T"}})


def add_lora(case: Case, targets: tuple[str, ...] | None = None) -> AddLora:
    modules = adaptable(case.gm) if targets is None else with_targets(adaptable(case.gm), targets)
    return AddLora(layout=lora_layout(modules, RANK), max_loras=SLOTS, dtype=torch.float32)


def adapters(applied: AddLora, seed: int = 5) -> Tensor:
    return seeded(SLOTS, applied.layout.slot_elements, seed=seed) * 0.3


def matrices(applied: AddLora, pool: Tensor, slot: int, name: str) -> tuple[Tensor, Tensor]:
    module = next(m for m in applied.layout.modules if m.name == name)
    middle, end = module.offset + RANK * module.in_features, module.offset + RANK * (module.in_features + module.out_features)
    return pool[slot, module.offset : middle].view(RANK, -1), pool[slot, middle:end].view(RANK, -1)


def run(case: Case, applied: AddLora, slots: list[int], *after: Pass) -> Tensor:
    rewritten, _ = case.apply(applied, *after)
    return rewritten.run(*case.args, torch.tensor(slots, dtype=torch.int32), adapters(applied))[0]


def test_graph_matches_golden() -> None:
    case = mlp_case()
    assert_golden(add_lora(case), case)


def test_rows_without_an_adapter_keep_their_bits() -> None:
    for case in (mlp_case(), attention_model_case()):
        assert torch.equal(run(case, add_lora(case), [-1] * 6), case.run()[0])


def test_rows_with_one_are_the_merged_models() -> None:
    case = mlp_case()
    applied = add_lora(case)
    pool, slots = adapters(applied), [0, -1, 1, 1, 0, -1]
    found = run(case, applied, slots)
    for row, slot in enumerate(slots):
        merged = MLPModel()
        merged.load_state_dict(case.sources)
        if slot >= 0:
            for module in applied.layout.modules:
                a, b = matrices(applied, pool, slot, module.name)
                merged.get_submodule(module.name).weight.data += (a.T @ b).T
        torch.testing.assert_close(found[row], merged(case.args[0])[row].detach(), rtol=1e-4, atol=1e-5)


def test_the_output_projection_and_rows_that_are_no_tokens_are_left_alone() -> None:
    case = capture(fill(PooledModel()), seeded(6, HIDDEN), dynamic={"x": {0: "T"}})
    assert list(adaptable(case.gm)) == [f"layers.0.{name}_proj" for name in ("gate", "up", "down")]
    everything = {**adaptable(case.gm), "layers.1": (HIDDEN, HIDDEN)}
    forced = AddLora(layout=lora_layout(everything, RANK), max_loras=SLOTS, dtype=torch.float32)
    with pytest.raises(PassError, match=r"layers\.1 got no term"):
        case.apply(forced)


def test_targets_are_ends_of_names() -> None:
    modules = adaptable(mlp_case().gm)
    assert list(with_targets(modules, ("down_proj", "layers.0.up_proj"))) == ["layers.0.up_proj", "layers.0.down_proj"]
    assert not with_targets(modules, ("proj", "0"))


def attention_model_case() -> Case:
    plain = attention_case(Attention())
    return capture(fill(AttentionModel()), *plain.args, dynamic={"x": {0: "T"}, "slots": {1: "T"}})


def calls(case: Case, name: str) -> int:
    return sum(str(node.target) == name for node in case.gm.graph.nodes)


def test_merges_take_the_terms_along() -> None:
    slots = [0, -1, 1, 1, 0, -1]
    for case, merge, terms in ((mlp_case(), MergeGateUp(), 2), (attention_model_case(), MergeQKV(), 1)):
        for targets in (None, ("gate_proj", "q_proj"), ("up_proj", "v_proj"), ("down_proj", "k_proj")):
            applied = add_lora(case, targets)
            after, reports = case.apply(applied, merge)
            assert reports[-1].result.matches == 1
            assert calls(after, "llmc.lora_add.default") <= terms, "one for all parts of a merged linear"
            assert torch.equal(run(case, applied, slots, merge), run(case, applied, slots)), targets


def test_needed_rows_come_with_their_slots() -> None:
    indices = torch.tensor([4, 1])
    case = capture(fill(SelectingModel()), seeded(6, HIDDEN), indices, dynamic={"x": {0: "T"}, "logits_indices": {0: "N"}})
    applied, slots = add_lora(case), [0, -1, 1, 1, 0, -1]
    after, reports = case.apply(applied, PruneToNeededRows())
    assert reports[-1].result.matches == 1
    assert torch.equal(run(case, applied, slots, PruneToNeededRows()), run(case, applied, slots))
    selected = {node.args[2] for node in after.gm.graph.nodes if str(node.target) == "llmc.lora_add.default"}
    assert len(selected) == 1 and str(selected.pop().target) == "aten.index.Tensor"


def test_lowering_leaves_the_terms() -> None:
    case = mlp_case()
    after, _ = case.apply(add_lora(case), MergeGateUp(), LowerLinear())
    assert calls(after, "llmc.linear.default") == 3 and calls(after, "llmc.lora_add.default") == 2
    assert calls(after, "aten.linear.default") == 0


def test_the_oracle_of_these_tests_is_torchs() -> None:
    case = mlp_case()
    gate, up, down = (case.sources[f"layers.0.{name}_proj.weight"] for name in ("gate", "up", "down"))
    x = case.args[0]
    expected = (x + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T) @ case.sources["head.weight"].T
    torch.testing.assert_close(case.run()[0], expected, rtol=1e-4, atol=1e-5)
