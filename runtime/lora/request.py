"""The adapter of a call of `LLM.generate`, as vLLM's users know it."""

from __future__ import annotations

import msgspec


class LoRARequest(msgspec.Struct, frozen=True):
    """A PEFT adapter by the name it is given here, a number, and its folder.

    An adapter is read when its name is first used. The number is vLLM's and decides nothing: llmc tells adapters apart by their names.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
