"""Recipes: what each op means, in blocks as in one piece, and that broken ones are refused before any data is read."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.artifacts import recipes
from llmc.artifacts.casts import cast
from llmc.artifacts.dtypes import NUMPY, Array
from llmc.errors import ArtifactError
from llmc.kernels.packing import pack

RNG = np.random.default_rng(0)
TENSORS: dict[str, tuple[str, Array]] = {
    "a": ("float32", RNG.standard_normal((40, 12)).astype(np.float32)),
    "b": ("float32", RNG.standard_normal((7, 12)).astype(np.float32)),
    "h": ("bfloat16", RNG.integers(0, 1 << 16, (33, 35)).astype(np.uint16)),
    "e0": ("float16", RNG.standard_normal((20, 34)).astype(np.float16)),
    "e1": ("float16", RNG.standard_normal((20, 34)).astype(np.float16)),
    "h2": ("bfloat16", cast(RNG.standard_normal((33, 100)).astype(np.float32), "float32", "bfloat16")),
    "v": ("float32", RNG.standard_normal(12).astype(np.float32)),
}
SPECS = {name: (dtype, values.shape) for name, (dtype, values) in TENSORS.items()}


def fetch(name: str) -> Array:
    return TENSORS[name][1]


def src(name: str) -> dict[str, Any]:
    return {"op": "source", "name": name}


def run(recipe: dict[str, Any]) -> Array:
    """Evaluate, and hold the tiniest blocks and the inferred type against the whole."""
    whole = recipes.evaluate(recipe, fetch, SPECS)
    parts = list(recipes.blocks(recipe, fetch, SPECS, block_bytes=1))
    assert b"".join(part.tobytes() for part in parts) == whole.tobytes()
    dtype, shape = recipes.infer(recipe, SPECS)
    assert (NUMPY[dtype], shape) == (whole.dtype, whole.shape)
    return whole


def test_concat_slice_transpose_reshape_stack():
    a, b = TENSORS["a"][1], TENSORS["b"][1]
    np.testing.assert_array_equal(run({"op": "concat", "axis": 0, "inputs": [src("a"), src("b"), src("a")]}), np.concatenate([a, b, a]))
    np.testing.assert_array_equal(run({"op": "concat", "axis": 1, "inputs": [src("a"), src("a")]}), np.concatenate([a, a], 1))
    np.testing.assert_array_equal(run({"op": "slice", "axis": 0, "start": 3, "stop": 9, "input": src("a")}), a[3:9])
    np.testing.assert_array_equal(run({"op": "slice", "axis": 1, "start": 3, "stop": 9, "input": src("a")}), a[:, 3:9])
    np.testing.assert_array_equal(run({"op": "transpose", "axes": [1, 0], "input": src("a")}), a.T)
    np.testing.assert_array_equal(run({"op": "reshape", "shape": [2, 20, 12], "input": src("a")}), a.reshape(2, 20, 12))
    stacked = {"op": "stack", "inputs": [src("e0"), src("e1")]}
    np.testing.assert_array_equal(run(stacked), np.stack([TENSORS["e0"][1], TENSORS["e1"][1]]))
    np.testing.assert_array_equal(
        run({"op": "transpose", "axes": [0, 2, 1], "input": stacked}), np.stack([TENSORS["e0"][1].T, TENSORS["e1"][1].T])
    )


@pytest.mark.parametrize("name", ["a", "b", "h", "e0"])
def test_pack_is_the_kernels_layout(name: str):
    np.testing.assert_array_equal(run({"op": "pack", "input": src(name)}), pack(TENSORS[name][1]))


def test_pack_of_merged_cast_and_transposed_weights():
    a, b = TENSORS["a"][1], TENSORS["b"][1]
    merged = {"op": "concat", "axis": 0, "inputs": [{"op": "cast", "dtype": "bfloat16", "input": src(n)} for n in "ab"]}
    np.testing.assert_array_equal(run({"op": "pack", "input": merged}), pack(cast(np.concatenate([a, b]), "float32", "bfloat16")))
    turned = {"op": "transpose", "axes": [1, 0], "input": src("h")}
    np.testing.assert_array_equal(run({"op": "pack", "input": turned}), pack(np.ascontiguousarray(TENSORS["h"][1].T)))


def test_pack_of_experts():
    experts = {"op": "stack", "inputs": [src("e0"), src("e1")]}
    np.testing.assert_array_equal(run({"op": "pack", "input": experts}), np.stack([pack(TENSORS["e0"][1]), pack(TENSORS["e1"][1])]))


def test_literal_and_computed():
    literal = {"op": "literal", "dtype": "float32", "shape": [2], "data": np.array([1.5, -2], "<f4").tobytes().hex()}
    np.testing.assert_array_equal(run(literal), np.array([1.5, -2], np.float32))
    rope = np.arange(6, dtype=np.float32).reshape(3, 2)
    made = recipes.evaluate({"op": "computed", "key": "rope"}, fetch, {}, {"rope": ("float32", rope)})
    np.testing.assert_array_equal(made, rope)


def test_sources_are_found():
    assert recipes.sources({"op": "concat", "axis": 0, "inputs": [src("a"), {"op": "cast", "dtype": "float32", "input": src("b")}]}) == {
        "a",
        "b",
    }


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_casts_round_like_torch(values: list[float]):
    torch = pytest.importorskip("torch")
    wide = np.array(values, dtype=np.float32)
    ours = cast(wide, "float32", "bfloat16")
    theirs = torch.from_numpy(wide).to(torch.bfloat16)
    same = cast(ours, "bfloat16", "float32")
    np.testing.assert_array_equal(same, theirs.float().numpy())
    np.testing.assert_array_equal(cast(wide, "float32", "float16"), torch.from_numpy(wide).half().numpy())
    np.testing.assert_array_equal(cast(ours, "bfloat16", "float16"), theirs.half().numpy())


def test_every_nan_stays_a_nan():
    bits = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000], np.uint32)
    back = cast(cast(bits.view(np.float32), "float32", "bfloat16"), "bfloat16", "float32")
    np.testing.assert_array_equal(np.isnan(back), [True] * 5 + [False] * 2)
    np.testing.assert_array_equal(np.signbit(back), np.signbit(bits.view(np.float32)))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"op": "system", "name": "a"}, "expected an object with op out of"),
        ({"op": "source", "name": "a", "more": 1}, "has the fields"),
        ({"op": "source", "name": "zz"}, "holds no tensor 'zz'"),
        ({"op": "source", "name": ["a"]}, "holds no tensor"),
        ({"op": "source", "name": "a", "shape": [1, 2]}, "has the shape .* needs .1, 2."),
        ({"op": "source", "name": "a", "shape": "all"}, "needs all"),
        ({"op": "computed", "key": "zz"}, "no computed tensor 'zz'"),
        ({"op": "concat", "axis": 0, "inputs": []}, "at least one input"),
        ({"op": "concat", "axis": 0, "inputs": [src("a"), src("h")]}, "mixes the dtypes"),
        ({"op": "concat", "axis": 1, "inputs": [src("a"), src("b")]}, "mixes the shapes"),
        ({"op": "concat", "axis": 0, "inputs": [src("a"), src("v")]}, "mixes the shapes"),
        ({"op": "concat", "axis": -1, "inputs": [src("a"), src("b")]}, "along axis -1"),
        ({"op": "stack", "inputs": [src("a"), src("b")]}, "mixes the shapes"),
        ({"op": "slice", "axis": 0, "start": 5, "stop": 99, "input": src("a")}, "slices 5:99"),
        ({"op": "transpose", "axes": [0, 0], "input": src("a")}, "each axis once"),
        ({"op": "reshape", "shape": [41, 12], "input": src("a")}, "another number of elements"),
        ({"op": "reshape", "shape": [1 << 50, 1 << 50], "input": src("a")}, "another number of elements"),
        ({"op": "cast", "dtype": "int64", "input": src("a")}, "casts float32 to int64"),
        ({"op": "pack", "input": src("v")}, "packs float32"),
        ({"op": "literal", "dtype": "float32", "shape": [2], "data": "00"}, "has 1 bytes"),
        ({"op": "literal", "dtype": "float32", "shape": [2], "data": "zz"}, "not hex"),
        (7, "expected an object"),
    ],
)
def test_broken_recipes_are_refused(recipe: Any, says: str):
    with pytest.raises(ArtifactError, match=says):
        recipes.infer(recipe, SPECS)


def test_deep_and_wide_recipes_are_refused():
    deep = src("a")
    for _ in range(5000):
        deep = {"op": "cast", "dtype": "float32", "input": deep}
    with pytest.raises(ArtifactError, match="deeper than"):
        recipes.infer(deep, SPECS)
    with pytest.raises(ArtifactError, match="larger than"):
        recipes.infer({"op": "stack", "inputs": [src("a")] * 100_001}, SPECS)


def test_a_merged_packed_weight_is_made_without_holding_it():
    tall = np.zeros((4096, 2048), np.float32)  # 32 MiB; three of them merged and packed in bf16 are 48 MiB
    specs = {"w": ("float32", tall.shape)}
    part = {"op": "cast", "dtype": "bfloat16", "input": src("w")}
    recipe = {"op": "pack", "input": {"op": "concat", "axis": 0, "inputs": [part] * 3}}
    tracemalloc.start()
    total = sum(block.nbytes for block in recipes.blocks(recipe, lambda name: tall, specs, block_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 3 * 4096 * 2048 * 2
    assert peak < 24 << 20


def quantizing(op: str, name: Any, bits: int = 8, group: int = 32) -> dict[str, Any]:
    return {"op": op, "bits": bits, "group": group, "input": src(name) if isinstance(name, str) else name}


def by_hand(w: Array, dtype: str, bits: int, group: int) -> tuple[Array, Array]:
    """(integers [N, K], scales [N, groups] in float32), one group at a time."""
    wide = np.asarray(cast(w, dtype, "float32"), dtype=np.float32)
    n, k = wide.shape
    quants, scales = np.zeros((n, k), np.int32), np.zeros((n, -(-k // group)), np.float32)
    top = 2 ** (bits - 1) - 1
    for row in range(n):
        for g in range(scales.shape[1]):
            part = wide[row, g * group : (g + 1) * group]
            wanted = np.float32(np.abs(part).max()) / np.float32(top)
            stored = cast(np.array([wanted], np.float32), "float32", dtype)
            if cast(stored, dtype, "float32")[0] < wanted:
                stored = (stored.view(f"u{stored.itemsize}") + 1).view(stored.dtype)
            scales[row, g] = scale = cast(stored, dtype, "float32")[0]
            quants[row, g * group : (g + 1) * group] = [0 if scale == 0 else max(-top, min(top, round(float(v / scale)))) for v in part]
    return quants, scales


def unpacked(packed: Array) -> Array:
    """[N, K] integers with their padding, out of either packed form."""
    if packed.dtype == np.uint8:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int32) - 8
    return packed.astype(np.int32).transpose(0, 2, 1, 3).reshape(packed.shape[0] * 16, -1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("name", "group"), [("a", 32), ("h2", 32), ("h2", 64), ("e0", 32)])
def test_quantize_gives_integers_and_scales_as_by_hand(name: str, group: int, bits: int):
    dtype, values = TENSORS[name]
    quants, scales = by_hand(values, dtype, bits, group)
    n, k = values.shape
    found = unpacked(run(quantizing("quantize", name, bits, group)))
    np.testing.assert_array_equal(found[:n, :k], quants)
    assert not found[n:].any() and not found[:, k:].any()
    stored = run(quantizing("quantize_scales", name, bits, group)).transpose(0, 2, 1).reshape(-1, scales.shape[1])
    np.testing.assert_array_equal(cast(np.ascontiguousarray(stored[:n]), dtype, "float32"), scales)
    wide = np.asarray(cast(values, dtype, "float32"), dtype=np.float32)
    steps = scales.repeat(group, axis=1)[:, :k]
    assert (np.abs(quants * steps - wide) <= steps * np.float32(0.501)).all()


def test_quantising_a_concat_is_the_concat_of_the_quantised():
    merged = {"op": "concat", "axis": 0, "inputs": [src("a"), src("b")]}
    whole = unpacked(run(quantizing("quantize", merged)))[:47]
    np.testing.assert_array_equal(whole[:40], unpacked(run(quantizing("quantize", "a")))[:40])
    np.testing.assert_array_equal(whole[40:], unpacked(run(quantizing("quantize", "b")))[:7])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (quantizing("quantize", "a", 5), "8 or 4 bits"),
        (quantizing("quantize", "a", True), "8 or 4 bits"),
        (quantizing("quantize_scales", "a", 8, 16), "multiple of 32"),
        (quantizing("quantize_scales", "a", 8, 0), "multiple of 32"),
        (quantizing("quantize", "v"), r"quantised are \[N, K\]"),
        (quantizing("quantize", quantizing("quantize", "a")), r"quantised are \[N, K\]"),
        ({"op": "quantize", "bits": 8, "input": src("a")}, "has the fields"),
    ],
)
def test_what_cannot_be_quantised(recipe: dict[str, Any], says: str):
    with pytest.raises(ArtifactError, match=says):
        recipes.infer(recipe, SPECS)


def test_nan_and_infinity_are_not_quantised():
    for bad in (np.nan, np.inf):
        w = np.ones((3, 40), np.float32)
        w[1, 39] = bad
        with pytest.raises(ArtifactError, match="NaN or infinity"):
            recipes.evaluate(quantizing("quantize", "w"), lambda _, w=w: w, {"w": ("float32", w.shape)})


def test_quantising_streams():
    big = np.random.default_rng(1).standard_normal((4096, 1024)).astype(np.float32)
    tracemalloc.start()
    for _ in recipes.blocks(quantizing("quantize", "w"), lambda _: big, {"w": ("float32", big.shape)}, block_bytes=1 << 16):
        pass
    assert tracemalloc.get_traced_memory()[1] < big.nbytes
    tracemalloc.stop()
