"""What is asked of an engine, the same for every contender: token ids from a seed."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

FIRST_ORDINARY_ID = 300  # below stand the special tokens of most vocabularies; an early end would end a measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """`batch` prompts of `prompt_tokens`, all at once; `new_tokens` greedy ones each."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def within(self, max_model_len: int) -> Mode:
        """As much of it as a sequence of `max_model_len` tokens holds."""
        new = max(2, min(self.new_tokens, max_model_len // 2))
        return Mode(name=self.name, batch=self.batch, prompt_tokens=max(1, min(self.prompt_tokens, max_model_len - new)), new_tokens=new)


PREFILL = Mode(name="prefill", batch=1, prompt_tokens=512, new_tokens=2)
DECODE_1 = Mode(name="decode 1", batch=1, prompt_tokens=128, new_tokens=64)
DECODE_8 = Mode(name="decode 8", batch=8, prompt_tokens=128, new_tokens=64)
MANY = Mode(name="many", batch=64, prompt_tokens=128, new_tokens=64)  # more than --performance-mode interactivity runs at once


def prompts(mode: Mode, vocab_size: int, seed: int) -> list[list[int]]:
    """The mode's prompts, `mode.batch` rows of `mode.prompt_tokens` ids."""
    rng = random.Random(f"{seed}/{mode.name}")
    low = FIRST_ORDINARY_ID if vocab_size > 2 * FIRST_ORDINARY_ID else min(4, vocab_size - 1)
    return [[rng.randrange(low, vocab_size) for _ in range(mode.prompt_tokens)] for _ in range(mode.batch)]
