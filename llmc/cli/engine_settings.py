"""From resolved settings to what the engine and the server take. Imports nothing heavy: it stands on the start path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.config.human import AUTO
from llmc.config.resolve import Resolved
from llmc.errors import ConfigError

_SAME_NAME = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "scheduling_policy",
    "max_num_partial_prefills",
    "long_prefill_token_threshold",
    "threads",
    "verify_weights",
    "require_signature",
    "trust",
    "canary",
    "weights_mmap",
    "early_start",
    "checkpoint",
    "max_logprobs",
    "speculative_config",
    "kv_cache_memory_bytes",
)


def engine_fields(artifact: Path, settings: Resolved) -> dict[str, Any]:
    """The fields of runtime.engine_config.EngineConfig, as plain JSON values."""
    fields = {name: settings[name] for name in _SAME_NAME}
    fields["artifact"] = str(artifact)
    fields["max_model_len"] = None if settings["max_model_len"] in (None, AUTO) else settings["max_model_len"]
    fields["num_blocks"] = settings["num_gpu_blocks_override"]
    fields["memory_utilization"] = settings["gpu_memory_utilization"]
    fields["seed"] = settings["seed"] if settings.given("seed") else None
    if "enable_lora" in settings.values:
        fields |= {name: settings[name] for name in ("enable_lora", "max_loras", "max_cpu_loras")}
        fields["lora_modules"] = lora_modules(settings["lora_modules"] or [])
        for name in ("lora_modules", "max_loras", "max_cpu_loras"):
            if fields[name] and not settings["enable_lora"]:
                raise ConfigError(f"--{name.replace('_', '-')} is about LoRA adapters; give --enable-lora too, or leave it out")
    if "max_queue" in settings.values:
        fields["max_queue"] = settings["max_queue"]
    return fields


def lora_modules(given: list[str]) -> list[dict[str, Any]]:
    """The values of --lora-modules as plain JSON, folders made absolute.

    Raises:
        ConfigError: one is not NAME=DIR or a JSON object, or a name is used twice.
    """
    if not given:
        return []
    from llmc.runtime.lora import adapter_paths  # msgspec, on the start path of few

    return [
        {"name": one.name, "path": str(Path(one.path).absolute()), "base_model_name": one.base_model_name} for one in adapter_paths(given)
    ]


def chat_template_text(value: str | None) -> str | None:
    """--chat-template: a file, or the template itself on one line.

    Raises:
        ConfigError: it names a file that cannot be read, or neither a file nor a template.
    """
    if value is None:
        return None
    path = Path(value)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except OSError as error:
        if "{" not in value:
            raise ConfigError(f"--chat-template {value}: cannot be read: {error.strerror}") from None
    if "{" in value:
        return value
    raise ConfigError(f"--chat-template {value}: no such file, and no template either (it has no braces)")
