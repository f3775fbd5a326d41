"""An adapter's folder -> the elements of one row of the pool, everything held against the manifest first.

Files are read, not mapped: one that shrinks meanwhile is an error, not a crash.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from llmc.artifacts.casts import cast
from llmc.artifacts.dtypes import FLOATS, NUMPY
from llmc.artifacts.manifest import LoraFacts, LoraModule
from llmc.artifacts.safetensors import TensorEntry, read_header
from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.lora.peft_config import PeftConfig, read_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 16 << 20  # beside the tensors themselves, whose bytes the manifest bounds
_PREFIX = "base_model.model."  # PEFT's wrapper around the model
_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}


def read_adapter(folder: str, facts: LoraFacts) -> np.ndarray:
    """Read a PEFT adapter.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        facts: of the artifact it is to be used with.

    Returns:
        [slot_elements] of the pool's dtype (bfloat16 as uint16): A and the scaled, transposed B of each module at its offset, ranks
        filled up with zeros, zeros for modules it leaves alone.

    Raises:
        ConfigError: one sentence about what is missing, wrong or not built.
    """
    config = read_config(_read_config(folder), f"{folder}/{CONFIG}")
    where = f"{folder}/{WEIGHTS}"
    fd = _open(folder, WEIGHTS, _MAX_HEADER_BYTES + 8 * facts.slot_elements)
    try:
        entries = read_header(fd, where)
        pairs = _pairs(entries, where, facts)
        row = np.zeros(facts.slot_elements, dtype=NUMPY[facts.dtype])
        for module, a, b in pairs:
            _check_shapes(module, a, b, config, facts, where)
            _place(row, module, _values(fd, a, where), _values(fd, b, where), config.scale_of(module.name), facts)
    except ArtifactError as error:  # of the file's header
        raise ConfigError(str(error)) from error
    finally:
        os.close(fd)
    return row


def _read_config(folder: str) -> bytes:
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: is no folder; name the folder of a PEFT adapter, with {CONFIG} and {WEIGHTS}")
    fd = _open(folder, CONFIG, _MAX_CONFIG_BYTES)
    with open(fd, "rb") as file:
        return file.read(_MAX_CONFIG_BYTES)


def _open(folder: str, name: str, max_bytes: int) -> int:
    """A descriptor of a regular file of bounded size."""
    path = f"{folder}/{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place keeps nobody waiting
    except FileNotFoundError:
        pickled = Path(folder, "adapter_model.bin").exists() and name == WEIGHTS
        hint = (
            "adapter_model.bin is a pickle, which llmc never reads: save the adapter as safetensors" if pickled else "it is no PEFT adapter"
        )
        raise ConfigError(f"{path}: is not there; {hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened: {os.strerror(error.errno or 0)}") from error
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > max_bytes:
        os.close(fd)
        what = (
            f"{facts.st_size} bytes, at most {max_bytes} can be an adapter of this artifact" if stat.S_ISREG(facts.st_mode) else "no file"
        )
        raise ConfigError(f"{path}: is {what}")
    return fd


def _pairs(entries: dict[str, TensorEntry], where: str, facts: LoraFacts) -> list[tuple[LoraModule, TensorEntry, TensorEntry]]:
    """The matrices of each module that the adapter changes."""
    modules = {module.name: module for module in facts.modules}
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(_PREFIX):
            raise ConfigError(f"{where}: the tensor {name[:200]!r} is no matrix of a LoRA adapter of linears, so it is not served")
        module = name[len(_PREFIX) : -len(suffix)]
        if module not in modules:
            known = ", ".join(sorted({one.rpartition(".")[2] for one in modules}))
            raise ConfigError(
                f"{where}: the adapter changes {module[:200]!r}, for which this artifact has no room; it has {known}: compile with "
                f"--lora-target-modules {module[:200].rpartition('.')[2]}, or without the flag for all linears of the layers"
            )
        if entry.dtype not in FLOATS:
            raise ConfigError(f"{where}: the tensor {name[:200]!r} is of {entry.stored_dtype}; expected F32, F16 or BF16")
        found.setdefault(module, {})[_PARTS[suffix]] = entry
    for module, parts in found.items():
        if len(parts) != 2:
            raise ConfigError(f"{where}: {module[:200]!r} has only one of lora_A and lora_B; the file is incomplete")
    if not found:
        raise ConfigError(f"{where}: holds no tensors, so it is no adapter")
    return [(modules[name], parts["A"], parts["B"]) for name, parts in found.items()]


def _check_shapes(module: LoraModule, a: TensorEntry, b: TensorEntry, config: PeftConfig, facts: LoraFacts, where: str) -> None:
    rank = config.rank_of(module.name)
    if rank > facts.max_rank:
        raise ConfigError(
            f"{where}: {module.name} has rank {rank}, this artifact takes up to {facts.max_rank}; compile with --max-lora-rank {rank} "
            "or more"
        )
    for entry, expected in ((a, (rank, module.in_features)), (b, (module.out_features, rank))):
        if entry.shape != expected:
            raise ConfigError(
                f"{where}: the tensor {entry.name[:200]!r} is {list(entry.shape)}, expected {list(expected)}: it is of another model"
            )


def _values(fd: int, entry: TensorEntry, where: str) -> np.ndarray:
    """A tensor as float32."""
    assert entry.dtype is not None
    data = bytearray()
    while len(data) < entry.nbytes:
        piece = os.pread(fd, entry.nbytes - len(data), entry.offset + len(data))
        if not piece:
            raise ConfigError(f"{where}: ends inside the tensor {entry.name[:200]!r}; it was cut short while it was read")
        data += piece
    stored = np.frombuffer(data, dtype=NUMPY[entry.dtype]).reshape(entry.shape)
    wide = np.asarray(cast(stored, entry.dtype, "float32"))
    if not np.isfinite(wide).all():
        raise ConfigError(f"{where}: the tensor {entry.name[:200]!r} holds infinities or NaN; the adapter is broken")
    return wide


def _place(row: np.ndarray, module: LoraModule, a: np.ndarray, b: np.ndarray, scale: float, facts: LoraFacts) -> None:
    """Write a module's matrices where the program reads them. Changes `row`."""
    with np.errstate(over="ignore"):  # what does not fit the pool's dtype is found below
        scaled = cast((b.T * np.float32(scale)).astype(np.float32), "float32", facts.dtype)
    narrow = cast(a, "float32", facts.dtype)
    for values in (scaled, narrow):
        if not np.isfinite(np.asarray(cast(values, facts.dtype, "float32"))).all():
            raise ConfigError(f"{module.name}: the adapter's numbers do not fit {facts.dtype}; compile with --lora-dtype float32")
    rank = len(a)
    begin_b = module.offset + facts.max_rank * module.in_features
    row[module.offset : module.offset + rank * module.in_features] = narrow.reshape(-1)
    row[begin_b : begin_b + rank * module.out_features] = np.ascontiguousarray(scaled).reshape(-1)
