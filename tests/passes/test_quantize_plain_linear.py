"""Quantised weights of GPU graphs: small integers in rows, by a recipe that numpy and a plain rewriting of torch's agree on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.artifacts import float8
from llmc.artifacts.recipes import evaluate as evaluate_recipe
from llmc.artifacts.recipes import infer
from llmc.errors import ArtifactError
from llmc.kernels.plain_quantized_linear.reference import dequantize_plain
from llmc.kernels.quantized_linear.reference import dequantize
from llmc.passes.lower_plain_linear import LowerPlainLinear
from llmc.passes.quantize_plain_linear import QuantizePlainLinear
from tests.passes.modules import GatedMLP, mlp_case
from tests.passes.support import Case, assert_golden, capture, fill, rejects, seeded

V, K = 40, 64


class Tied(nn.Module):
    """An embedding whose matrix makes the logits too, and a linear between."""

    def __init__(self, width: int = K) -> None:
        super().__init__()
        self.table, self.inner = nn.Parameter(torch.empty(V, width)), nn.Parameter(torch.empty(width, width))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(nn.functional.embedding(ids, self.table), self.inner), self.table)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 12, 8))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(self.weight[ids], x.unsqueeze(-1)).squeeze(-1)


class Computed(nn.Module):
    """A matrix that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.llmc.plain_linear(x, self.weight, None)


def tied_case(width: int = K) -> Case:
    case = capture(fill(Tied(width)), torch.tensor([3, 0, 39, 7]), dynamic={"ids": {0: "T"}})
    return case.apply(LowerPlainLinear())[0]


def by_numpy(recipe: dict[str, object], matrix: Tensor) -> np.ndarray:
    values = matrix.view(torch.uint16).numpy() if matrix.dtype == torch.bfloat16 else matrix.numpy()
    specs = {"w": (str(matrix.dtype).removeprefix("torch."), tuple(matrix.shape))}
    return evaluate_recipe(recipe, lambda name: values, specs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 64), (17, 100), (3, 33)])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_mean_what_panels_mean(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = seeded(*shape, dtype=dtype)
    of = {"bits": bits, "group": 32, "input": {"op": "source", "name": "w"}}
    panels, panel_scales = (by_numpy({"op": op, **of}, matrix) for op in ("quantize", "quantize_scales"))
    rows, scales = (by_numpy({"op": "in_rows", "input": {"op": op, **of}}, matrix) for op in ("quantize", "quantize_scales"))
    as_torch = [torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a) for a in (panels, panel_scales, rows, scales)]
    as_torch[1], as_torch[3] = as_torch[1].view(dtype), as_torch[3].view(dtype)
    expected = dequantize(as_torch[0], as_torch[1], *shape, 32)
    assert torch.equal(dequantize_plain(as_torch[2], as_torch[3], shape[1], 32), expected)
    assert (expected.float() - matrix.float()).abs().max() < matrix.abs().max() / (100 if bits == 8 else 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_rows_are_to_nearest(dtype: torch.dtype) -> None:
    """A scale per row that no weight exceeds 448 of, and what torch rounds to; a row of zeros stays one."""
    matrix = seeded(40, 100, dtype=dtype)
    matrix[3] = 0
    source = {"op": "source", "name": "w"}
    scales = torch.from_numpy(by_numpy({"op": "quantize_fp8_scales", "input": source}, matrix).copy()).view(dtype)
    codes = torch.from_numpy(by_numpy({"op": "quantize_fp8", "input": source}, matrix))
    assert codes.shape == (40, 100) and scales.shape == (40, 1)
    divisor = torch.where(scales == 0, 1.0, scales.float())
    assert torch.equal(codes, (matrix.float() / divisor).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert (scales.float()[:, 0] * 448 >= matrix.float().abs().amax(1)).all()
    near = dequantize_plain(codes.view(torch.float8_e4m3fn), scales, 100, 128).float()
    assert ((near - matrix.float()).abs() <= matrix.float().abs() / 15 + scales.float() * 2**-9).all()
    matrix[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        by_numpy({"op": "quantize_fp8", "input": source}, matrix)


def test_every_code_of_fp8() -> None:
    """To float32 and back as torch does it: every code, ties, subnormals, and what is beyond the largest."""
    codes = np.arange(256, dtype=np.uint8)
    exact = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(float8.decode(codes), exact, equal_nan=True)
    numbers = torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int32).view(torch.float32)
    ties = torch.tensor([2**-10, 3 * 2**-10, 0.0, -0.0, 17 / 16, 19 / 16, 464.0, 465.0, 1e-40])
    numbers = torch.cat([numbers[numbers.isfinite()], torch.randn(50_000), torch.randn(50_000) / 100, ties, -ties])
    theirs = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(float8.encode(numbers.numpy()), theirs)


def test_in_rows_of_something_else_is_refused() -> None:
    specs = {"w": ("float32", (4, 64))}
    with pytest.raises(ArtifactError, match="something else than a quantize"):
        infer({"op": "in_rows", "input": {"op": "source", "name": "w"}}, specs)


def test_graphs_match_goldens() -> None:
    assert_golden(QuantizePlainLinear(bits=4), tied_case())


@pytest.mark.parametrize("bits", [8, 4])
def test_answers_are_those_of_the_dequantised_weights(bits: int) -> None:
    for case in (mlp_case(GatedMLP(gate_bias=True)).apply(LowerPlainLinear())[0], tied_case()):
        after, (report,) = case.apply(QuantizePlainLinear(bits=bits))
        assert report.result.matches == 3
        plain = {}
        for constant in after.ctx.weights.constants.values():
            inner = constant.recipe.get("input", {})
            if inner.get("op") == "quantize":
                source = case.sources[inner["input"]["name"]]
                of = {**inner, "input": {"op": "source", "name": "w"}}
                parts = [by_numpy({"op": "in_rows", "input": {**of, "op": op}}, source) for op in ("quantize", "quantize_scales")]
                plain[inner["input"]["name"]] = dequantize_plain(*(torch.from_numpy(p) for p in parts), source.shape[1], 32)
        assert plain
        expected = Case(case.gm, case.ctx, {**case.sources, **plain}, case.args).run()
        for want, have in zip(expected, after.run(), strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_fp8_but_for_the_head() -> None:
    """The last linear, and the embedding tied to it, are integers; the answers are those of the dequantised weights."""
    case = tied_case()
    after, (report,) = case.apply(QuantizePlainLinear(fp8=True))
    assert report.result.matches == 3 and report.result.refusals == {}
    held = {c.recipe["op"]: c for c in after.ctx.weights.constants.values()}
    assert held["quantize_fp8"].dtype == torch.float8_e4m3fn and held["quantize_fp8"].shape == (K, K)
    plain = {}
    for name, source in case.sources.items():
        of = {"input": {"op": "source", "name": "w"}}
        if source.shape[0] == V:
            whole = {"bits": 8, "group": 32, **of}
            parts = [by_numpy({"op": "in_rows", "input": {"op": op, **whole}}, source) for op in ("quantize", "quantize_scales")]
            plain[name] = dequantize_plain(*(torch.from_numpy(p) for p in parts), K, 32)
        else:
            codes, scales = (torch.from_numpy(by_numpy({"op": op, **of}, source).copy()) for op in ("quantize_fp8", "quantize_fp8_scales"))
            plain[name] = dequantize_plain(codes.view(torch.float8_e4m3fn), scales, K, K)
    expected = Case(case.gm, case.ctx, {**case.sources, **plain}, case.args).run()
    for want, have in zip(expected, after.run(), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_says_what_it_leaves_alone() -> None:
    refusals = tied_case(width=40).apply(QuantizePlainLinear())[1][0].result.refusals
    assert refusals == {"an embedding reads the weight, in rows of no whole groups of 8 bits": 1}
    experts = capture(fill(Experts()), seeded(5, 8), torch.tensor([2, 0, 0, 1, 2]))
    assert "lower-plain-linear makes them" in (QuantizePlainLinear().requires(experts.gm) or "")
    assert rejects(QuantizePlainLinear(), capture(Computed(), seeded(5, 8))) == ["the weight is not from the checkpoint"]
