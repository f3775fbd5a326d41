"""Build a Hugging Face model without its weights.

Parameters become fake tensors: shape and dtype, no memory. Buffers (rope frequencies, embedding scales) are small and
have no place in a checkpoint, so they are computed for real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmc.compiler.attention_hook import IMPLEMENTATION, register
from llmc.errors import UnsupportedModel

# How mixture-of-experts layers are written down: gathered weights and batched products, plain aten, no data-dependent shape.
EXPERTS = "batched_mm"
_FIXED = "llmc_fixed"  # a rope_type; read by transformers' dynamic_rope_update alone, which then updates nothing


def build_on_meta(config: Any, dtype: torch.dtype, experts: str = EXPERTS) -> nn.Module:
    """The model on the meta device, with our attention; buffers hold nothing yet.

    Args:
        config: a transformers configuration; not changed.
        dtype: of parameters and activations.
        experts: implementation of mixture-of-experts layers, a name known to transformers' ExpertsInterface.
    """
    from transformers import AutoModelForCausalLM

    register()
    with torch.device("meta"), _quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(
            _copy(config), attn_implementation=IMPLEMENTATION, experts_implementation=experts, dtype=dtype
        )
    return model.eval().requires_grad_(False)


def compute_buffers(model: nn.Module) -> None:
    """Replace every meta buffer by its real value. Mutates the model.

    The model's own initialisation computes them, as when a checkpoint is loaded. Each is computed twice over different
    garbage: what still shows the garbage was not computed, and is refused.

    Raises:
        UnsupportedModel: names the buffer whose value the model does not compute.
    """
    for path, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None]
        if names:
            first, second = (_initialised(model, module, names, fill) for fill in (0, 1))
            for name in names:
                if not torch.equal(first[name], second[name]):
                    raise UnsupportedModel(f"{path}.{name}: a buffer whose value the model does not compute itself; llmc cannot know it")


def _initialised(model: nn.Module, module: nn.Module, names: list[str], fill: int) -> dict[str, Tensor]:
    for name in names:
        old = module._buffers[name]
        assert old is not None
        module._buffers[name] = torch.full(old.shape, fill, dtype=old.dtype, device="cpu")
    with torch.no_grad():
        model._init_weights(module)  # type: ignore[operator]
    return {name: module._buffers[name].clone() for name in names}  # type: ignore[union-attr]


def check_rope(model: nn.Module) -> None:
    """Refuse rope frequencies that are computed anew from the lengths at hand.

    Raises:
        UnsupportedModel: "dynamic" rope, or longrope on some kinds of layers only; names the module.
    """
    for path, module in model.named_modules():
        types = _rope_types(module)
        if any("dynamic" in t for t in types):
            raise UnsupportedModel(f"{path}: rope type 'dynamic' changes its frequencies with the length of each sequence; llmc fixes them")
        if "longrope" in types and isinstance(module.rope_type, dict):
            raise UnsupportedModel(f"{path}: longrope on some kinds of layers only, which llmc does not handle yet")


def fix_rope(model: nn.Module, max_model_len: int) -> None:
    """Settle rope frequencies that a model would choose anew in every step. Mutates the model; its buffers are real.

    longrope has two sets and takes the long one as soon as any position passes the original length. In a batch that
    would let one sequence change another's answers, so the choice is made here, by the length compiled for.
    """
    for module in model.modules():
        if "longrope" in _rope_types(module):
            _fix_longrope(module, max_model_len)


@contextlib.contextmanager
def rope_held(model: nn.Module) -> Iterator[None]:
    """Leave rope frequencies alone for a while. On the meta device positions have no values, and transformers 5.17 asks
    in Python whether one has passed longrope's original length."""
    changed = [(module, module.rope_type) for module in model.modules() if "longrope" in _rope_types(module)]
    for module, _ in changed:
        module.rope_type = _FIXED  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, rope_type in changed:
            module.rope_type = rope_type


def _rope_types(module: nn.Module) -> set[str]:
    rope_type = getattr(module, "rope_type", None)
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return {t for t in types if isinstance(t, str)}


def _fix_longrope(module: Any, max_model_len: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = module.config.rope_parameters["original_max_position_embeddings"]
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), seq_len=max_model_len)
    module._buffers["inv_freq"] = frequencies if max_model_len > original else module._buffers["original_inv_freq"]
    module.rope_type = _FIXED


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta parameters by fake CPU tensors, tied ones by the same one. Mutates the model."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = (parameter, nn.Parameter(empty, requires_grad=False))
            module._parameters[name] = made[id(parameter)][1]


def _copy(config: Any) -> Any:
    return type(config).from_dict(config.to_dict())


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide advice about training and downloads; errors still show."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
