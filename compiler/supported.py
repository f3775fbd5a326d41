"""Which model types llmc compiles, and why it refuses the others by name.

A type stands in `SUPPORTED` when a tiny configuration of it agrees with Hugging Face in tests/compiler/test_architectures.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmc.errors import UnsupportedModel

SUPPORTED: frozenset[str] = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)

_OWN_ATTENTION = "it attends through classes of its own, not through the attention interface that llmc hooks"
_ALIBI = "it puts ALiBi biases into the attention mask, which llmc's paged attention does not take yet"
_RECURRENT = "it keeps a recurrent state besides (or instead of) keys and values, and llmc's cache holds keys and values only"

_ENCODER = (
    "it is an encoder: its tokens attend to those behind them, and llmc compiles decoders; "
    "for embeddings take a decoder such as Qwen3-Embedding or E5-Mistral"
)

_REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "albert",
            "bert",
            "camembert",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "eurobert",
            "jina_bert",
            "modernbert",
            "mpnet",
            "new",
            "nomic_bert",
            "roberta",
            "xlm-roberta",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(("falcon", "RefinedWeb", "RefinedWebModel"), _OWN_ATTENTION),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "mamba",
            "mamba2",
            "minimax",
            "nemotron_h",
            "qwen3_next",
            "recurrent_gemma",
            "rwkv",
            "xlstm",
            "zamba",
            "zamba2",
        ),
        _RECURRENT,
    ),
    "deepseek_v2": "its latent attention caches compressed keys and values, which llmc's cache does not hold yet",
    "deepseek_v3": "its latent attention caches compressed keys and values, which llmc's cache does not hold yet",
    "gemma3": "it takes images as well as text; llmc compiles its text model alone (model_type gemma3_text)",
}

_OTHER_INPUTS = ("vision_config", "audio_config", "image_size", "patch_size", "num_mel_bins")


def check_supported(config: Mapping[str, Any], where: str, *, embed: bool = False) -> None:
    """Refuse what llmc cannot compile, before anything is built.

    Args:
        config: the parsed config.json.
        where: the file it came from, for the message.
        embed: it is to embed, for which a decoder without its output projection will do.

    Raises:
        UnsupportedModel: names the model type and the reason.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModel(f"{where}: no model_type; expected a Hugging Face config.json that names one")
    reason = _reason(model_type, config, embed)
    if reason:
        raise UnsupportedModel(
            f"{where}: model type {model_type!r} cannot be compiled: {reason}. Supported: {', '.join(sorted(SUPPORTED))}"
        )


def _reason(model_type: str, config: Mapping[str, Any], embed: bool) -> str | None:
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        return _ENCODER
    if model_type in _REASONS:
        return _REASONS[model_type]
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder model; llmc compiles decoders that read and write one sequence of tokens"
    other = [key for key in _OTHER_INPUTS if key in config]
    if other:
        return f"it takes more than text (config.json has {', '.join(other)})"
    architectures = config.get("architectures")
    if (
        isinstance(architectures, list)
        and architectures
        and not any(str(a).endswith(("ForCausalLM", "LMHeadModel", *(("Model",) if embed else ()))) for a in architectures)
    ):
        return f"its architecture is {', '.join(map(str, architectures))}, not a causal language model"
    if model_type in SUPPORTED:
        return None
    if "auto_map" in config:
        return "its code comes with the checkpoint (auto_map), and llmc runs no code from a model folder"
    return "llmc has not been taught it, and compiles nothing that no test covers"
