"""How an embedding model's hidden states become one vector: what the command line says, else what the model folder says.

Folders made with sentence-transformers list their modules in modules.json (Transformer, Pooling, perhaps Normalize), and the
pooling's settings in the Pooling module's own config.json. Other folders say nothing: the last token, normalised, is then taken.
Standard library only: it runs before a compile is looked up in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from llmc.artifacts.manifest import PoolingFacts, PoolingKind
from llmc.errors import ConfigError, UnsupportedModel

_MODES: dict[str, PoolingKind] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}
_OTHER_FLAGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
_MAX_JSON_BYTES = 1 << 20


def read_pooling(folder: Path, *, pooling: str, normalize: str) -> PoolingFacts:
    """Settle both choices.

    Args:
        pooling: "mean", "last", "cls", or "auto" for the folder's own.
        normalize: "yes", "no", or "auto".

    Raises:
        UnsupportedModel: the folder asks for a module or a pooling that llmc has not got.
        ConfigError: an unknown word.
    """
    if pooling not in ("auto", "mean", "last", "cls") or normalize not in ("auto", "yes", "no"):
        raise ConfigError(f"pooling {pooling!r}, normalize {normalize!r}; accepted: auto, mean, last, cls, and auto, yes, no")
    own = _of_folder(folder) if (folder / "modules.json").is_file() else PoolingFacts(kind="last", normalize=True)
    return PoolingFacts(
        kind=own.kind if pooling == "auto" else pooling,  # type: ignore[arg-type]
        normalize=own.normalize if normalize == "auto" else normalize == "yes",
    )


def _of_folder(folder: Path) -> PoolingFacts:
    where = folder / "modules.json"
    modules = _read(where)
    if not isinstance(modules, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules):
        raise UnsupportedModel(f"{where}: expected a list of sentence-transformers' modules, each with a type")
    kind, normalized = None, False
    for module in modules:
        name = module["type"].rpartition(".")[2]
        if name == "Pooling":
            kind = _kind(folder, str(module.get("path", "")))
        elif name == "Normalize":
            normalized = True
        elif name != "Transformer":
            raise UnsupportedModel(f"{where}: the module {name} is not built; llmc computes a transformer, a pooling and a normalisation")
    if kind is None:
        raise UnsupportedModel(f"{where}: no Pooling module; name the pooling with --pooling, on a folder without modules.json")
    _check_text(folder)
    return PoolingFacts(kind=kind, normalize=normalized)


def _kind(folder: Path, path: str) -> PoolingKind:
    parts = PurePosixPath(path).parts
    if len(parts) != 1 or parts[0] in ("..", "/"):
        raise UnsupportedModel(f"{folder / 'modules.json'}: the Pooling module's path {path!r} is not a folder beside it")
    where = folder / path / "config.json"
    config = _read(where)
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{where}: holds a {type(config).__name__}, expected a JSON object")
    chosen = [mode for flag, mode in _FLAGS.items() if config.get(flag)] + [flag for flag in _OTHER_FLAGS if config.get(flag)]
    mode = config.get("pooling_mode")
    if mode is not None:
        chosen = list(mode) if isinstance(mode, list) else [mode]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise UnsupportedModel(
            f"{where}: pooling by {', '.join(map(str, chosen)) or 'nothing'} is not built; expected one of mean, lasttoken, cls"
        )
    return _MODES[chosen[0]]


def _check_text(folder: Path) -> None:
    path = folder / "sentence_bert_config.json"
    if path.is_file():
        config = _read(path)
        if isinstance(config, dict) and config.get("do_lower_case"):
            raise UnsupportedModel(f"{path}: do_lower_case is not built; the tokenizer itself would have to lower the text's case")


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UnsupportedModel(f"{path}: larger than the {_MAX_JSON_BYTES} bytes expected of such a file")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: not valid JSON: {error}") from error
