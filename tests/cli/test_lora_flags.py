"""The flags about LoRA adapters, from the command line to what compiles and serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.cli.engine_settings import engine_fields
from llmc.config.compile import CompileConfig, compile_config
from llmc.config.resolve import resolve
from llmc.errors import ConfigError
from llmc.runtime.server.settings import ServerSettings


def compiled(**flags: Any) -> CompileConfig:
    return compile_config(Path("model"), Path("out"), resolve("compile", flags, environ={}), force=False, use_cache=False)


def test_compile_takes_room_for_adapters() -> None:
    plain, default = compiled(), compiled(enable_lora=True)
    assert plain.max_loras == 0
    assert (default.max_loras, default.max_lora_rank, default.lora_dtype, default.lora_target_modules) == (1, 16, "auto", None)
    chosen = compiled(enable_lora=True, max_loras="4", max_lora_rank="64", lora_dtype="float32", lora_target_modules=["v_proj", "q_proj"])
    assert (chosen.max_loras, chosen.max_lora_rank, chosen.lora_dtype) == (4, 64, "float32")
    assert chosen.lora_target_modules == ("q_proj", "v_proj")
    keys = [config.key_fields() for config in (plain, default, chosen)]
    assert keys[0] != keys[1] != keys[2], "they are part of the cache's key"


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"max_loras": "2"}, "--max-loras is about LoRA adapters; give --enable-lora too"),
        ({"lora_target_modules": ["q_proj"]}, "--lora-target-modules is about LoRA adapters"),
        ({"enable_lora": True, "max_lora_rank": "12"}, "'12' is no rank to compile for; accepted: 1, 8, 16"),
        ({"enable_lora": True, "max_loras": "0"}, "out of range"),
        ({"enable_lora": True, "lora_dtype": "int8"}, "'int8' is not known; accepted: auto, bfloat16"),
        ({"enable_lora": True, "target": "cuda:h200"}, "--enable-lora --target cuda:h200: only CPUs have a kernel"),
        ({"enable_lora": True, "backend": "tvm"}, "--enable-lora with --backend tvm is not built"),
        ({"enable_lora": True, "tensor_parallel_size": "2"}, "--enable-lora with --tensor-parallel-size 2 is not built"),
    ],
)
def test_compile_refuses(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compiled(**flags)


def test_serve_takes_adapters(tmp_path: Path) -> None:
    flags = {"enable_lora": True, "lora_modules": ["sql=some/where", '{"name": "poet", "path": "/p"}'], "max_loras": "2"}
    fields = engine_fields(tmp_path, resolve("serve", flags, environ={}))
    assert (fields["enable_lora"], fields["max_loras"], fields["max_cpu_loras"]) == (True, 2, None)
    assert fields["lora_modules"] == [
        {"name": "sql", "path": str(Path("some/where").absolute()), "base_model_name": None},
        {"name": "poet", "path": "/p", "base_model_name": None},
    ]
    for name, value in (("lora_modules", ["a=b"]), ("max_loras", "1"), ("max_cpu_loras", "1")):
        with pytest.raises(ConfigError, match="is about LoRA adapters; give --enable-lora too"):
            engine_fields(tmp_path, resolve("serve", {name: value}, environ={}))
    assert "enable_lora" not in engine_fields(tmp_path, resolve("run", {}, environ={}))


def test_adapters_are_loaded_later_only_from_named_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--allow-runtime-lora-updating: nowhere is no folder"):
        ServerSettings(artifact="a", engine={"enable_lora": True}, allow_runtime_lora_updating=("nowhere",))
    with pytest.raises(ConfigError, match="give --enable-lora too"):
        ServerSettings(artifact="a", engine={}, allow_runtime_lora_updating=(str(tmp_path),))
    assert ServerSettings(artifact="a", engine={"enable_lora": True}, allow_runtime_lora_updating=(str(tmp_path),))
