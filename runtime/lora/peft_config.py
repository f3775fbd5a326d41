"""`adapter_config.json` as PEFT writes it: what the arithmetic needs of it, and refusals of what is not built.

Source: peft.LoraConfig and peft.tuners.lora (huggingface/peft): scale = alpha / r, or alpha / sqrt(r) with use_rslora; keys of
rank_pattern and alpha_pattern match whole parts at the end of a module's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from llmc.errors import ConfigError

T = TypeVar("T", int, float)

_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+", re.ASCII)
# init_lora_weights that change the base model's weights, so that the adapter belongs to other ones.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_UNBUILT = {
    "use_dora": "DoRA",
    "lora_bias": "a bias inside the adapter (lora_bias)",
    "fan_in_fan_out": "weights stored transposed (fan_in_fan_out)",
    "modules_to_save": "whole modules of its own (modules_to_save)",
    "trainable_token_indices": "tokens of its own (trainable_token_indices)",
    "target_parameters": "parameters that are no linear's weight (target_parameters)",
    "layer_replication": "layers used twice (layer_replication)",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
}


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide what an adapter adds; PEFT writes many others, which do not."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    bias: str = "none"
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: Any = True

    def rank_of(self, module: str) -> int:
        """The rank a module's matrices must have."""
        return _matching(self.rank_pattern or {}, module, self.r)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied with."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern or {}, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(data: bytes, where: str) -> PeftConfig:
    """Parse and check an adapter's configuration.

    Args:
        where: how messages call it.

    Raises:
        ConfigError: it is no LoRA configuration, or asks for what is not built.
    """
    try:
        fields = msgspec.json.decode(data)
        if not isinstance(fields, dict):
            raise msgspec.ValidationError("Expected `object`")
        config = msgspec.convert(fields, PeftConfig)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: expected the adapter_config.json of a LoRA adapter, found {error}") from error
    if config.peft_type != "LORA":
        raise ConfigError(f"{where}: peft_type is {config.peft_type[:50]!r}; only LORA adapters are served")
    for name, what in _UNBUILT.items():
        if fields.get(name):
            raise ConfigError(f"{where}: the adapter has {what}, which is not built; merge it into the checkpoint and compile that")
    if config.bias != "none":
        raise ConfigError(f"{where}: bias is {config.bias[:50]!r}; only adapters without trained biases are served")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower().startswith(_OTHER_BASE):
        raise ConfigError(
            f"{where}: init_lora_weights is {config.init_lora_weights[:50]!r}, so its base weights are not the checkpoint's; save it with "
            "path_initial_model_for_weight_conversion"
        )
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if not 1 <= rank <= 4096:
            raise ConfigError(f"{where}: a rank of {rank}; expected 1 to 4096")
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not math.isfinite(alpha):
            raise ConfigError(f"{where}: lora_alpha is no finite number")
    for key in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        if len(key) > 500 or not _PATTERN.fullmatch(key):
            raise ConfigError(f"{where}: the pattern {key[:100]!r} is more than a module's name; such adapters are not served")
    return config


def _matching(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that a module's name ends with, after "^" that it is."""
    for key, value in patterns.items():
        name = key.removeprefix("^")
        if module == name or (name == key and module.endswith(f".{name}")):
            return value
    return default
