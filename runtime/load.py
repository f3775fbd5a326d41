"""Artifact folder -> LoadedModel: verify, map code and weights, allocate the KV cache, run the canaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmc.artifacts.manifest import Manifest, TensorRecord
from llmc.artifacts.verify import OpenArtifact, open_artifact
from llmc.artifacts.weight_source import WeightSource
from llmc.errors import ConfigError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.canary import run_canaries
from llmc.runtime.engine_config import EngineConfig, num_threads, resolve, resolved_max_loras, speculation
from llmc.runtime.executors import LoadedCode, load_code, step_entry
from llmc.runtime.kept_file import KeptFile
from llmc.runtime.lane_hash import LaneHash
from llmc.runtime.memory import available_bytes, keep_freed_memory
from llmc.runtime.scheduler import SchedulerConfig
from llmc.runtime.scheduler.drafts import DraftModelConfig
from llmc.runtime.stage_timer import StageTimer
from llmc.runtime.step import Executor, LoraExecutor
from llmc.runtime.weight_mover import WeightMover, can_move
from llmc.runtime.weights import Weights, load_weights, map_weights, merge_weights

if TYPE_CHECKING:
    from llmc.runtime.lora.store import AdapterStore
    from llmc.runtime.speculation.load import DraftModel


EARLY_BYTES = 256 << 20  # less is copied in the time of a few steps
_HEAD_START_S = 0.5  # of the first request before weights that move


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model that can compute. `executor` and `builder` are the runner's from here on."""

    manifest: Manifest
    executor: Executor
    builder: BatchBuilder
    limits: SchedulerConfig
    num_canary_tokens: int  # compared with the reference; 0 when canaries were skipped
    startup_ms: Mapping[str, float]  # stage -> milliseconds; "load.code" and "load.weights" run side by side inside "load"
    tokenizer: KeptFile | None = None  # tokenizer.json, for structured output; None: the artifact has none
    adapters: AdapterStore | None = None  # of an artifact with room for LoRA adapters
    draft: DraftModel | None = None  # runs ahead and guesses (speculative decoding)


def load_model(config: EngineConfig, artifact: OpenArtifact | None = None) -> LoadedModel:
    """Load what `config` names.

    Args:
        artifact: the artifact, opened and verified already by a caller that keeps it open meanwhile; None opens `config.artifact`.

    Raises:
        ArtifactError: the artifact is damaged, foreign, or computes something else than its compiler did.
        ConfigError: a setting does not fit the artifact or the machine.
    """
    timer = StageTimer()
    if artifact is not None:
        return _load(artifact, config, timer)
    with timer.stage("verify"):
        artifact = open_artifact(
            config.artifact, require_signature=config.require_signature, trust=Path(config.trust) if config.trust else None
        )
    with artifact:
        return _load(artifact, config, timer)


def _load(artifact: OpenArtifact, config: EngineConfig, timer: StageTimer) -> LoadedModel:
    keep_freed_memory()
    manifest = artifact.manifest
    guesses = speculation(config, manifest)
    adapters = load_adapters(config, manifest, timer)  # before the weights: a bad one is told at once
    compared = 0
    with ExitStack() as undo:  # a GPU's memory does not go with the object
        executor, free_bytes, mover = _load_executor(artifact, config, timer)
        undo.callback(executor.close)
        if adapters is not None:
            cast("LoraExecutor", executor).bind_lora(adapters.pool.array)
        begun = None
        if isinstance(guesses, DraftModelConfig):
            with timer.stage("draft.load"):
                begun = _load_draft(manifest, guesses, config)
            undo.callback(begun[1].close)
        with timer.stage("kv"):
            free = free_bytes() - (adapters.pool.array.nbytes if adapters is not None else 0)  # its pages are not there yet
            limits = resolve(config, manifest, available_bytes=free, draft=begun[0] if begun is not None else None)
            executor.allocate_kv(limits.num_blocks)
            builder = make_builder(manifest, limits)
        if config.canary:
            with timer.stage("canary"):
                compared = _run_canaries(manifest, executor, builder, limits)
        draft = None
        if begun is not None and isinstance(guesses, DraftModelConfig):
            with timer.stage("draft.kv"):
                draft = _finish_draft(begun[0], begun[1], guesses, config, limits, manifest)
        undo.pop_all()
    if mover is not None:
        mover.start(head_start_s=_HEAD_START_S)
    return LoadedModel(
        manifest=manifest,
        executor=executor,
        builder=builder,
        limits=limits,
        num_canary_tokens=compared,
        startup_ms=timer.milliseconds,
        tokenizer=_tokenizer(artifact),
        adapters=adapters,
        draft=draft,
    )


def _load_draft(manifest: Manifest, guesses: DraftModelConfig, config: EngineConfig) -> tuple[Manifest, Executor]:
    """The draft's program and weights, verified as the model's are.

    Raises:
        ArtifactError, ConfigError: it is damaged, or does not fit the model.
    """
    from llmc.runtime.speculation.load import check_fits  # few have a draft model

    trust = Path(config.trust) if config.trust else None
    with open_artifact(guesses.model, require_signature=config.require_signature, trust=trust) as artifact:
        check_fits(manifest, artifact.manifest, guesses.model)
        # It guesses without adapters.
        plain: dict[str, Any] = {"enable_lora": False, "lora_modules": [], "max_loras": None, "max_cpu_loras": None}
        own = replace(config, artifact=guesses.model, checkpoint=None, early_start=False, **plain)
        executor, _, mover = _load_executor(artifact, own, StageTimer())
        assert mover is None, "a draft is copied at once"
        if (adapters := load_adapters(own, artifact.manifest, StageTimer())) is not None:
            cast("LoraExecutor", executor).bind_lora(adapters.pool.array)
        return artifact.manifest, executor


def _finish_draft(
    draft: Manifest, executor: Executor, guesses: DraftModelConfig, config: EngineConfig, limits: SchedulerConfig, manifest: Manifest
) -> DraftModel:
    """The draft's KV cache, for as many tokens as the model's, and its canaries.

    Raises:
        ArtifactError: it computes something else than its compiler did.
    """
    from llmc.runtime.speculation.load import DraftModel
    from llmc.runtime.speculation.share import draft_blocks

    own = EngineConfig(
        artifact=guesses.model,
        num_blocks=draft_blocks(limits.num_blocks, manifest.kv, draft.kv),
        enable_prefix_caching=limits.enable_prefix_caching,
    )
    own_limits = resolve(own, draft, available_bytes=0)  # the blocks are settled
    executor.allocate_kv(own_limits.num_blocks)
    builder = make_builder(draft, own_limits)
    if config.canary:
        _run_canaries(draft, executor, builder, own_limits)
    return DraftModel(
        manifest=draft, executor=executor, builder=builder, limits=own_limits, num_speculative_tokens=guesses.num_speculative_tokens
    )


def _run_canaries(manifest: Manifest, executor: Executor, builder: BatchBuilder, limits: SchedulerConfig) -> int:
    return run_canaries(
        manifest,
        executor,
        builder,
        max_tokens=limits.max_num_batched_tokens,
        max_seqs=limits.max_num_seqs,
        num_blocks=limits.num_blocks,
    )


def _load_executor(
    artifact: OpenArtifact, config: EngineConfig, timer: StageTimer
) -> tuple[Executor, Callable[[], int], WeightMover | None]:
    """The executor the artifact names, with its weights; what tells how much memory is left where its KV cache will be; and what moves
    weights that are only mapped so far, to be started when the start is over."""
    if (ranks := artifact.manifest.tensor_parallel_size) > 1:
        from llmc.runtime.parallel.load import load_ranks  # few artifacts have several

        return load_ranks(artifact, config, timer), lambda: available_bytes() // ranks, None  # every rank has a cache of its own
    if step_entry(artifact.manifest).executor == "plans":
        return *_load_plans(artifact, config, timer), None
    code, weights = _load_files(artifact, config, timer)
    with timer.stage("bind"):
        return code.bind(weights), lambda: available_bytes() - (weights.mover.pending_bytes if weights.mover else 0), weights.mover


def _load_plans(artifact: OpenArtifact, config: EngineConfig, timer: StageTimer) -> tuple[Executor, Callable[[], int]]:
    """Plans, for a GPU; weights go there without a copy in the host's memory, but for those of a checkpoint."""
    from llmc.runtime.cuda.load import load_executor  # an artifact for a CPU pays nothing for it

    if config.weights_mmap:
        raise ConfigError(f"{config.artifact}: was compiled for a GPU, where weights cannot be mapped; leave --weights-mmap out")
    manifest = artifact.manifest
    descriptors = {record.path: artifact.fd(record.path) for record in manifest.files}
    external = _external(artifact, config)
    sources = artifact.weights(verify=config.verify_weights)
    threads = num_threads(config)
    bound = _bind_checkpoint(external, config, threads) if external else None
    executor = load_executor(manifest, step_entry(manifest), descriptors, sources, bound, timer, num_threads=threads)
    return executor, executor.available_bytes


def load_adapters(config: EngineConfig, manifest: Manifest, timer: StageTimer) -> AdapterStore | None:
    """The pool of an artifact with room for LoRA adapters, and the adapters known from the start; None for other artifacts.

    Raises:
        ConfigError: the artifact has no room for adapters, or one of them cannot be served.
    """
    max_loras = resolved_max_loras(config, manifest)
    if manifest.lora is None:
        return None
    from llmc.runtime.lora.store import AdapterStore  # few artifacts have one

    if config.max_cpu_loras is not None and config.max_cpu_loras < max_loras:
        raise ConfigError(f"--max-cpu-loras {config.max_cpu_loras} is below the {max_loras} adapters that a step may use; raise it")
    with timer.stage("lora"):
        return AdapterStore(manifest.lora, config.lora_modules, max_kept=config.max_cpu_loras)


def _tokenizer(artifact: OpenArtifact) -> KeptFile | None:
    path = artifact.manifest.tokenizer.tokenizer_json
    if path is None:
        return None
    record = next(file for file in artifact.manifest.files if file.path == path)
    return KeptFile(artifact.fd(path), size_bytes=record.size_bytes, sha256=record.sha256, name=f"{artifact.path}/{path}")


def make_builder(manifest: Manifest, limits: SchedulerConfig) -> BatchBuilder:
    """Host buffers for steps within `limits`."""
    return BatchBuilder(
        block_size=limits.block_size,
        num_groups=len(manifest.kv.groups),
        vocab_size=manifest.model.vocab_size,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        lora=manifest.lora is not None,
    )


def _load_files(artifact: OpenArtifact, config: EngineConfig, timer: StageTimer) -> tuple[LoadedCode, Weights]:
    """Map the code and bring in the weights at the same time: the loader's work and reading both release the interpreter lock."""
    manifest = artifact.manifest
    entry = step_entry(manifest)
    threads = num_threads(config)
    descriptors = {record.path: artifact.fd(record.path) for record in manifest.files}
    with timer.stage("load"), ThreadPoolExecutor(1, thread_name_prefix="llmc-code") as pool:
        mapping = pool.submit(timer.timed, "load.code", lambda: load_code(manifest, entry, descriptors, num_threads=threads))
        weights = timer.timed("load.weights", lambda: _load_weights(artifact, config, threads, lambda: mapping.result().lane_hash))
        return mapping.result(), weights


def _load_weights(artifact: OpenArtifact, config: EngineConfig, threads: int, lane_hash: Callable[[], LaneHash | None]) -> Weights:
    """Packed weights from the artifact, and where it carries recipes instead, from the checkpoint. lane_hash: as of `map_weights`."""
    readers = max(2, threads)  # reading and hashing overlap even on one processor
    packed = [tensor for tensor in artifact.manifest.tensors if tensor.file is not None]
    external = _external(artifact, config)
    sources = artifact.weights(verify=config.verify_weights)
    if config.early_start and not config.weights_mmap and step_entry(artifact.manifest).executor == "aoti" and _worth_mapping(sources):
        weights = map_weights(sources, packed, num_threads=readers, lane_hash=lane_hash)
    else:
        weights = load_weights(sources, packed, num_threads=readers, map_files=config.weights_mmap)
    return merge_weights(weights, _bind_checkpoint(external, config, readers)) if external else weights


def _worth_mapping(sources: list[WeightSource]) -> bool:
    return sum(source.size_bytes for source in sources) >= EARLY_BYTES and all(map(can_move, sources))


def _external(artifact: OpenArtifact, config: EngineConfig) -> list[TensorRecord]:
    """Tensors the artifact leaves to a checkpoint.

    Raises:
        ConfigError: there are some and no checkpoint is named, or the other way round.
    """
    external = [tensor for tensor in artifact.manifest.tensors if tensor.file is None]
    if external and config.checkpoint is None:
        raise ConfigError(f"{config.artifact}: was compiled with --weights external; name the checkpoint with --checkpoint DIR")
    if config.checkpoint is not None and not external:
        raise ConfigError(f"{config.artifact}: carries its weights; leave --checkpoint out")
    return external


def _bind_checkpoint(external: list[TensorRecord], config: EngineConfig, readers: int) -> Weights:
    from llmc.runtime.external_weights import bind_checkpoint  # most artifacts carry their weights

    assert config.checkpoint is not None
    return bind_checkpoint(external, Path(config.checkpoint), num_threads=readers)
