"""Reading PEFT adapters: where each number goes, and one sentence for each way to be wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.artifacts.manifest import LoraFacts, LoraModule
from llmc.errors import ConfigError, RequestRejected
from llmc.runtime.lora import AdapterPath, adapter_paths
from llmc.runtime.lora.adapter import read_adapter
from llmc.runtime.lora.store import AdapterStore
from tests.lora_adapters import write_adapter

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
FACTS = LoraFacts(
    max_loras=2,
    max_rank=6,
    dtype="float32",
    slot_elements=256,
    modules=[LoraModule(name=Q, in_features=8, out_features=4, offset=0), LoraModule(name=UP, in_features=8, out_features=12, offset=96)],
)


def tensors(rank: int = 4, *modules: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in FACTS.modules:
        if not modules or module.name in modules:
            made[f"base_model.model.{module.name}.lora_A.weight"] = torch.randn((rank, module.in_features), generator=generator)
            made[f"base_model.model.{module.name}.lora_B.weight"] = torch.randn((module.out_features, rank), generator=generator)
    return made


def delta(row: np.ndarray, module: LoraModule, max_rank: int = 6) -> np.ndarray:
    """B A as the program computes it, [out, in]."""
    middle, end = module.offset + max_rank * module.in_features, module.offset + max_rank * (module.in_features + module.out_features)
    return row[middle:end].reshape(max_rank, -1).T @ row[module.offset : middle].reshape(max_rank, -1)


def product(made: dict[str, Tensor], module: str) -> np.ndarray:
    return (made[f"base_model.model.{module}.lora_B.weight"] @ made[f"base_model.model.{module}.lora_A.weight"]).numpy()


@pytest.mark.parametrize(
    "config, scales",
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"lora_alpha": 1}, (0.25, 0.25)),
        ({"alpha_pattern": {"q_proj": 16}}, (4.0, 2.0)),
        ({"alpha_pattern": {"^" + UP: 12, "proj": 99, "mlp.up_proj": 99}}, (2.0, 3.0)),
    ],
)
def test_the_product_of_the_matrices_is_the_adapters_times_its_scale(
    tmp_path: Path, config: dict[str, Any], scales: tuple[float, float]
) -> None:
    made = tensors()
    row = read_adapter(str(write_adapter(tmp_path, made, **config)), FACTS)
    for module, scale in zip(FACTS.modules, scales, strict=True):
        np.testing.assert_allclose(delta(row, module), scale * product(made, module.name), rtol=1e-5, atol=1e-6)
    assert not row[72:96].any() and not row[216:].any()  # gaps


def test_ranks_may_differ_and_modules_be_left_alone(tmp_path: Path) -> None:
    made = tensors(4, Q) | tensors(2, UP)
    row = read_adapter(str(write_adapter(tmp_path / "both", made, rank_pattern={"up_proj": 2})), FACTS)
    np.testing.assert_allclose(delta(row, FACTS.modules[1]), 4.0 * product(made, UP), rtol=1e-5, atol=1e-6)
    row = read_adapter(str(write_adapter(tmp_path / "one", tensors(4, UP))), FACTS)
    assert not row[:96].any() and row[96:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_adapters_and_narrow_pools(tmp_path: Path, dtype: torch.dtype) -> None:
    made = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    folder = str(write_adapter(tmp_path, made))
    wide = read_adapter(folder, FACTS)
    exact = {name: tensor.float() for name, tensor in made.items()}
    np.testing.assert_allclose(delta(wide, FACTS.modules[0]), 2 * product(exact, Q), rtol=1e-5, atol=1e-6)
    name = str(dtype).removeprefix("torch.")
    narrow = read_adapter(folder, LoraFacts(**{**{f: getattr(FACTS, f) for f in FACTS.__struct_fields__}, "dtype": name}))  # type: ignore[arg-type]
    assert torch.equal(torch.from_numpy(narrow).view(dtype).float(), torch.from_numpy(wide))  # a scale of 2 rounds nothing


def broken_config(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write_adapter(folder, tensors(), **fields)

    return spoil


def broken_tensors(change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        made = tensors()
        change(made)
        write_adapter(folder, made, **config)

    return spoil


A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"


def pickled(folder: Path) -> None:
    write_adapter(folder, tensors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def pipe(folder: Path) -> None:
    write_adapter(folder, tensors())
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def cut(folder: Path) -> None:
    write_adapter(folder, tensors())
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-8])


def huge(folder: Path) -> None:
    write_adapter(folder, tensors())
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 30)


def header(text: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write_adapter(folder, tensors())
        (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    return spoil


def config_text(text: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write_adapter(folder, tensors())
        (folder / "adapter_config.json").write_bytes(text)

    return spoil


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: None, "is no folder; name the folder of a PEFT adapter"),
        (lambda folder: folder.mkdir(), "adapter_config.json: is not there; it is no PEFT adapter"),
        (pickled, "adapter_model.bin is a pickle, which llmc never reads"),
        (pipe, "adapter_model.safetensors: is no file"),
        (cut, "the file is cut short"),
        (huge, "at most .* can be an adapter of this artifact"),
        (header(b"[]"), "does not begin with"),
        (header(b'{"a": 1}'), "expected exactly dtype, shape and data_offsets"),
        (config_text(b"{"), "expected the adapter_config.json of a LoRA adapter"),
        (config_text(b"[1]"), "expected the adapter_config.json of a LoRA adapter"),
        (config_text(b'{"r": "x", "lora_alpha": 1}'), "expected the adapter_config.json of a LoRA adapter"),
        (config_text(b"[" * 100000), "expected the adapter_config.json of a LoRA adapter"),
        (broken_config(peft_type="IA3"), "only LORA adapters are served"),
        (broken_config(use_dora=True), "has DoRA, which is not built; merge it"),
        (broken_config(modules_to_save=["lm_head"]), "whole modules of its own"),
        (broken_config(bias="lora_only"), "only adapters without trained biases"),
        (broken_config(lora_bias=True), "a bias inside the adapter"),
        (broken_config(fan_in_fan_out=True), "weights stored transposed"),
        (broken_config(init_lora_weights="pissa_niter_4"), "its base weights are not the checkpoint's"),
        (broken_config(r=0), "a rank of 0; expected 1 to 4096"),
        (broken_config(lora_alpha=float("inf")), "expected the adapter_config.json|no finite number"),
        (broken_config(rank_pattern={"(a+)+$": 2}), "is more than a module's name"),
        (broken_config(rank_pattern={"q_proj": 3}), r"is \[4, 8\], expected \[3, 8\]: it is of another model"),
        (broken_config(r=7), "has rank 7, this artifact takes up to 6; compile with --max-lora-rank 7 or more"),
        (broken_tensors(dict.clear), "holds no tensors"),
        (broken_tensors(lambda made: made.pop(A)), "has only one of lora_A and lora_B"),
        (broken_tensors(lambda made: made.update({A: made[A][:, :7]})), r"is \[4, 7\], expected \[4, 8\]"),
        (broken_tensors(lambda made: made.update({B: made[B][:3]})), r"is \[3, 4\], expected \[4, 4\]"),
        (broken_tensors(lambda made: made.update({A: made[A].double()})), "is of F64; expected F32, F16 or BF16"),
        (broken_tensors(lambda made: made.update({A: made[A] / 0})), "holds infinities or NaN"),
        (broken_tensors(lambda made: made.update({A.replace("q_proj", "k_proj"): made[A]})), "changes 'model.layers.0.self_attn.k_proj'"),
        (broken_tensors(lambda made: made.update({"base_model.model.embed.lora_embedding_A": made[A]})), "is no matrix of a LoRA adapter"),
        (broken_tensors(lambda made: made.update({A.replace("lora_A", "lora_magnitude_vector"): made[A]})), "is no matrix"),
        (broken_tensors(lambda made: made.update({A.removeprefix("base_model.model."): made[A]})), "is no matrix"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    folder = tmp_path / "adapter"
    spoil(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        read_adapter(str(folder), FACTS)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_numbers_that_the_pool_cannot_hold_are_refused(tmp_path: Path) -> None:
    made = tensors()
    made[B] = made[B] * 1e5
    narrow = LoraFacts(**{**{f: getattr(FACTS, f) for f in FACTS.__struct_fields__}, "dtype": "float16"})
    with pytest.raises(ConfigError, match="do not fit float16; compile with --lora-dtype float32"):
        read_adapter(str(write_adapter(tmp_path, made)), narrow)


def test_a_store_reads_again_what_it_could_not_keep_and_trusts_no_change(tmp_path: Path) -> None:
    paths = [AdapterPath(name=name, path=str(write_adapter(tmp_path / name, tensors(seed=seed)))) for seed, name in enumerate("ab")]
    store = AdapterStore(FACTS, paths, max_kept=1)
    assert [store.number_of(name) for name in "ab"] == [1, 2]
    store.bring(0, 1)
    np.testing.assert_array_equal(store.pool.array[0], read_adapter(paths[0].path, FACTS))
    write_adapter(tmp_path / "b", tensors(seed=9))
    with pytest.raises(ConfigError, match="holds other weights than when it was loaded"):
        store.bring(1, 2)
    with pytest.raises(ConfigError, match="there is an adapter 'a' already"):
        store.add(paths[0])
    assert store.remove("a") == 1
    with pytest.raises(RequestRejected, match="no adapter 'a'"):
        store.number_of("a")
    store.forget(1)
    assert store.add(paths[0]) == 3, "a number is never given again"


def test_lora_modules_are_names_and_folders() -> None:
    found = adapter_paths(["sql=/some/where=x", '{"name": "b", "path": "c", "base_model_name": "base"}'])
    assert [(one.name, one.path, one.base_model_name) for one in found] == [("sql", "/some/where=x", None), ("b", "c", "base")]
    for given, words in (
        (["sql"], "expected NAME=FOLDER or a JSON object"),
        (["sql="], "no folder is named"),
        (["a=b", "a=c"], "names 'a' twice"),
        (["a b=c"], "is no name for an adapter"),
        (["=c"], "is no name for an adapter"),
        (['{"name": "a"}'], "found Object missing required field"),
        (['{"name": "a", "path": "b", "more": 1}'], "unknown field"),
        (["a\n=c"], "is no name"),
    ):
        with pytest.raises(ConfigError, match=words):
            adapter_paths(given)


def test_a_config_may_hold_what_peft_adds_later(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tensors(), some_new_field={"a": 1}, exclude_modules=None, loftq_config={}, corda_config=None)
    assert json.loads((folder / "adapter_config.json").read_text())["some_new_field"]
    assert read_adapter(str(folder), FACTS).any()
