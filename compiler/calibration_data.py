"""What `--calibration` needs that is known before torch is imported: auto-round's version, and the text to fit to."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llmc.compiler.fitting_text import TEXT
from llmc.errors import ConfigError

LIBRARY = "auto-round"
SEQUENCE_TOKENS = 128
MAX_SEQUENCES = 128
_MAX_FILE_BYTES = 64 << 20


def installed_version() -> str:
    """auto-round's version.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return version(LIBRARY)
    except PackageNotFoundError:
        raise ConfigError(
            f'--calibration needs {LIBRARY}, which is not installed; pip install "llmc[calibrate]", or leave the flag out'
        ) from None


def fitting_text(file: Path | None) -> tuple[str, str]:
    """The text to fit to, and its name: "built-in", or the sha256 of the file.

    A file whose name ends in .jsonl holds an object a line, whose "text" counts; any other is text.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not such JSON.
    """
    if file is None:
        return TEXT, "built-in"
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"--calibration-data {file}: above {_MAX_FILE_BYTES >> 20} MiB; the first {MAX_SEQUENCES} sequences are used")
        data = file.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration-data {file}: cannot be read as UTF-8 text: {error}") from error
    if file.suffix == ".jsonl":
        text = "\n\n".join(_record(line, number, file) for number, line in enumerate(text.splitlines(), 1) if line.strip())
    return text, hashlib.sha256(data).hexdigest()


def _record(line: str, number: int, file: Path) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--calibration-data {file}: line {number} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ConfigError(f'--calibration-data {file}: line {number} is not an object with a string "text"')
    return str(record["text"])


def fitting_sequences(ids: list[int], max_model_len: int, file: Path | None) -> list[list[int]]:
    """Equal sequences of tokens, the text's first.

    Raises:
        ConfigError: fewer tokens than one sequence.
    """
    size = min(SEQUENCE_TOKENS, max_model_len)
    if len(ids) < size:
        raise ConfigError(
            f"--calibration-data {file or 'built-in'}: {len(ids)} tokens; calibration takes {size} at least, better thousands"
        )
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][:MAX_SEQUENCES]
