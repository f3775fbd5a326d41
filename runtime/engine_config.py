"""What an engine is told, and what follows from it once the artifact and the machine are known."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from llmc.artifacts.kv_bytes import block_bytes
from llmc.artifacts.manifest import Manifest
from llmc.errors import ConfigError
from llmc.runtime.kv import peak_blocks
from llmc.runtime.lora import AdapterPath
from llmc.runtime.scheduler import Policy, SchedulerConfig
from llmc.runtime.scheduler.drafts import DraftModelConfig, SpeculationConfig, speculation_config

VerifyWeights = Literal["always", "once", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """An engine's settings. None means: the artifact's or the machine's own, resolved once by `resolve`.

    Raises:
        ConfigError: a value is out of range or two disagree.
    """

    artifact: str  # folder
    max_model_len: int | None = None  # tokens of one sequence; not above the artifact's
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_blocks: int | None = None  # KV blocks, whatever the memory
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = 0.9  # of the memory that is free once the weights are in
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: Policy = "fcfs"
    max_num_partial_prefills: int = 1
    long_prefill_token_threshold: int = 0  # 0: a step's whole budget
    max_queue: int = 1024
    threads: int | None = None
    verify_weights: VerifyWeights = "always"
    require_signature: bool = False
    trust: str | None = None  # public key file (PEM)
    canary: bool = True
    weights_mmap: bool = False
    early_start: bool = False  # answer from mapped weights while they are copied into memory of their own
    checkpoint: str | None = None  # folder with the weights of an artifact that has none
    max_logprobs: int = 20  # -1: the whole vocabulary
    enable_lora: bool = False  # the artifact must be compiled for it
    lora_modules: list[AdapterPath] = field(default_factory=list)  # adapters known from the start
    max_loras: int | None = None  # adapters that one step may use; not above the artifact's
    max_cpu_loras: int | None = None  # adapters kept in memory; None: all
    speculative_config: dict[str, Any] | None = None  # as vLLM spells it; see scheduler/drafts.py
    seed: int | None = None  # base for requests without a seed; None: from the operating system

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "threads",
            "max_queue",
            "max_num_partial_prefills",
            "max_loras",
            "max_cpu_loras",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ConfigError(f"num_blocks={self.num_blocks} must be at least 2")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError("num_blocks and kv_cache_memory_bytes both size the KV cache; give one of them")
        if not 0.0 < self.memory_utilization <= 1.0:
            raise ConfigError(f"memory_utilization={self.memory_utilization} must be above 0 and at most 1")
        if self.verify_weights not in get_args(VerifyWeights):
            raise ConfigError(f"verify_weights={self.verify_weights!r}; accepted: {', '.join(get_args(VerifyWeights))}")
        if not self.enable_lora and (self.lora_modules or self.max_loras is not None or self.max_cpu_loras is not None):
            raise ConfigError("lora_modules, max_loras and max_cpu_loras are about LoRA adapters; give enable_lora (--enable-lora) too")
        if self.max_cpu_loras is not None and self.max_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(f"max_cpu_loras={self.max_cpu_loras} is below max_loras={self.max_loras}; adapters in use are kept")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs={self.max_logprobs} must be -1 (the whole vocabulary) or more")


def num_threads(config: EngineConfig) -> int:
    """Threads of a step: as told, or the processors this process may use."""
    return config.threads if config.threads is not None else len(os.sched_getaffinity(0))


def resolve(config: EngineConfig, manifest: Manifest, *, available_bytes: int, draft: Manifest | None = None) -> SchedulerConfig:
    """Settle every limit. `available_bytes` is what is free once the weights are in memory, those of a draft model included; its KV
    cache is taken from the same memory.

    Raises:
        ConfigError: a limit is above what the artifact was compiled for, or the memory does not hold one sequence.
    """
    limits = manifest.limits
    max_model_len = _at_most("max_model_len", config.max_model_len, limits.max_model_len)
    max_num_batched_tokens = _at_most("max_num_batched_tokens", config.max_num_batched_tokens, limits.max_num_batched_tokens)
    max_num_seqs = _at_most("max_num_seqs", config.max_num_seqs, limits.max_num_seqs)
    if config.max_num_seqs is None:
        max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
    longest = peak_blocks(manifest.kv, max_model_len, max_chunk_tokens=max_num_batched_tokens)
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = _fitting_blocks(config, manifest, wanted=max_num_seqs * longest + 1, available_bytes=available_bytes, draft=draft)
    return SchedulerConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=manifest.kv.block_size,
        num_blocks=num_blocks,
        policy=config.scheduling_policy,
        max_num_partial_prefills=config.max_num_partial_prefills,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        enable_chunked_prefill=config.enable_chunked_prefill,
        enable_prefix_caching=config.enable_prefix_caching and manifest.pooling is None,  # a vector needs its every row computed
        reserve_blocks=min(8, num_blocks // 4),
        max_queue=config.max_queue,
        eos_token_ids=frozenset(manifest.tokenizer.eos_token_ids),
        max_loras=resolved_max_loras(config, manifest),
        speculation=speculation(config, manifest),
    )


def resolved_max_loras(config: EngineConfig, manifest: Manifest) -> int:
    """Adapters that one step may use.

    Raises:
        ConfigError: the artifact has no room for adapters, or not for so many.
    """
    if not config.enable_lora:
        return 0
    if manifest.lora is None:
        raise ConfigError(
            f"--enable-lora: {config.artifact} was compiled without room for adapters; compile it with `llmc compile MODEL --enable-lora`"
        )
    return _at_most("max_loras", config.max_loras, manifest.lora.max_loras)


def speculation(config: EngineConfig, manifest: Manifest) -> SpeculationConfig | DraftModelConfig | None:
    """What guesses, if anything.

    Raises:
        ConfigError: this artifact cannot have it, or its settings are wrong.
    """
    if config.speculative_config is None:
        return None
    if manifest.pooling is not None:
        raise ConfigError("speculative_config guesses tokens, and this artifact was compiled for embeddings; leave it out")
    if any(entry.executor == "plans" for entry in manifest.entries):
        raise ConfigError("speculative_config: plans for a GPU have no step for several tokens of decoding sequences; leave it out")
    return speculation_config(config.speculative_config)


def _at_most(name: str, asked: int | None, compiled: int) -> int:
    if asked is not None and asked > compiled:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{name}={asked} is above the {compiled} this artifact was compiled for; lower it or compile with {flag} {asked}")
    return compiled if asked is None else asked


def _fitting_blocks(config: EngineConfig, manifest: Manifest, *, wanted: int, available_bytes: int, draft: Manifest | None) -> int:
    """What the most sequences of the greatest length could use, within the bytes there are."""
    one = block_bytes(manifest.kv)
    if draft is not None:
        from llmc.runtime.speculation.share import bytes_beside_block  # few have a draft model

        one += bytes_beside_block(manifest.kv, draft.kv)
    if config.kv_cache_memory_bytes is not None:
        fitting, where = config.kv_cache_memory_bytes // one, f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
    else:
        fitting = int(config.memory_utilization * available_bytes) // one
        where = f"memory_utilization={config.memory_utilization} of {available_bytes / 1e6:.0f} MB free"
    if fitting < 2:
        raise ConfigError(f"{where} does not hold two KV blocks of {one} bytes; give more memory")
    return min(fitting, wanted)
