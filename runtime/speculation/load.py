"""A draft model's artifact, loaded beside the one it guesses for."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.artifacts.manifest import Manifest
from llmc.errors import ConfigError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.scheduler import SchedulerConfig
from llmc.runtime.step import Executor


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftModel:
    """A draft that can compute, with a KV cache of its own. `executor` and `builder` are the drafter's from here on."""

    manifest: Manifest
    executor: Executor
    builder: BatchBuilder
    limits: SchedulerConfig  # of its own artifact and pool
    num_speculative_tokens: int  # most guesses of one sequence in one step


def check_fits(manifest: Manifest, draft: Manifest, path: str) -> None:
    """Refuse a draft whose tokens mean something else, or which cannot run in this process. Asks.

    Raises:
        ConfigError: says what differs.
    """
    if draft.pooling is not None:
        raise ConfigError(f"speculative_config: {path} was compiled for embeddings, which guess nothing; name an artifact that generates")
    if any(entry.executor == "plans" for entry in draft.entries):
        raise ConfigError(f"speculative_config: {path} was compiled for a GPU; a draft model runs on the CPU, compile it for that")
    if any(tensor.file is None for tensor in draft.tensors):
        raise ConfigError(f"speculative_config: {path} was compiled with --weights external; a draft must carry its weights")
    if draft.model.vocab_size != manifest.model.vocab_size:
        raise ConfigError(
            f"speculative_config: {path} has a vocabulary of {draft.model.vocab_size} tokens, the model of {manifest.model.vocab_size}; "
            "a draft must have the same"
        )
    if _tokenizer_digest(draft) != _tokenizer_digest(manifest):
        raise ConfigError(f"speculative_config: the tokenizer of {path} is not the model's; a draft must have the same tokenizer.json")
    for role in ("kernels", "aoti_shim", "tensor_runtime"):
        own, other = ({image.sha256 for image in one.images if image.role == role} for one in (manifest, draft))
        if own and other and own != other:
            raise ConfigError(
                f"speculative_config: {path} brings other {role} than the model, and one process can hold one of them; "
                "compile both with the same llmc, for the same target"
            )


def _tokenizer_digest(manifest: Manifest) -> str | None:
    path = manifest.tokenizer.tokenizer_json
    return None if path is None else next(record.sha256 for record in manifest.files if record.path == path)
