"""PEFT adapters made here, without peft: the two files, and the model they make when merged."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(model: nn.Module, targets: tuple[str, ...] = ALL) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[-1] in targets}


def draw(
    model: nn.Module, *, rank: int = 4, targets: tuple[str, ...] = ALL, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 0.3
) -> dict[str, Tensor]:
    """Random matrices for every target, named as PEFT names them. Large enough to change what greedy decoding says."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in linears(model, targets).items():
        a = torch.randn((rank, module.in_features), generator=generator) * size
        b = torch.randn((module.out_features, rank), generator=generator) * size
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """The files of an adapter. `config` goes over what PEFT would write for rank 4 and alpha 8."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in tensors}), "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
        "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def merged(model: nn.Module, tensors: Mapping[str, Tensor], scale: float | Mapping[str, float] = 2.0) -> nn.Module:
    """A copy of the model with scale * B A added to each weight; `scale` may differ by module."""
    made = copy.deepcopy(model)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            own = scale if isinstance(scale, int | float) else scale[module]
            delta = own * (tensors[name.replace("lora_A", "lora_B")].double() @ a.double())
            weight = made.get_submodule(module).weight
            weight.data = (weight.double() + delta).to(weight.dtype)
    return made
