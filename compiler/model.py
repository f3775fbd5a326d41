"""Read a Hugging Face model folder, all but the weights.

    folder -> ModelSource

`transformers` parses the configuration (never with remote code); the rest is read and checked here. What llmc cannot
compile is refused now, in one sentence, not after minutes of work.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmc.artifacts.safetensors import Checkpoint, read_header
from llmc.compiler.checkpoint_tensor import CheckpointTensor
from llmc.compiler.stored_quantization import StoredQuantization, read_stored
from llmc.compiler.supported import check_supported
from llmc.errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")

_MAX_JSON_BYTES = 64 << 20
_MAX_MODULES = 10_000  # layers, or experts in a layer; transformers would build lists of any length
_MODULE_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "num_experts", "num_local_experts")
_FLOAT_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model folder, read and checked. Nothing in it is "auto" any more."""

    path: Path
    name: str  # the folder's name
    config: PretrainedConfig
    model_type: str
    architecture: str  # "Qwen3ForCausalLM"
    dtype: str  # of the computation: one of DTYPES
    tensors: Mapping[str, CheckpointTensor]
    stored: StoredQuantization | None  # how the checkpoint is quantised already
    tied_embeddings: bool  # the output projection is the input embedding
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    generation_config: Mapping[str, Any]  # generation_config.json as it is, {} if there is none
    tokenizer_files: tuple[str, ...]  # those of TOKENIZER_FILES that exist


def read_model(path: str | Path, *, dtype: str = "auto", embed: bool = False) -> ModelSource:
    """Read a model folder.

    Args:
        path: a folder with config.json and *.safetensors as Hugging Face writes them.
        dtype: one of DTYPES, or "auto" for the configuration's (else the checkpoint's) own.
        embed: it is to embed, for which a decoder without its output projection will do.

    Raises:
        ConfigError: no such folder, or an unknown dtype.
        UnsupportedModel: the model is of a kind llmc does not compile, or a file is missing.
        ArtifactError: a safetensors file is damaged.
    """
    folder = Path(path)
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; accepted: auto, {', '.join(DTYPES)}")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected a Hugging Face model folder with config.json and *.safetensors")
    raw = read_json(folder / "config.json")
    check_supported(raw, str(folder / "config.json"), embed=embed)
    for key in _MODULE_COUNTS:
        if isinstance(raw.get(key), int | float) and raw[key] > _MAX_MODULES:
            raise UnsupportedModel(f"{folder / 'config.json'}: {key} is {raw[key]}, more than the {_MAX_MODULES} that any model has")
    stored = read_stored(raw, str(folder / "config.json"))
    tensors = _checkpoint(folder)
    config = _auto_config(folder)
    text = config.get_text_config()
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    architectures = raw.get("architectures")
    vocab_size = _size(folder, text, "vocab_size")
    return ModelSource(
        path=folder,
        name=folder.resolve().name,
        config=config,
        model_type=raw["model_type"],
        architecture=str(architectures[0]) if architectures else raw["model_type"],
        dtype=_dtype(folder, raw, tensors) if dtype == "auto" else dtype,
        tensors=MappingProxyType(tensors),
        stored=stored,
        tied_embeddings=bool(config.tie_word_embeddings),
        num_layers=_size(folder, text, "num_hidden_layers"),
        hidden_size=_size(folder, text, "hidden_size"),
        vocab_size=vocab_size,
        max_position_embeddings=_size(folder, text, "max_position_embeddings"),
        eos_token_ids=_token_ids(_first(generation, text, "eos_token_id"), vocab_size, folder),
        bos_token_id=_token_id(_first(generation, text, "bos_token_id"), folder),
        pad_token_id=_token_id(_first(generation, text, "pad_token_id"), folder),
        generation_config=MappingProxyType(generation),
        tokenizer_files=tuple(name for name in TOKENIZER_FILES if (folder / name).is_file()),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UnsupportedModel: missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise UnsupportedModel(f"{path}: no such file; a model folder needs it")
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise UnsupportedModel(f"{path}: {size} bytes is more than the {_MAX_JSON_BYTES} expected of such a file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Map the model's weights; a context manager."""
    return Checkpoint([source.path / name for name in sorted({tensor.file for tensor in source.tensors.values()})])


def _checkpoint(folder: Path) -> dict[str, CheckpointTensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _sharded(folder, index)
    files = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())  # a pipe would be waited on for ever
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    if len(files) == 1:
        return _header(folder, files[0])
    if files:
        raise UnsupportedModel(
            f"{folder}: {len(files)} safetensors files and no model.safetensors.index.json that says which tensor is where"
        )
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise UnsupportedModel(
            f"{folder}: weights only as {pickled[0]}, a pickle, which can run code when read; llmc reads safetensors alone. "
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UnsupportedModel(f"{folder}: no *.safetensors file; expected model.safetensors, or shards with model.safetensors.index.json")


def _sharded(folder: Path, index: Path) -> dict[str, CheckpointTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UnsupportedModel(f"{index}: expected an object weight_map from tensor names to file names")
    headers: dict[str, dict[str, CheckpointTensor]] = {}
    for file in sorted(set(weight_map.values())):
        if PurePosixPath(file).name != file or not file.endswith(".safetensors"):
            raise UnsupportedModel(f"{index}: {file!r} is not the plain name of a .safetensors file in the same folder")
        if not (folder / file).is_file():
            raise UnsupportedModel(f"{folder / file}: no such file, yet {index.name} names it; the download is incomplete")
        headers[file] = _header(folder, file)
    missing = [name for name, file in weight_map.items() if name not in headers[file]]
    if missing:
        raise UnsupportedModel(f"{index}: tensor {missing[0]!r} is not in {weight_map[missing[0]]!r}, where it should be")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _header(folder: Path, file: str) -> dict[str, CheckpointTensor]:
    with (folder / file).open("rb") as handle:
        entries = read_header(handle.fileno(), str(folder / file))
    return {
        name: CheckpointTensor(name=name, file=file, dtype=e.stored_dtype, shape=e.shape, offset=e.offset, nbytes=e.nbytes)
        for name, e in entries.items()
    }


def _auto_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers' and huggingface_hub's validation errors have no common base
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"{folder / 'config.json'}: transformers does not accept it: {type(error).__name__}: {reason}") from error


def _dtype(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, CheckpointTensor]) -> str:
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named in DTYPES:
        return str(named)
    by_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _FLOAT_NAMES:
            by_bytes[_FLOAT_NAMES[tensor.dtype]] += tensor.nbytes
    if not by_bytes:
        raise UnsupportedModel(
            f"{folder}: dtype {named!r} is not one llmc computes in, and the checkpoint has no float tensor; give --dtype"
        )
    return by_bytes.most_common(1)[0][0]


def _size(folder: Path, config: PretrainedConfig, key: str) -> int:
    value = getattr(config, key, None)
    if type(value) is not int or value <= 0:
        raise UnsupportedModel(f"{folder / 'config.json'}: {key} is {value!r}, expected a positive integer")
    return value


def _first(generation: Mapping[str, Any], config: PretrainedConfig, key: str) -> Any:
    value = generation.get(key)
    return getattr(config, key, None) if value is None else value


def _token_ids(value: Any, vocab_size: int, folder: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int and 0 <= v < vocab_size for v in values):
        raise UnsupportedModel(
            f"{folder}: eos_token_id is {value!r}, expected a token id from 0 to {vocab_size - 1} or a list of them; "
            "correct it in generation_config.json or config.json"
        )
    return tuple(dict.fromkeys(values))


def _token_id(value: Any, folder: Path) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and type(value) is not int:
        raise UnsupportedModel(f"{folder}: a special token id is {value!r}, expected an integer")
    return value
