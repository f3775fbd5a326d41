import pytest
import torch

from llmc.passes.fuse_rms_norm import FuseRmsNorm
from llmc.passes.fuse_rope_kv_write import FuseRopeKVWrite
from llmc.passes.no_op_elimination import NoOpElimination
from tests.passes.fusion_modules import (
    ComputedTables,
    DoubleCosine,
    HalvesAttention,
    NeighboursAttention,
    RotaryAttention,
    UnrotatedAttention,
    rotary_case,
)
from tests.passes.support import Case, assert_golden, assert_same_answers, rejects

KINDS = {
    "plain": lambda dtype: RotaryAttention(norms=None, dtype=dtype),
    "normed": lambda dtype: RotaryAttention(dtype=dtype),
    "gemma": lambda dtype: RotaryAttention(norms="gemma", dtype=dtype),
    "partial": lambda dtype: RotaryAttention(norms=None, rotated=4, dtype=dtype),
    "halves": lambda dtype: HalvesAttention(norms=None, dtype=dtype),
}


def prepared(case: Case, *, even_rows: bool = False) -> Case:
    """The case after the passes that this one follows; even_rows: as on CPUs, where norms of heads stay as they are spelled."""
    return case.apply(NoOpElimination(), FuseRmsNorm(even_rows=even_rows))[0]


@pytest.mark.parametrize("kind", ["normed", "partial", "halves"])
def test_graph_matches_golden(kind: str) -> None:
    assert_golden(FuseRopeKVWrite(), prepared(rotary_case(KINDS[kind](torch.bfloat16), torch.bfloat16)), kind)


def test_graph_of_a_cpu_matches_golden() -> None:
    case = prepared(rotary_case(KINDS["gemma"](torch.bfloat16), torch.bfloat16), even_rows=True)
    assert_golden(FuseRopeKVWrite(), case, "cpu")


@pytest.mark.parametrize("kind, even_rows", [*((kind, False) for kind in KINDS), ("normed", True), ("gemma", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_and_caches_stay_the_same(kind: str, dtype: torch.dtype, even_rows: bool) -> None:
    case = prepared(rotary_case(KINDS[kind](dtype), dtype), even_rows=even_rows)
    assert_same_answers(FuseRopeKVWrite(), case)
    text = case.apply(FuseRopeKVWrite())[0].text()
    assert "llmc.rms_norm(" not in text and "rsqrt(" not in text, "norms of heads are inside the op"


def test_fp32_tables_of_a_narrow_model() -> None:
    class Wide(RotaryAttention):
        def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return super().turn(x, cos, sin).to(x.dtype)

    assert_same_answers(FuseRopeKVWrite(), prepared(rotary_case(Wide(norms=None), torch.bfloat16)))


@pytest.mark.parametrize("even_rows", [False, True])
def test_a_norm_of_q_alone_stays_in_front(even_rows: bool) -> None:
    module = RotaryAttention()
    module.k_norm = torch.nn.Identity()
    case = prepared(rotary_case(module), even_rows=even_rows)
    after, (report,) = case.apply(FuseRopeKVWrite())
    assert report.result.matches == 1
    assert after.text().count("rsqrt(" if even_rows else "llmc.rms_norm(") == 1
    assert_same_answers(FuseRopeKVWrite(), case)


@pytest.mark.parametrize(
    "module, reason",
    [
        (UnrotatedAttention(), "it is not rotated"),
        (NeighboursAttention(), "neighbouring dimensions are rotated with each other"),
        (ComputedTables(), "cos and sin are not looked up by position"),
        (DoubleCosine(), "cos and sin are read at different positions"),
    ],
)
def test_says_why_it_refuses(module: torch.nn.Module, reason: str) -> None:
    assert rejects(FuseRopeKVWrite(), prepared(rotary_case(module))) == [reason]
