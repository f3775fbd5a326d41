"""What quantisation did to a model and what that costs, and the constants that the artifact will hold.

    weight table after the passes -> Quantized

The cost is always that of the answers against the checkpoint as it was given: its weights, and a KV cache of the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from llmc.artifacts.manifest import CalibrationFacts, KVQuantizationFacts, QuantizationFacts
from llmc.artifacts.safetensors import Checkpoint
from llmc.compiler import accuracy, packing
from llmc.compiler.accuracy import Accuracy
from llmc.compiler.calibration import Calibrated
from llmc.compiler.calibration_data import LIBRARY
from llmc.compiler.canary import FetchConstant
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.dequantized import dequantized_fetcher, dequantizing_fetcher, quantized_bits, quantized_constants
from llmc.compiler.model import ModelSource, open_checkpoint
from llmc.compiler.pipeline import group_of
from llmc.compiler.stages import StageLog
from llmc.compiler.tokenizer_files import TokenizerBundle
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError
from llmc.passes.weights import WeightTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """facts, kv_facts: None where nothing is quantised. fetch: the captured graph's constants as the artifact will hold them."""

    facts: QuantizationFacts | None
    kv_facts: KVQuantizationFacts | None
    fetch: FetchConstant


def quantized_weights(
    config: CompileConfig,
    source: ModelSource,
    captured: TracedModel,
    weights: WeightTable,
    checkpoint: Checkpoint,
    tokenizer: TokenizerBundle,
    scratch: Path,
    log: StageLog,
    calibrated: Calibrated | None = None,
) -> Quantized:
    """Make the constants and measure them.

    Args:
        source: the model as it was given.
        captured: of the model that is compiled, and
        weights: its table after the passes; both of the calibrated one where there is one, as is
        checkpoint.

    Raises:
        ConfigError: it costs more than --max-kl allows.
    """
    plain = packing.fetcher(captured.constants, checkpoint)
    facts, kv_facts = _facts(config, weights)
    if (facts is None and kv_facts is None) or config.weights == "external" or config.trial:
        return Quantized(facts=facts, kv_facts=kv_facts, fetch=plain)
    fetch = plain
    if facts is not None:
        with log.stage("quantise") as note:
            fetch = dequantized_fetcher(captured, weights, checkpoint, scratch)
            note.detail = f"{config.quantization}, {len(facts.tensors)} matrices{f' in groups of {facts.group}' if facts.group else ''}"
    texts = accuracy.calibration_tokens(source.vocab_size, tokenizer.encode, captured.max_model_len)
    plain_kv = msgspec.structs.replace(captured.kv, dtype=source.dtype)
    asked = [f"--quantization {config.quantization}"] * (facts is not None)
    with open_checkpoint(source) as given:
        if calibrated is not None:
            asked.append(f"--calibration {config.calibration}")
            plain_constants = capture(source, max_model_len=captured.max_model_len).constants
            plain = packing.fetcher(plain_constants, given)
        if facts is not None:
            with log.stage("accuracy") as note:
                cost = accuracy.measure(replace(captured, kv=plain_kv), plain, fetch, texts)
                note.detail = str(cost)
            facts = msgspec.structs.replace(facts, **cost.facts())
        if calibrated is not None:
            assert facts is not None
            with log.stage("accuracy") as note:
                (scratch / "rounded").mkdir()
                rounded = dequantizing_fetcher(plain_constants, quantized_constants(captured, weights), given, scratch / "rounded")
                other = accuracy.measure(replace(captured, kv=plain_kv), plain, rounded, texts)
                note.detail = f"rounded to nearest instead: {other}"
            facts = msgspec.structs.replace(facts, calibration=_calibration(config, calibrated, other))
        if kv_facts is not None:
            asked.append(f"--kv-cache-dtype {config.quantized_kv}")
            with log.stage("accuracy") as note:
                cost = accuracy.measure(captured, plain, fetch, texts, plain_kv)
                note.detail = f"{' with '.join(asked)}: {cost}"
            kv_facts = msgspec.structs.replace(kv_facts, **cost.facts())
    if config.max_kl is not None and not cost.mean_kl <= config.max_kl:
        raise ConfigError(
            f"{' with '.join(asked)} costs too much: {cost}, above --max-kl {config.max_kl:g}; "
            "raise the bound, take more bits, or compile without quantisation"
        )
    return Quantized(facts=facts, kv_facts=kv_facts, fetch=fetch)


def _facts(config: CompileConfig, weights: WeightTable) -> tuple[QuantizationFacts | None, KVQuantizationFacts | None]:
    """What is quantised, its cost not measured yet."""
    nothing: dict[str, Any] = {"calibration_tokens": 0, "reference_perplexity": None, "perplexity": None, "mean_kl": None}
    facts = kv_facts = None
    if config.quantization is not None:
        group = group_of(config.quantization, config.quantization_group_size)
        facts = QuantizationFacts(scheme=config.quantization, group=group, tensors=quantized_bits(weights), **nothing)  # type: ignore[arg-type]
    if config.quantized_kv is not None:
        kv_facts = KVQuantizationFacts(scheme=config.quantized_kv, **nothing)  # type: ignore[arg-type]
    return facts, kv_facts


def _calibration(config: CompileConfig, calibrated: Calibrated, rounded: Accuracy) -> CalibrationFacts:
    return CalibrationFacts(
        method=config.calibration,  # type: ignore[arg-type]
        library=f"{LIBRARY} {calibrated.version}",
        text=calibrated.text,
        tokens=calibrated.tokens,
        rounded_perplexity=rounded.perplexity,
        rounded_mean_kl=rounded.mean_kl,
    )
