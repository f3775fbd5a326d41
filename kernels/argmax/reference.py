"""The meaning of llmc::argmax in plain torch, and its fake rule."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = "argmax(Tensor logits) -> Tensor"


def argmax_reference(logits: Tensor) -> Tensor:
    """The greedy token of each row: the largest logit, the lowest id among equals. A NaN counts as minus infinity.

    logits: [N, V], V at least 1. Returns int64 [N].
    """
    check_argmax(logits)
    clean = torch.where(logits.isnan(), float("-inf"), logits)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(clean == clean.amax(1, keepdim=True), ids, logits.shape[1]).amin(1)


def argmax_fake(logits: Tensor) -> Tensor:
    """Shape rule: [N, V] -> int64 [N]."""
    check_argmax(logits)
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def check_argmax(logits: Tensor) -> None:
    """Refuse what no implementation takes."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError(f"llmc::argmax: logits must be [N, V] with V at least 1, got {list(logits.shape)}")
