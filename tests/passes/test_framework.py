"""The runner and FusionPass, driven by small passes made for the purpose."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from llmc.errors import PassError
from llmc.passes import FusionPass, Numerics, Pass, PassContext, PassResult, Reject, dump_directory, run_passes
from llmc.passes import graph as G
from llmc.passes.merge_gate_up import MergeGateUp
from tests.passes.modules import Attention, GatedMLP, attention_case, mlp_case
from tests.passes.support import assert_golden, assert_same_answers, capture, fill, rejects, seeded, unchanged

aten = torch.ops.aten


@dataclass(frozen=True)
class SpellOutSilu(FusionPass):
    """A fusion of the form most have: mul(silu(a), b) -> mul(mul(a, sigmoid(a)), b)."""

    name: ClassVar[str] = "spell-out-silu"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    def pattern(self, gate: Any, up: Any) -> Any:
        return aten.mul.Tensor(aten.silu.default(gate), up)

    def applies(self, gate: Tensor, up: Tensor) -> Reject | None:
        if gate.dtype not in (torch.float32, torch.bfloat16):
            return Reject("no kernel for these dtypes", gate.dtype)
        return None

    def replacement(self, gate: Any, up: Any) -> Any:
        return aten.mul.Tensor(aten.mul.Tensor(gate, aten.sigmoid.default(gate)), up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def returns_silu(gate: Tensor, up: Tensor) -> Tensor:
    silu = nn.functional.silu(gate)
    return silu * up + silu


def two(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return seeded(3, 8, dtype=dtype), seeded(3, 8, dtype=dtype, seed=1)


def test_fusion_matches_golden() -> None:
    assert_golden(SpellOutSilu(), capture(swiglu, *two()))


def test_fusion_keeps_answers() -> None:
    assert_same_answers(SpellOutSilu(), capture(swiglu, *two(torch.bfloat16)))


def test_fusion_says_why_it_refuses() -> None:
    assert rejects(SpellOutSilu(), capture(swiglu, *two(torch.float16))) == ["no kernel for these dtypes"]


def test_fusion_leaves_shared_values_and_other_orders_alone() -> None:
    assert unchanged(SpellOutSilu(), capture(returns_silu, *two()))
    assert unchanged(SpellOutSilu(), capture(lambda gate, up: up * nn.functional.silu(gate), *two()))


@dataclass(frozen=True)
class Broken(Pass):
    """Breaks the graph in one way."""

    how: str = ""
    name: ClassVar[str] = "broken"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def requires(self, gm: GraphModule) -> str | None:
        return "a thing nobody has" if self.how == "requires" else None

    def ensures(self, gm: GraphModule) -> str | None:
        return "the other thing is still there" if self.how == "ensures" else None

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        graph = gm.graph
        linear = next((n for n in graph.nodes if G.is_op(n, aten.linear.default)), None)
        first = next(n for n in graph.nodes if n.op == "placeholder")
        with graph.inserting_before(graph.output_node()):
            if self.how == "no value":
                graph.call_function(aten.neg.default, (linear,))
            elif self.how == "dead code":
                G.call(gm, aten.neg.default, (linear,))
            elif self.how == "wrong value":
                node = graph.call_function(aten.neg.default, (G.outputs(gm)[0],))
                node.meta["val"] = first.meta["val"].new_empty(3)
                graph.output_node().replace_input_with(G.outputs(gm)[0], node)
            elif self.how == "alias":
                graph.output_node().replace_input_with(G.outputs(gm)[0], first)
                G.erase_dead(gm)
            elif self.how == "writes input":
                G.call(gm, aten.add_.Tensor, (first, 1))
            elif self.how == "writes own value":
                G.call(gm, aten.add_.Tensor, (linear, 1))
            elif self.how == "unknown constant":
                G.set_attribute(gm, "stray", linear.args[1].meta["val"])
                stray = graph.get_attr("stray")
                stray.meta["val"] = linear.args[1].meta["val"]
                stray.append(G.call(gm, aten.neg.default, (stray,)))
            elif self.how == "order":
                first_user = next(iter(linear.users))
                first_user.append(linear)
            elif self.how == "lies":
                graph.output_node().replace_input_with(G.outputs(gm)[0], G.call(gm, aten.neg.default, (G.outputs(gm)[0],)))
                return PassResult(changed=False)
            elif self.how == "input":
                first.meta["val"] = first.meta["val"].new_empty(2, 2)
            elif self.how == "raises":
                raise KeyError("lost")
        return PassResult(changed=True, matches=1, refusals=Counter())


@pytest.mark.parametrize(
    "how, message",
    [
        ("requires", "requires what the graph lacks: a thing nobody has"),
        ("ensures", "does not keep its promise: the other thing is still there"),
        ("no value", r"has no meta\['val'\]"),
        ("dead code", "dead code: nothing reads neg"),
        ("wrong value", "but its meta"),
        ("alias", "output 0 newly shares memory with x"),
        ("writes input", "aten.add_.Tensor writes to x; only llmc.paged_attention.default and llmc.rope_kv_write.default may write"),
        ("writes own value", "passes add no mutation"),
        ("unknown constant", "constant stray, which is not in the weight table"),
        ("order", "the graph is malformed"),
        ("lies", "says that it changed nothing"),
        ("input", "the graph's inputs changed"),
        ("raises", "lost"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(how: str, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        mlp_case(GatedMLP()).apply(SpellOutSilu(), Broken(how))
    assert "pass broken failed" in str(caught.value) and "passes before it: spell-out-silu" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_attention_may_write_its_caches() -> None:
    case, (report,) = attention_case(Attention()).apply(Broken())
    assert report.result.changed and len(case.gm.graph.nodes) == report.result.nodes_after


def test_dumps_between_passes_and_names_the_last(tmp_path: Path) -> None:
    case = mlp_case(GatedMLP())
    with pytest.raises(PassError, match="01-spell-out-silu.txt"):
        run_passes(case.gm, [SpellOutSilu(), Broken("raises")], case.ctx, dump_dir=tmp_path / "dump")
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == ["00-captured.txt", "01-spell-out-silu.txt"]
    assert "silu(" in (tmp_path / "dump" / "00-captured.txt").read_text()
    assert "sigmoid(" in (tmp_path / "dump" / "01-spell-out-silu.txt").read_text()


def test_dump_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMC_DUMP_DIR", raising=False)
    assert dump_directory() is None
    monkeypatch.setenv("LLMC_DUMP_DIR", str(tmp_path))
    assert dump_directory() == tmp_path


def test_reports_count_and_time() -> None:
    _, (report,) = capture(swiglu, *two()).apply(SpellOutSilu())
    assert (report.result.matches, report.result.nodes_before, report.result.nodes_after) == (1, 5, 6)
    assert report.result.seconds > 0


def test_constants_nobody_reads_leave_the_table_and_the_module() -> None:
    case, _ = mlp_case(fill(GatedMLP())).apply(MergeGateUp())
    assert "gate_proj.weight" not in case.ctx.weights
    assert dict(case.gm.named_parameters()).keys() == {"down_proj.weight"}


def test_text_does_not_depend_on_history() -> None:
    case = mlp_case(GatedMLP())
    renamed = mlp_case(GatedMLP())
    for node in renamed.gm.graph.nodes:
        if node.op == "call_function":
            node._rename("other_" + node.name)
    assert case.text() == renamed.text()
