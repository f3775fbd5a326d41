"""What `--enable-lora` makes of a model: which linears adapters may change, the pass that adds their terms, and what the manifest says."""

from __future__ import annotations

from dataclasses import replace

import torch

from llmc.artifacts.manifest import LoraFacts, LoraModule, TensorSpec
from llmc.compiler.capture import TracedModel
from llmc.config.compile import CompileConfig
from llmc.errors import ConfigError, UnsupportedModel
from llmc.passes.add_lora import POOL, SLOTS, AddLora, adaptable, lora_layout, with_targets


def lora_pass(config: CompileConfig, traced: TracedModel, dtype: str) -> AddLora | None:
    """The pass for a captured model; None without --enable-lora. Changes nothing.

    Args:
        dtype: of the model, which "auto" stands for.

    Raises:
        ConfigError: --lora-target-modules names what the model has not.
        UnsupportedModel: no linear of it can have adapters.
    """
    if not config.max_loras:
        return None
    modules = adaptable(traced.graph)
    if not modules:
        raise UnsupportedModel("--enable-lora: no layer of this model has a linear that adapters could change; leave it out")
    if config.lora_target_modules is not None:
        for target in config.lora_target_modules:
            if not with_targets(modules, [target]):
                known = sorted({name.rpartition(".")[2] for name in modules})
                raise ConfigError(f"--lora-target-modules {target[:100]}: the model has no such linear; it has {', '.join(known)}")
        modules = with_targets(modules, config.lora_target_modules)
    pool_dtype: torch.dtype = getattr(torch, dtype if config.lora_dtype == "auto" else config.lora_dtype)
    return AddLora(layout=lora_layout(modules, config.max_lora_rank), max_loras=config.max_loras, dtype=pool_dtype)


def with_adapters(traced: TracedModel, applied: AddLora) -> TracedModel:
    """The model's description with the two inputs that the pass has added."""
    facts = lora_facts(applied)
    slots = TensorSpec(name=SLOTS, dtype="int32", shape=["T"])
    pool = TensorSpec(name=POOL, dtype=facts.dtype, shape=[facts.max_loras, facts.slot_elements])
    return replace(traced, inputs=(*traced.inputs, slots, pool))


def lora_facts(applied: AddLora) -> LoraFacts:
    """The layout as the manifest holds it."""
    return LoraFacts(
        max_loras=applied.max_loras,
        max_rank=applied.layout.rank,
        dtype=str(applied.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        slot_elements=applied.layout.slot_elements,
        modules=[
            LoraModule(name=m.name, in_features=m.in_features, out_features=m.out_features, offset=m.offset) for m in applied.layout.modules
        ],
    )
