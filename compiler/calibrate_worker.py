"""Fit a model's 4-bit integers to a text with auto-round, in a process of its own: `python -m llmc.compiler.calibrate_worker FOLDER`.

FOLDER/job.json says what to do (calibration.py writes it). FOLDER gets a checkpoint in the layout "pack-quantized" of compressed-tensors:
the linears that auto-round fitted as their integers and scales, everything else as auto-round left it, in the model's own dtype.
auto-round's own writers round scales and all other weights to float16; that is why the checkpoint is written here.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: nothing is fetched
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a compile's answer must not depend on what else the machine holds

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH = 8  # sequences
SIGNROUND_STEPS = 50  # per block; auto-round's default of 200 takes four times as long for a little more
_FURTHEST = 0.25  # from an integer, that a weight over its scale may lie: rounding to bfloat16 moves 8 by 1/32


def main(folder: Path) -> None:
    """Do FOLDER/job.json; the last line on stdout is JSON: how many "matrices" were fitted, or the "error"."""
    job = json.loads((folder / "job.json").read_bytes())
    torch.set_num_threads(job["threads"])
    random.seed(job["seed"])
    np.random.seed(job["seed"] % (1 << 32))
    torch.manual_seed(job["seed"])
    torch.use_deterministic_algorithms(True)
    model = _fitted(job)
    tensors, matrices = pack(model, job["group"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(json.dumps({"matrices": matrices}))


def _fitted(job: dict[str, Any]) -> nn.Module:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    tuner = AutoRound(
        model.eval(),
        PreTrainedTokenizerFast(tokenizer_file=job["tokenizer"]),  # asked for, and not used: the text is tokens already
        bits=4,
        group_size=job["group"],
        sym=True,
        alg_configs=_algorithms(job["method"]),
        dataset=[torch.tensor([sequence]) for sequence in job["sequences"]],
        seqlen=len(job["sequences"][0]),
        nsamples=len(job["sequences"]),
        batch_size=BATCH,
        device_map="cpu",
        scale_dtype={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[job["dtype"]],
        enable_torch_compile=False,
        seed=job["seed"],
    )
    quantized, _ = tuner.quantize()
    return quantized


def _algorithms(method: str) -> list[Any]:
    """auto-round's configuration of a method."""
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.algorithms.transforms.awq.config import AWQConfig

    if method == "awq":
        return [AWQConfig()]  # which ends with rounding to nearest
    assert method == "signround", method
    return [SignRoundConfig(iters=SIGNROUND_STEPS)]


def pack(model: nn.Module, group: int) -> tuple[dict[str, Tensor], int]:
    """The model's tensors with `weight_packed`, `weight_scale` and `weight_shape` in the place of each fitted linear's weight.

    A fitted linear is one with a `scale` [N, groups]: its weights are integers from -8 to 7 times that.

    Returns:
        tensors, each stored once however many names it has, and how many linears were fitted.

    Raises:
        ValueError: a weight is no such product.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied head is its embedding
            tensors[name] = tensor.detach().contiguous()
        seen.add(tensor.data_ptr())
    matrices = 0
    for name, module in model.named_modules():
        scale = getattr(module, "scale", None)
        if not isinstance(module, nn.Linear) or not isinstance(scale, Tensor):
            continue
        n, k = module.weight.shape
        scale = scale.detach().to(module.weight.dtype).reshape(n, -(-k // group))
        tensors.pop(f"{name}.weight")
        tensors[f"{name}.weight_packed"] = _words(integers(module.weight.detach(), scale, group, name))
        tensors[f"{name}.weight_scale"] = scale.contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor([n, k])
        matrices += 1
    return tensors, matrices


def integers(weight: Tensor, scale: Tensor, group: int, name: str) -> Tensor:
    """q of weight = q * scale: int64 [N, K] from weight [N, K] and scale [N, groups].

    Raises:
        ValueError: it is no such product, or q needs more than 4 bits.
    """
    k = weight.shape[1]
    wide = torch.repeat_interleave(scale.float(), group, dim=1)[:, :k]
    ratio = torch.where(wide == 0, 0.0, weight.float() / wide)
    quants = ratio.round()
    if not bool((ratio - quants).abs().max() <= _FURTHEST) or bool((quants < -8).any()) or bool((quants > 7).any()):
        raise ValueError(f"auto-round left {name} as something else than integers of 4 bits times scales in groups of {group}")
    return quants.long()


def _words(quants: Tensor) -> Tensor:
    """int64 [N, K] from -8 to 7 as int32 [N, ceil(K / 8)], the first in the lowest bits, 8 added."""
    k = quants.shape[1]
    padded = nn.functional.pad(quants + 8, (0, -k % 8)).unflatten(1, (-1, 8))
    words = (padded << torch.arange(0, 32, 4)).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:  # whatever the library raises; behind its progress bars nobody would find it on stderr
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        sys.exit(1)
