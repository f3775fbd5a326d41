"""Sampling on a GPU: sample, adjust_logits, token_logprobs, checked_tokens, each with schema, reference and fake rule."""

from types import SimpleNamespace

from . import reference as _r

draw = SimpleNamespace(SCHEMA=_r.SAMPLE_SCHEMA, reference=_r.sample_reference, fake=_r.sample_fake)
adjust = SimpleNamespace(SCHEMA=_r.ADJUST_SCHEMA, reference=_r.adjust_logits_reference, fake=_r.adjust_logits_fake)
logprobs = SimpleNamespace(SCHEMA=_r.LOGPROBS_SCHEMA, reference=_r.token_logprobs_reference, fake=_r.token_logprobs_fake)
checked = SimpleNamespace(SCHEMA=_r.CHECKED_SCHEMA, reference=_r.checked_tokens_reference, fake=_r.checked_tokens_fake)
row_parameters = _r.row_parameters

__all__ = ["adjust", "checked", "draw", "logprobs", "row_parameters"]
