"""Fitted integers: the checkpoint that the worker writes holds them exactly, and what is asked for wrongly is refused before any work."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llmc.artifacts.recipes import evaluate
from llmc.artifacts.safetensors import Checkpoint
from llmc.compiler import calibration
from llmc.compiler.calibrate_worker import integers, pack
from llmc.compiler.calibration_data import fitting_sequences, fitting_text
from llmc.compiler.checkpoint_tensor import CheckpointTensor
from llmc.compiler.fitting_text import TEXT
from llmc.compiler.input_key import input_key
from llmc.compiler.model import read_model
from llmc.compiler.packing import to_torch
from llmc.compiler.stages import Silent, StageLog
from llmc.compiler.stored_quantization import read_stored
from llmc.compiler.targets import find_target
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError, InternalError, UnsupportedModel
from llmc.kernels.plain_quantized_linear.reference import dequantize_plain
from tests.architectures import save_tiny_model

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


def config(**settings: Any) -> CompileConfig:
    return CompileConfig(**{"model": DEMO_MODEL, "out": Path("out"), "quantization": "int4", "calibration": "awq", "jobs": 1, **settings})


def linear(n: int, k: int, group: int, dtype: torch.dtype) -> nn.Linear:
    """A linear as auto-round leaves it: weights of 4-bit integers times a scale per group, which it has as an attribute."""
    generator = torch.Generator().manual_seed(n + k)
    made = nn.Linear(k, n, bias=False, dtype=dtype)
    scale = (torch.rand(n, -(-k // group), generator=generator) + 0.1).to(dtype)
    scale[0, 0] = 0
    quants = torch.randint(-8, 8, (n, k), generator=generator)
    made.weight = nn.Parameter((quants * scale.float().repeat_interleave(group, dim=1)[:, :k]).to(dtype), requires_grad=False)
    made.scale = scale
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 96), (21, 72)])  # the second ends in half a group
def test_the_checkpoint_holds_the_very_weights(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    """Read by our loader, and again out of the rows that a GPU's artifact holds."""
    embedding, head = nn.Embedding(10, shape[1], dtype=dtype), nn.Linear(shape[1], 10, bias=False, dtype=dtype)
    model = nn.Sequential(embedding, linear(*shape, 32, dtype), head)
    head.weight = embedding.weight
    tensors, matrices = pack(model, 32)
    assert matrices == 1 and sorted(tensors) == ["0.weight", "1.weight_packed", "1.weight_scale", "1.weight_shape"]
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_stored({"quantization_config": calibration._layout(32)}, "config.json")
    assert stored is not None and stored.symmetric
    names = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    held = {
        name: CheckpointTensor(name=name, file="model.safetensors", dtype=names[t.dtype], shape=tuple(t.shape), offset=0, nbytes=t.nbytes)
        for name, t in tensors.items()
    }
    recipe = stored.recipe("1.weight", shape, str(dtype).removeprefix("torch."), held)
    assert recipe is not None
    with Checkpoint([tmp_path / "model.safetensors"]) as checkpoint:

        def made(wanted: dict[str, Any]) -> Any:
            return evaluate(wanted, checkpoint.fetch, checkpoint.specs(), {})

        assert torch.equal(to_torch(made(recipe), dtype), model[1].weight)
        quants, scales = (
            made({"op": "in_rows", "input": {"op": op, "bits": 4, "group": 32, "input": recipe}}) for op in ("quantize", "quantize_scales")
        )
        assert torch.equal(dequantize_plain(to_torch(quants, torch.uint8), to_torch(scales, dtype), shape[1], 32), model[1].weight)


def test_weights_that_are_no_integers_times_scales_are_refused() -> None:
    made = linear(16, 64, 32, torch.bfloat16)
    assert integers(made.weight, made.scale, 32, "q").abs().max() <= 8
    for spoilt in (made.weight + 0.4 * made.scale.float().repeat_interleave(32, dim=1), made.weight * 3, made.weight * torch.nan):
        with pytest.raises(ValueError, match="auto-round left q as something else than integers of 4 bits"):
            integers(spoilt, made.scale, 32, "q")


def test_texts(tmp_path: Path) -> None:
    assert fitting_text(None) == (TEXT, "built-in")
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one {")
    lines.write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    assert fitting_text(plain)[0] == "one {" and len(fitting_text(plain)[1]) == 64
    assert fitting_text(lines)[0] == "one\n\ntwo"
    for content, reason in (
        ('{"text": "one"}\nno', "line 2 is not JSON"),
        ('{"txt": "one"}', 'line 1 is not an object with a string "text"'),
        ("[" * 100_000, "line 1 is not JSON"),
    ):
        lines.write_text(content)
        with pytest.raises(ConfigError, match=reason):
            fitting_text(lines)
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for missing in ("b", "c"):
        with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
            fitting_text(tmp_path / missing)


def test_sequences_are_equal_and_bounded() -> None:
    assert [len(s) for s in fitting_sequences(list(range(400)), 4096, None)] == [128, 128, 128]
    assert fitting_sequences([1, 2, 3, 4, 5], 2, None) == [[1, 2], [3, 4]]
    assert len(fitting_sequences([1] * 100_000, 4096, None)) == 128
    with pytest.raises(ConfigError, match="f.txt: 127 tokens; calibration takes 128 at least"):
        fitting_sequences([1] * 127, 4096, Path("f.txt"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": None}, "no quantisation; add --quantization int4"),
        ({"quantization": "int8"}, "--quantization int8; add --quantization int4"),
        ({"weights": "external"}, "--weights external binds any"),
        ({"calibration": "rtn", "calibration_data": Path("x")}, "--calibration-data is what --calibration awq and signround fit to"),
    ],
)
def test_what_is_not_fitted_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(**settings)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], str] = importlib.metadata.version

    def version(name: str) -> str:
        if name == "auto-round":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("llmc.compiler.calibration_data.version", version)
    with pytest.raises(ConfigError, match=r'needs auto-round, which is not installed; pip install "llmc\[calibrate\]"'):
        input_key(config(), find_target("cpu:x86-64-v3"))
    input_key(config(calibration="rtn"), find_target("cpu:x86-64-v3"))


def test_the_key_holds_text_version_and_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llmc.compiler.calibration_data.version", lambda name: "0.16.0")
    text = tmp_path / "a.txt"

    def key(content: str, **settings: Any) -> str:
        text.write_text(content)
        return input_key(config(calibration_data=text, **settings), find_target("cpu:x86-64-v3")).digest

    assert key("a") == key("a") != key("b")
    assert key("a") != key("a", jobs=2) and key("a") != key("a", calibration="signround")
    monkeypatch.setattr("llmc.compiler.calibration_data.version", lambda name: "0.16.1")
    other = key("a")
    monkeypatch.setattr("llmc.compiler.calibration_data.version", lambda name: "0.16.0")
    assert other != key("a")


@pytest.mark.parametrize(("name", "reason"), [("gpt2", "holds its matrices transposed"), ("mixtral", "has experts")])
def test_models_that_are_not_reached_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path / name)
    with pytest.raises(UnsupportedModel, match=reason):
        calibration._check_model(config(), read_model(tmp_path / name))


def test_a_quantised_checkpoint_is_not_fitted_again(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": calibration._layout(32)}))
    with pytest.raises(ConfigError, match="is quantised already, by compressed-tensors"):
        calibration._check_model(config(), read_model(tmp_path / "m"))


def test_a_text_needs_a_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llmc.compiler.calibration_data.version", lambda name: "0.16.0")
    save_tiny_model("llama", tmp_path / "m")
    with pytest.raises(ConfigError, match="has no tokenizer.json; give --tokenizer DIR"):
        calibration.fitted(config(model=tmp_path / "m"), read_model(tmp_path / "m"), None, 64, tmp_path, StageLog(Silent()))


def test_the_librarys_failure_is_one_sentence(tmp_path: Path) -> None:
    """Whatever is raised in the worker's process; here it misses a field of its job."""
    with pytest.raises(InternalError, match="auto-round failed on this model: KeyError: 'threads'; compile without --calibration"):
        calibration._run(tmp_path, {})
