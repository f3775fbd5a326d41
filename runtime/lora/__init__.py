"""LoRA adapters while serving: reading them, keeping them, and which of them the next step may use (docs/lora.md)."""

from llmc.runtime.lora.modules import AdapterPath, adapter_paths
from llmc.runtime.lora.slots import LoraSlots

__all__ = ["AdapterPath", "LoraSlots", "adapter_paths"]
