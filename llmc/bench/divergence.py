"""How far an artifact's distributions are from another's, on the same forced tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc.artifacts.verify import open_artifact
from llmc.bench.processes import worker
from llmc.compiler.calibration_text import TEXT
from llmc.errors import InternalError

SEQUENCE_TOKENS = 96
NUM_SEQUENCES = 2
DECODE_TOKENS = 16  # of each sequence, computed one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """mean_kl, max_kl: nats per token, of the reference from the other, over softmax(logits). same_top: share of rows whose best token
    is the same. max_difference: the largest difference of two logits."""

    rows: int
    mean_kl: float
    max_kl: float
    same_top: float
    max_difference: float


def forced_tokens(artifact: Path) -> list[list[int]]:
    """The calibration text in the artifact's own tokens, or a fixed sequence of ids where it has no tokenizer."""
    with open_artifact(artifact, check_machine=False) as opened:
        manifest = opened.manifest
        path = manifest.tokenizer.tokenizer_json
        source = opened.read(path) if path is not None else None
    vocab = manifest.model.vocab_size
    size = max(2, min(SEQUENCE_TOKENS, manifest.limits.max_model_len))
    if source is not None:
        from tokenizers import Tokenizer

        ids = [i for i in Tokenizer.from_buffer(source).encode(TEXT, add_special_tokens=False).ids if i < vocab]
    else:
        ids = [(2654435761 * (1 + i)) % vocab for i in range(size * NUM_SEQUENCES)]
    return [part for start in range(0, size * NUM_SEQUENCES, size) if len(part := ids[start : start + size]) > 1]


def divergences(
    reference: Path, others: Mapping[str, Path], sequences: Sequence[Sequence[int]], *, threads: int, scratch: Path
) -> dict[str, Divergence]:
    """Each of `others` against `reference`, every one in a process of its own."""
    wanted = _logits(reference, sequences, threads, scratch / "reference.npy")
    found = {}
    for number, (name, artifact) in enumerate(others.items()):
        path = scratch / f"logits-{number}.npy"
        found[name] = compare(wanted, _logits(artifact, sequences, threads, path))
        path.unlink()
    return found


def compare(reference: np.ndarray, other: np.ndarray) -> Divergence:
    """Row by row; float32 [rows, vocab_size], sums in float64."""
    if reference.shape != other.shape:
        raise InternalError(f"logits of shape {other.shape} where the reference has {reference.shape}; please report this")
    kl, same, apart = [], 0, 0.0
    for wanted, found in zip(reference, other, strict=True):
        p, q = _log_softmax(wanted), _log_softmax(found)
        with np.errstate(invalid="ignore"):
            kl.append(float(np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum()))
        same += int(wanted.argmax() == found.argmax())
        finite = np.isfinite(wanted) & np.isfinite(found)
        apart = max(apart, float(np.abs(wanted - found)[finite].max(initial=0.0)))
    return Divergence(
        rows=len(kl), mean_kl=max(0.0, float(np.mean(kl))), max_kl=max(0.0, max(kl)), same_top=same / len(kl), max_difference=apart
    )


def _log_softmax(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    wide -= wide.max()
    shifted: np.ndarray = wide - np.log(np.exp(wide).sum())
    return shifted


def _logits(artifact: Path, sequences: Sequence[Sequence[int]], threads: int, out: Path) -> np.ndarray:
    request = {
        "artifact": str(artifact),
        "threads": threads,
        "sequences": [list(sequence) for sequence in sequences],
        "decode": DECODE_TOKENS,
        "out": str(out),
    }
    worker("llmc.bench.logits_worker", request, threads=threads)
    rows: np.ndarray = np.load(out, mmap_mode="r", allow_pickle=False)
    return rows
