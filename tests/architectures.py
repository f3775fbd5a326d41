"""Tiny models of every supported architecture, built from the real Hugging Face configuration classes.

`tiny_config(name)` gives a configuration, `save_tiny_model(name, folder, dtype)` a model folder with random weights. The weights
are large enough for attention patterns to matter, and from a seed, so that every run sees the same ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 512

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_HEAD_DIM = {key: value for key, value in _BASE.items() if key != "head_dim"}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GPT_NEOX = {key: _BASE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}

# name -> configuration class, its arguments
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _BASE),
    "llama3_rope": ("LlamaConfig", {**_BASE, "rope_parameters": _LLAMA3}),
    "qwen2": ("Qwen2Config", _NO_HEAD_DIM),
    "qwen3": ("Qwen3Config", {**_BASE, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_BASE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "mistral": ("MistralConfig", {**_BASE, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {**_NO_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", {**_BASE, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3TextConfig", {**_BASE, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": _MIXED_LAYERS}),
    "phi3": ("Phi3Config", _NO_HEAD_DIM),
    "phi3_longrope": ("Phi3Config", {**_NO_HEAD_DIM, "original_max_position_embeddings": 64, "rope_parameters": _LONGROPE}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "layer_types": _MIXED_LAYERS},
    ),
    "olmo2": ("Olmo2Config", _NO_HEAD_DIM),
    "gpt_neox": ("GPTNeoXConfig", {**_GPT_NEOX, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}),
    "smollm3": ("SmolLM3Config", _NO_HEAD_DIM),
    "glm4": ("Glm4Config", _BASE),
}

NAMES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model; `changes` replace single settings."""
    class_name, arguments = _CONFIGS[name]
    return getattr(transformers, class_name)(**{**arguments, **changes})


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The Hugging Face model itself, with eager attention: the reference."""
    config = tiny_config(name, **changes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    _fill(model)
    return model.eval().requires_grad_(False)


def save_tiny_model(name: str, path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Write a model folder (config.json, generation_config.json, model.safetensors). Returns the model that was written."""
    model = tiny_model(name, dtype, **changes)
    model.save_pretrained(path)  # type: ignore[operator]
    return model


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.08 if parameter.dim() > 1 else 0.2
            centre = 1.0 if any(part in name.lower() for part in ("norm", "ln_", "layernorm")) and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
