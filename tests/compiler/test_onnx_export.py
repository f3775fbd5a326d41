"""An exported model gives Hugging Face's logits in onnxruntime, step by step, and what cannot be exported is refused by name."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmc.artifacts.filesystem import FileSystem
from llmc.cli import main
from llmc.compiler import onnx_export
from llmc.compiler.model import read_model
from llmc.compiler.onnx_export import export_onnx
from llmc.errors import ArtifactError, ConfigError, UnsupportedModel
from tests.architectures import NAMES, save_tiny_model

pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'llmc[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'llmc[onnx]'")

FAST = ("qwen3",)  # and llama, below
STEPS = (13, 1, 1, 7, 1)  # prefill, decode, a longer continuation


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(str(path), options)


def no_past(model: Any, batch: int) -> dict[str, np.ndarray]:
    inputs = [i for i in model.get_inputs() if i.name.startswith("past_key_values.")]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), types[i.type]) for i in inputs}


def run(model: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: dict[str, np.ndarray]) -> list[np.ndarray]:
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    taken = {i.name for i in model.get_inputs()}
    return list(model.run(None, {name: value for name, value in {**feed, **past}.items() if name in taken}))


def presents(model: Any, outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    names = [o.name.replace("present.", "past_key_values.") for o in model.get_outputs()]
    return dict(zip(names[1:], outputs[1:], strict=True))


def hugging_face(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)).logits.float().numpy()
    return logits


def assert_steps_agree(model: Any, reference: nn.Module) -> None:
    """Two sequences in prefill, decode and continuation, each step against the whole sequence at once."""
    ids = np.random.default_rng(0).integers(3, 500, (2, sum(STEPS)))
    expected = hugging_face(reference, ids)
    past, done = no_past(model, 2), 0
    for new in STEPS:
        positions = np.tile(np.arange(done, done + new), (2, 1))
        outputs = run(model, ids[:, done : done + new], np.ones((2, done + new), np.int64), positions, past)
        assert outputs[0].shape == (2, new, 512)
        np.testing.assert_allclose(outputs[0], expected[:, done : done + new], atol=1e-4, rtol=0)
        past, done = presents(model, outputs), done + new
    assert all(value.shape[2] == done for value in past.values())


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_logits_are_those_of_hugging_face_over_prefill_and_decode(name: str, tmp_path: Path) -> None:
    reference = save_tiny_model(name, tmp_path / "model", **({"num_hidden_layers": 1} if name in FAST else {}))
    length = 64 if "longrope" in name else None  # the frequencies that Hugging Face takes for so few tokens
    made = export_onnx(tmp_path / "model", tmp_path / "out", max_model_len=length)
    assert not made.external and made.path == tmp_path / "out" / "model.onnx"
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    assert_steps_agree(session(made.path), reference)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    return folder, save_tiny_model("llama", folder, num_hidden_layers=2)


def test_large_weights_lie_beside_the_graph_and_padding_on_the_left_changes_nothing(tiny: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, reference = tiny
    made = export_onnx(folder, tmp_path / "out", embed_bytes=1000)
    assert made.external
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > made.weights_bytes // 2 > made.path.stat().st_size // 2
    model = session(made.path)
    assert_steps_agree(model, reference)
    ids = np.random.default_rng(1).integers(3, 500, (1, 6))
    padded, mask = np.concatenate([np.zeros((1, 3), np.int64), ids], 1), np.array([[0] * 3 + [1] * 6])
    outputs = run(model, padded, mask, np.maximum(mask.cumsum(1) - 1, 0), no_past(model, 1))
    np.testing.assert_allclose(outputs[0][:, 3:], hugging_face(reference, ids), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_command_exports_and_refuses_what_is_in_the_way(
    tiny: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = tiny
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    command = ["export", "onnx", str(folder), "-o", str(out), "--dtype", "float16"]
    assert main(command) == ConfigError.exit_code
    assert "not empty" in capsys.readouterr().err
    assert main([*command, "--force"]) == ConfigError.exit_code
    assert "holds no model.onnx" in capsys.readouterr().err
    assert (out / "letter.txt").read_text() == "mine"
    (out / "letter.txt").unlink()
    assert main(command) == 0
    assert "nodes; weights" in capsys.readouterr().out
    model = session(out / "model.onnx")
    ids = np.array([[5, 6, 7]])
    logits = run(model, ids, np.ones((1, 3), np.int64), np.arange(3)[None], no_past(model, 1))[0]
    assert logits.dtype == np.float16 and np.isfinite(logits).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # no folder of the writer's is left


@pytest.mark.parametrize("failing", ["save", "second rename"])
def test_an_export_that_fails_leaves_the_older_one(
    failing: str, tiny: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is a stand-in: publication, not translation, is under test. The file system here cannot swap names."""
    source = read_model(tiny[0], dtype="float32")

    class Program:
        def __init__(self, content: str) -> None:
            self.content, self.model = content, SimpleNamespace(graph=())

        def save(self, path: Path, *, external_data: bool) -> None:
            if self.content == "new" and failing == "save":
                raise OSError(errno.ENOSPC, "no space", str(path))
            path.write_text(self.content)

    class NoSwap(FileSystem):
        def exchange(self, one: str, other: str) -> None:
            raise OSError(errno.EINVAL, "not here", one)

        def rename(self, source: str, target: str) -> None:
            if os.path.basename(target) == "out" and ".llmc-tmp-" in source and not os.path.exists(target):
                raise OSError(errno.EIO, "broken", source)
            super().rename(source, target)

    def publish(content: str) -> None:
        onnx_export._publish(Program(content), source, tmp_path / "out", weights_bytes=1, embed_bytes=2, force=True)

    publish("old")
    monkeypatch.setattr(onnx_export, "OS", NoSwap())
    with pytest.raises(ArtifactError, match="What was there before is untouched"):
        publish("new")
    assert (tmp_path / "out" / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_op_without_a_translation_is_named(tiny: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny
    attend = onnx_export.CachedAttention.attend

    def odd(self: Any, query: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        result = attend(self, query, *rest, **more)
        return result + torch.special.bessel_j0(result.float()).to(result.dtype)

    monkeypatch.setattr(onnx_export.CachedAttention, "attend", odd)
    with pytest.raises(UnsupportedModel, match=r"ONNX has no form of op prims\.bessel_j0"):
        export_onnx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_says_what_it_lacks(tiny: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny
    with pytest.raises(ConfigError, match="no bfloat16"):
        export_onnx(folder, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ConfigError, match="knows 1 to 512 positions"):
        export_onnx(folder, tmp_path / "out", max_model_len=513)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmc\[onnx\]'"):
        export_onnx(folder, tmp_path / "out")
