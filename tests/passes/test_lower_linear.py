import pytest
import torch
from torch import Tensor, nn

from llmc.passes.graph import is_op
from llmc.passes.lower_linear import LowerLinear
from tests.passes.support import Case, assert_golden, assert_same_answers, capture, fill, rejects, seeded, unchanged

aten = torch.ops.aten


class Tied(nn.Module):
    """Embedding, a linear, a Conv1D as gpt2 has it ([K, N] weight), a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.proj = nn.Embedding(50, 24), nn.Linear(24, 40)
        self.conv_weight, self.conv_bias = nn.Parameter(torch.empty(40, 24)), nn.Parameter(torch.empty(24))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.proj(self.wte(ids))
        h = torch.addmm(self.conv_bias, h.view(-1, 40), self.conv_weight)
        return nn.functional.linear(h, self.wte.weight)


class Matmuls(nn.Module):
    """The spellings decompositions leave: mm with a transposed weight, matmul, addmm with t()."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.empty(24, 24)) for _ in range(3))
        self.bias = nn.Parameter(torch.empty(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, torch.matmul(torch.mm(x, self.a.t()), self.b), self.c.t())


class Awkward(nn.Module):
    """Weights llmc.linear cannot take."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight, self.bias = kind, nn.Parameter(torch.empty(24, 24)), nn.Parameter(torch.empty(6, 24))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "scaled":
            return torch.addmm(self.bias[0], x, self.weight, alpha=2.0)
        if self.kind == "matrix bias":
            return torch.addmm(self.bias, x, self.weight)
        if self.kind == "left":
            return torch.mm(self.weight, x.t())
        if self.kind == "double":
            return nn.functional.linear(x.double(), self.weight.double())
        return nn.functional.linear(x, self.weight) + self.weight.sum()


def tied(dtype: torch.dtype = torch.float32) -> Case:
    return capture(fill(Tied(), dtype), torch.tensor([3, 0, 49, 7]), dynamic={"ids": {0: "T"}})


def awkward(kind: str) -> Case:
    return capture(fill(Awkward(kind)), seeded(6, 24))


def test_graph_matches_golden() -> None:
    assert_golden(LowerLinear(), tied())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_stay_the_same(dtype: torch.dtype) -> None:
    assert_same_answers(LowerLinear(), tied(dtype))
    assert_same_answers(LowerLinear(), capture(fill(Matmuls(), dtype), seeded(5, 24, dtype=dtype) * 0.3))


def test_holds_a_tied_weight_once() -> None:
    after, _ = tied().apply(LowerLinear())
    names = ["conv_bias", "packed_transposed_conv_weight", "proj.bias", "proj.packed_weight", "wte.packed_weight"]
    assert sorted(after.ctx.weights) == names
    assert not any(is_op(n, aten.embedding.default) for n in after.gm.graph.nodes)


def test_transposes_that_undo_each_other_leave_the_recipe() -> None:
    after, _ = capture(fill(Matmuls()), seeded(5, 24)).apply(LowerLinear())
    assert after.ctx.weights["packed_a"].recipe == {"op": "pack", "input": {"op": "source", "name": "a"}}
    assert after.ctx.weights["packed_transposed_b"].recipe["input"]["op"] == "transpose"


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("scaled", "a scaled addmm"),
        ("matrix bias", "the bias is not a vector"),
        ("left", "the weight is not the right operand, or not a matrix"),
        ("shared", "something else than a linear or an embedding reads the weight"),
    ],
)
def test_says_why_it_refuses(kind: str, reason: str) -> None:
    assert rejects(LowerLinear(), awkward(kind)) == [reason]
    assert LowerLinear().ensures(awkward(kind).gm) is None


def test_refuses_dtypes_without_a_kernel() -> None:
    case = capture(fill(nn.Linear(8, 8), torch.float64), seeded(2, 8, dtype=torch.float64))
    assert rejects(LowerLinear(), case) == ["no kernel for these dtypes"]


def test_promises_that_no_plain_weight_is_left() -> None:
    assert "still multiplies with a plain weight" in str(LowerLinear().ensures(tied().gm))


def test_leaves_computed_weights_and_activations_alone() -> None:
    assert unchanged(LowerLinear(), awkward("double"))
    assert unchanged(LowerLinear(), capture(lambda x: torch.mm(x, x.t()), seeded(6, 24)))
