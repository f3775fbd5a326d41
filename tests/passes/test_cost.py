"""Predicted launches and bytes, counted by hand on small graphs."""

from __future__ import annotations

import torch

from llmc.passes.common_subexpressions import CommonSubexpressions
from llmc.passes.cost import Cost, _read, predicted, timeline
from llmc.passes.fuse_add_rms_norm import FuseAddRmsNorm
from llmc.passes.fuse_rms_norm import FuseRmsNorm
from llmc.passes.fuse_rope_kv_write import FuseRopeKVWrite
from llmc.passes.graph import is_op
from llmc.passes.lower_linear import LowerLinear
from llmc.passes.merge_gate_up import MergeGateUp
from llmc.passes.no_op_elimination import NoOpElimination
from tests.passes.fusion_modules import Residual, RotaryAttention, residual_case, rotary_case
from tests.passes.modules import HIDDEN, GatedMLP, mlp_case
from tests.passes.support import capture, seeded
from tests.passes.test_lower_linear import tied

ROW = HIDDEN * 4  # bytes of a row of fp32
TOKENS = 64


def test_a_chain_of_pointwise_ops_is_one_launch() -> None:
    case = capture(lambda x: torch.relu(x * 2).exp(), seeded(4, 8))
    assert predicted(case.gm) == Cost(launches=1, nbytes=2 * 4 * 8 * 4)


def test_merging_linears_saves_a_launch_and_a_read_of_x() -> None:
    before = mlp_case(GatedMLP())
    after, _ = before.apply(MergeGateUp())
    was, now = predicted(before.gm), predicted(after.gm)
    assert was.launches - now.launches == 1
    assert was.nbytes - now.nbytes == TOKENS * ROW


def test_a_lookup_in_a_packed_table_reads_rows() -> None:
    before = tied()
    after, _ = before.apply(LowerLinear())
    padding = (64 - 50) * 24 + (48 - 40) * 24 + (32 - 24) * 40  # of head, linear and Conv1D; the table itself is read by the head alone
    assert predicted(after.gm).nbytes - predicted(before.gm).nbytes == 4 * padding


def test_views_cost_nothing() -> None:
    case = capture(lambda x: x.view(8, 4).t().unsqueeze(0) + 1, seeded(4, 8))
    assert predicted(case.gm).launches == 1


def test_the_rotation_and_the_write_become_one_launch() -> None:
    before, _ = rotary_case(RotaryAttention()).apply(NoOpElimination(), CommonSubexpressions(), FuseRmsNorm())
    after, _ = before.apply(FuseRopeKVWrite())
    assert predicted(after.gm).launches < predicted(before.gm).launches
    assert predicted(after.gm).nbytes < predicted(before.gm).nbytes
    (written,) = (node for node in after.gm.graph.nodes if is_op(node, "llmc.rope_kv_write.default"))
    for angles in written.args[4:6]:
        value = angles.meta["val"]
        assert _read(written, angles) == TOKENS * value.shape[1] * value.element_size()  # rows of the table, however long it is


def test_a_sum_and_its_norm_save_a_read() -> None:
    before, _ = residual_case(Residual()).apply(FuseRmsNorm())
    after, _ = before.apply(FuseAddRmsNorm())
    assert predicted(after.gm).launches < predicted(before.gm).launches
    assert predicted(after.gm).nbytes < predicted(before.gm).nbytes


def test_a_value_lives_from_its_call_to_its_last_reader() -> None:
    def program(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = x @ a  # 4 x 8
        z = torch.relu(y) @ b  # relu leaves 4 x 8, the product 4 x 16
        return torch.softmax(z, 1)[:, :8] @ a[:8] + y  # y lives to the end

    case = capture(program, seeded(4, 8), seeded(8, 8), seeded(8, 16))
    cell = 4 * 4  # four rows of fp32
    assert [nbytes for _, nbytes in timeline(case.gm)] == [8 * cell, 16 * cell, 32 * cell, 40 * cell, 32 * cell, 24 * cell]
