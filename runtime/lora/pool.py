"""The memory of the pool: adapters in slots, read by the compiled program at its input `lora_pool`."""

from __future__ import annotations

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.manifest import LoraFacts
from llmc.runtime.memory import allocate_huge


class LoraPool:
    """[max_loras, slot_elements] in huge pages, zeroed: an empty slot adds nothing. Its address never changes."""

    def __init__(self, facts: LoraFacts) -> None:
        dtype = NUMPY[facts.dtype]
        nbytes = facts.max_loras * facts.slot_elements * dtype.itemsize
        region = allocate_huge(nbytes, what=f"room for {facts.max_loras} LoRA adapters")
        self.array = region.view(dtype).reshape(facts.max_loras, facts.slot_elements)

    def write(self, slot: int, elements: np.ndarray) -> None:
        """Bring an adapter into a slot, between steps."""
        self.array[slot] = elements
