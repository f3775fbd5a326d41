"""What quantisation costs, measured at compile time: the captured graph on a calibration text, once with the checkpoint's weights and
a KV cache of the model's dtype, once with the dequantised weights and the cache that the artifact will have.

Perplexity is exp of the mean negative log-likelihood of the text's own next tokens. KL is the mean over positions of
sum p log(p / q), p being the reference's distribution, in nats. Both in float32 sums of the model's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmc.artifacts.manifest import KVFacts
from llmc.compiler.calibration_text import TEXT
from llmc.compiler.canary import FetchConstant, Reference, empty_caches, spread_ids, step_inputs
from llmc.compiler.capture import TracedModel

SEQUENCE_TOKENS = 128
MAX_TOKENS = 512
_DIGITS = 4  # significant ones kept: the last bits of a sum over a vocabulary belong to the machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """tokens: predicted ones, the first of each sequence is given. mean_kl: nats per token."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    mean_kl: float

    def facts(self) -> dict[str, Any]:
        """As the manifest's records name them."""
        return {
            "calibration_tokens": self.tokens,
            "reference_perplexity": self.reference_perplexity,
            "perplexity": self.perplexity,
            "mean_kl": self.mean_kl,
        }

    def __str__(self) -> str:
        return (
            f"perplexity {self.reference_perplexity:g} -> {self.perplexity:g}, "
            f"mean KL divergence {self.mean_kl:g} nats over {self.tokens} tokens"
        )


def calibration_tokens(vocab_size: int, encode: Callable[[str], list[int]] | None, max_model_len: int) -> list[list[int]]:
    """The calibration text as sequences of two tokens or more; without a tokenizer, ids from a fixed sequence."""
    ids = [i for i in encode(TEXT) if i < vocab_size][:MAX_TOKENS] if encode is not None else spread_ids(vocab_size, MAX_TOKENS // 2)
    size = max(2, min(SEQUENCE_TOKENS, max_model_len))
    return [part for start in range(0, len(ids), size) if len(part := ids[start : start + size]) > 1]


def measure(
    traced: TracedModel, reference: FetchConstant, quantized: FetchConstant, sequences: list[list[int]], kv: KVFacts | None = None
) -> Accuracy:
    """Compare the two sets of weights on `sequences`, each of which is a batch of its own.

    Args:
        kv: the reference's cache; None: the same as the other's, `traced.kv`.
    """
    sides = ((reference, kv or traced.kv), (quantized, traced.kv))
    tokens, loss, other_loss, divergence = 0, 0.0, 0.0, 0.0
    for sequence in sequences:
        wanted = torch.tensor(sequence[1:])[:, None]
        p, q = (_log_probabilities(traced, fetch, cache, sequence) for fetch, cache in sides)
        loss -= float(p.gather(1, wanted).double().sum())
        other_loss -= float(q.gather(1, wanted).double().sum())
        apart = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)  # what the reference rules out adds nothing
        divergence += float(apart.sum(dim=1).double().sum())
        tokens += len(wanted)
    return Accuracy(
        tokens=tokens,
        reference_perplexity=_short(math.exp(min(loss / tokens, 700.0))),
        perplexity=_short(math.exp(min(other_loss / tokens, 700.0))),
        mean_kl=_short(max(divergence / tokens, 0.0)),
    )


def _log_probabilities(traced: TracedModel, fetch: FetchConstant, kv: KVFacts, sequence: list[int]) -> Tensor:
    """float32 [len - 1, vocabulary]: of each token but the first, given those before it."""
    blocks = -(-len(sequence) // traced.kv.block_size)
    inputs = step_inputs([sequence], [0], traced.kv.block_size, blocks, len(traced.kv.groups), every_row=True)
    with torch.no_grad():
        (logits,) = Reference(traced.graph, fetch).logits(*inputs, *empty_caches(kv, 1 + blocks))
        return torch.log_softmax(logits[:-1].float(), dim=-1)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
