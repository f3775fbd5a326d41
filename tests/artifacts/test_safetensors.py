"""Safetensors files as they come: whole ones give their tensors, broken ones a sentence, and none gives more than it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.artifacts.safetensors import Checkpoint
from llmc.errors import ArtifactError


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {"a": rng.random((3, 5), dtype=np.float32), "b": np.arange(7), "c": np.float16([1, 2]), "empty": np.zeros((0, 4), np.float32)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    save_file({"d": np.array(5, np.int32)}, tmp_path / "y.safetensors")
    with Checkpoint([tmp_path / "x.safetensors", tmp_path / "y.safetensors"]) as checkpoint:
        for name, values in tensors.items():
            np.testing.assert_array_equal(checkpoint.fetch(name), values)
        assert checkpoint.fetch("d").shape == ()
        assert checkpoint.specs()["a"] == ("float32", (3, 5))
        assert checkpoint.file_of("d").name == "y.safetensors"
        with pytest.raises(ValueError, match="read-only"):
            checkpoint.fetch("a")[0] = 1
        with pytest.raises(ArtifactError, match="holds no tensor 'zz'"):
            checkpoint.fetch("zz")


def test_odd_offsets_and_holes_are_read(tmp_path: Path):
    data = b"x" + np.float32([1, 2]).tobytes() + b"hole" + np.float32([3]).tobytes()
    path = write(tmp_path / "x", {"a": entry(offsets=[1, 9]), "b": entry(shape=[1], offsets=[13, 17])}, data)
    with Checkpoint([path]) as checkpoint:
        np.testing.assert_array_equal(checkpoint.fetch("a"), [1, 2])
        np.testing.assert_array_equal(checkpoint.fetch("b"), [3])


def test_a_dtype_we_cannot_hold_is_named_when_asked_for(tmp_path: Path):
    path = write(tmp_path / "x", {"a": entry("F64", [1])}, b"8" * 8)
    with Checkpoint([path]) as checkpoint, pytest.raises(ArtifactError, match="dtype F64, llmc reads BF16"):
        checkpoint.fetch("a")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"", "does not begin with"),
        (b"[]", "does not begin with"),
        (b"{", "not valid JSON"),
        (b"{" * 1, "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":1,"a":1}', "names 'a' twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "names 'dtype' twice"),
        (b'{"\xff":1}', "not valid JSON"),
        ({"a": 1}, "expected exactly dtype, shape and data_offsets"),
        ({"a": entry() | {"more": 1}}, "expected exactly"),
        ({"a": entry(dtype="F99")}, "unknown dtype 'F99'"),
        ({"a": entry(dtype=["F32"])}, "unknown dtype"),
        ({"a": entry(shape="2")}, "not a list of at most 16 sizes"),
        ({"a": entry(shape=[-2])}, "not a list of at most 16 sizes"),
        ({"a": entry(shape=[2.0])}, "not a list of at most 16 sizes"),
        ({"a": entry(shape=[True, 2])}, "not a list of at most 16 sizes"),
        ({"a": entry(shape=[1] * 17 + [2])}, "not a list of at most 16 sizes"),
        ({"a": entry(shape=[1 << 70])}, "not a list of at most 16 sizes"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, "does not take the 8 bytes"),
        ({"a": entry(shape=[3])}, "does not take the 8 bytes"),
        ({"a": entry(shape=[0])}, "is empty but is given 8 bytes"),
        ({"a": entry(offsets=[8, 0])}, "not two rising numbers"),
        ({"a": entry(offsets=[0, 8, 9])}, "not two rising numbers"),
        ({"a": entry(offsets=[-8, 0])}, "not two rising numbers"),
        ({"a": entry(offsets=[9, 17])}, "the file is cut short"),
        ({"a": entry(offsets=[1 << 47, (1 << 47) + 8])}, "the file is cut short"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "'a' and 'b' overlap"),
        ({"a": entry(), "b": entry()}, "overlap"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map names to text"),
        ({"__metadata__": []}, "__metadata__ must map"),
    ],
)
def test_broken_headers(tmp_path: Path, header: Any, says: str):
    path = write(tmp_path / "x.safetensors", header, b"0" * 16)
    with pytest.raises(ArtifactError) as caught:
        Checkpoint([path])
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("length", [9, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_lengths_that_lie(tmp_path: Path, length: int):
    with pytest.raises(ArtifactError, match="header of|not valid JSON"):
        Checkpoint([write(tmp_path / "x", b"{}", length=length)])


@pytest.mark.parametrize("size", range(8))
def test_tiny_files(tmp_path: Path, size: int):
    (tmp_path / "x").write_bytes(b"\0" * size)
    with pytest.raises(ArtifactError, match="too few for a safetensors file"):
        Checkpoint([tmp_path / "x"])


def test_one_name_in_two_files(tmp_path: Path):
    paths = [write(tmp_path / name, {"a": entry()}, b"0" * 8) for name in ("x", "y")]
    with pytest.raises(ArtifactError, match="is also in"):
        Checkpoint(paths)


@given(st.binary(max_size=120), st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, flip: int):
    good = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path_factory.getbasetemp() / "any"
    for text in (data, good[:flip] + data[:1] + good[flip + 1 :]):
        write(path, text, b"0" * 8)
        try:
            with Checkpoint([path]) as checkpoint:
                for name in checkpoint.specs():
                    assert checkpoint.fetch(name).nbytes <= path.stat().st_size
        except ArtifactError as error:
            assert "\n" not in str(error)
