import pytest
import torch

from llmc.passes.graph import is_op
from llmc.passes.merge_gate_up import MergeGateUp
from llmc.passes.prune_to_needed_rows import PruneToNeededRows
from tests.passes.modules import AllRowsReturned, GatedMLP, LastLayer, RowsMixedLast, last_layer_case, mlp_case
from tests.passes.support import assert_golden, assert_same_answers, rejects, seeded, unchanged

aten = torch.ops.aten


def test_graph_matches_golden() -> None:
    assert_golden(PruneToNeededRows(), last_layer_case(LastLayer()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_stay_the_same(dtype: torch.dtype) -> None:
    assert_same_answers(PruneToNeededRows(), last_layer_case(LastLayer(), dtype))


@pytest.mark.parametrize("tokens, rows", [(1, [0]), (2, [1]), (5, [4, 3, 2, 1, 0])])
def test_answers_stay_the_same_for_other_sizes(tokens: int, rows: list[int]) -> None:
    assert_same_answers(PruneToNeededRows(), last_layer_case(LastLayer()), seeded(tokens, 24), torch.tensor(rows))


def test_sees_through_splits_too() -> None:
    merged, _ = last_layer_case(LastLayer()).apply(MergeGateUp())
    assert_same_answers(PruneToNeededRows(), merged)
    pruned, _ = merged.apply(PruneToNeededRows())
    linears = [n for n in pruned.gm.graph.nodes if is_op(n, aten.linear.default)]
    rows = pruned.gm.graph.find_nodes(op="placeholder")[1].meta["val"].shape[0]
    assert all(n.meta["val"].shape[-2] == rows for n in linears)


def test_says_why_it_refuses() -> None:
    assert rejects(PruneToNeededRows(), last_layer_case(RowsMixedLast())) == ["an op that is not known to be row-wise"]


def test_leaves_rows_alone_that_others_read() -> None:
    assert unchanged(PruneToNeededRows(), last_layer_case(AllRowsReturned()))
    assert rejects(PruneToNeededRows(), last_layer_case(AllRowsReturned())) == ["all rows are read elsewhere too"]


def test_requires_the_rows_that_are_wanted() -> None:
    assert PruneToNeededRows().requires(mlp_case(GatedMLP()).gm) == "an input called logits_indices"
