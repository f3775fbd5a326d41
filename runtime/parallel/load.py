"""Artifact -> the executor of all its ranks (rank 0), or of one other rank (worker.py)."""

from __future__ import annotations

from pathlib import Path

from llmc.artifacts.manifest import Entry, Manifest
from llmc.artifacts.verify import OpenArtifact, open_artifact
from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.engine_config import EngineConfig, num_threads
from llmc.runtime.executors import load_code
from llmc.runtime.parallel.group import Group
from llmc.runtime.parallel.ranks import RanksExecutor
from llmc.runtime.stage_timer import StageTimer
from llmc.runtime.step import Executor
from llmc.runtime.weights import load_weights


def load_ranks(artifact: OpenArtifact, config: EngineConfig, timer: StageTimer) -> Executor:
    """Rank 0's program, and a process for every other rank.

    Raises:
        ArtifactError, ConfigError: a rank cannot load its part.
    """
    if config.checkpoint is not None or config.weights_mmap:
        raise ConfigError("--checkpoint, --weights-mmap: an artifact of several ranks carries its weights and copies them; leave both out")
    ranks = artifact.manifest.tensor_parallel_size
    threads = max(1, num_threads(config) // ranks)
    with timer.stage("load"):
        executor, group = _load(artifact, config, 0, threads, None)
    with timer.stage("ranks"):
        return RanksExecutor(executor, group, ranks, config, threads)


def load_rank(config: EngineConfig, rank: int, memory_fd: int) -> Executor:
    """The program of one rank, verified as rank 0's is, in its own process."""
    trust = Path(config.trust) if config.trust else None
    with open_artifact(config.artifact, require_signature=config.require_signature, trust=trust) as artifact:
        executor, _ = _load(artifact, config, rank, num_threads(config), memory_fd)
        return executor


def _load(artifact: OpenArtifact, config: EngineConfig, rank: int, threads: int, memory_fd: int | None) -> tuple[Executor, Group]:
    manifest = artifact.manifest
    entry = rank_entry(manifest, rank)
    descriptors = {record.path: artifact.fd(record.path) for record in manifest.files}
    code = load_code(manifest, entry, descriptors, num_threads=threads)
    group = Group(rank, manifest.tensor_parallel_size, memory_fd)
    used = set(entry.constants.values())
    tensors = [tensor for tensor in manifest.tensors if tensor.name in used]
    files = {tensor.file for tensor in tensors}
    sources = [source for source in artifact.weights(verify=config.verify_weights) if source.path in files]
    return code.bind(load_weights(sources, tensors, num_threads=max(2, threads))), group


def rank_entry(manifest: Manifest, rank: int) -> Entry:
    """The entry of a rank.

    Raises:
        ArtifactError: there is none.
    """
    name = "step" if rank == 0 else f"step.rank{rank}"
    for entry in manifest.entries:
        if entry.name == name:
            return entry
    raise ArtifactError(f"manifest.json: no entry {name!r} for rank {rank} of {manifest.tensor_parallel_size}; compile again")
