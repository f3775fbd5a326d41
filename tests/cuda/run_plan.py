"""Run a plan's launches in Triton's interpreter, over plain memory: `TRITON_INTERPRET=1 python -m tests.cuda.run_plan FOLDER`.

FOLDER holds plan.json, sources.json (one per kernel), memory.safetensors (what regions start with) and steps.safetensors
("<step>.<input>"); results go to results.safetensors ("<step>.<output>"). Launches run in a random order that the edges allow. Around
each launch every byte of arena and inputs that the launch does not say it touches is overwritten, so that reading it shows, and
compared, so that writing it shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from safetensors.torch import load_file, save_file
from torch import Tensor

import tests.kernels.triton_interpreter  # noqa: F401  (teaches the interpreter bf16)
from llmc.artifacts.plan import Launch, Plan, Pointer, decode_plan

POISON = 0xFF  # NaN in every float type, -1 in every integer
DTYPES = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16, "*i64": torch.int64, "*i32": torch.int32, "*i1": torch.bool,
    "*i8": torch.int8, "*u8": torch.uint8, "*fp64": torch.float64,
}  # fmt: skip


class _Ignored:
    """Inductor's decorators, which only tune."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: lambda function: function


class _Math:
    """libdevice, which exists on a GPU only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl.math, name)

    @staticmethod
    def tanh(x: Any) -> Any:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


def load_kernel(record: dict[str, Any], file: Path) -> Any:
    """The function a kernel was compiled from, as the interpreter takes it."""
    if record["module"]:
        return getattr(importlib.import_module(record["module"]), record["function"])
    text = record["source"].replace("triton_helpers.set_driver_to_gpu()", "")
    text = re.sub(r"^from torch\._inductor\.runtime import .*$", "from torch._inductor.runtime import triton_helpers", text, flags=re.M)
    text = re.sub(r"^(from torch\._inductor\.runtime\.triton_helpers import) libdevice, ", r"\1 ", text, flags=re.M)
    text = re.sub(r"^from torch\._C import .*$", "", text, flags=re.M)
    file.write_text(f"from tests.cuda.run_plan import _Ignored, _Math\ntriton_heuristics, libdevice = _Ignored(), _Math()\n{text}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, record["function"])


class Machine:
    """Memory and kernels of a plan."""

    def __init__(self, folder: Path) -> None:
        self.plan: Plan = decode_plan((folder / "plan.json").read_bytes(), "plan.json")
        self.records: list[dict[str, Any]] = json.loads((folder / "sources.json").read_text())
        self.kernels = [load_kernel(record, folder / f"kernel_{i}.py") for i, record in enumerate(self.records)]
        start = load_file(folder / "memory.safetensors")
        self.memory = [self._region(region.name, region.size_bytes, start) for region in self.plan.regions]
        self.place = {region.name: number for number, region in enumerate(self.plan.regions)}

    def _region(self, name: str, size: int | None, start: dict[str, Tensor]) -> Tensor:
        if name in start:
            raw = start[name].reshape(-1).view(torch.uint8)
            assert size in (None, raw.numel()), f"{name} has {raw.numel()} bytes, the plan says {size}"
            return raw
        assert size is not None
        return torch.full((size,), POISON, dtype=torch.uint8)

    def step(self, inputs: dict[str, Tensor], choose: random.Random) -> dict[str, Tensor]:
        """One step; the arena starts as garbage."""
        for name, value in inputs.items():
            self.memory[self.place[name]].copy_(value.reshape(-1).view(torch.uint8))
        if "arena" in self.place:
            self.memory[self.place["arena"]].fill_(POISON)
        for index in self.order(choose):
            self.launch(self.plan.launches[index])
        results = {}
        for output in self.plan.outputs:
            dtype = getattr(torch, output.dtype)
            count = dtype.itemsize * torch.Size(output.shape).numel()
            results[output.name] = self.memory[output.region][output.offset : output.offset + count].view(dtype).view(output.shape).clone()
        return results

    def order(self, choose: random.Random) -> list[int]:
        """A random order in which every launch stands after those it waits for."""
        waits = {later: {a for a, b in self.plan.edges if b == later} for later in range(len(self.plan.launches))}
        order: list[int] = []
        while waits:
            index = choose.choice(sorted(i for i, before in waits.items() if not before))
            del waits[index]
            for before in waits.values():
                before.discard(index)
            order.append(index)
        return order

    def launch(self, launch: Launch) -> None:
        """One launch, between poison."""
        guarded = [n for n, region in enumerate(self.plan.regions) if region.kind in ("arena", "input")]
        kept = {n: self.memory[n].clone() for n in guarded}
        touched = {n: torch.zeros(self.memory[n].numel(), dtype=torch.bool) for n in guarded}
        for span in (*launch.reads, *launch.writes):
            if span.region in touched:
                touched[span.region][span.start : span.stop] = True
        for n in guarded:
            self.memory[n][~touched[n]] = POISON
        self._run(launch)
        for n in guarded:
            assert (self.memory[n][~touched[n]] == POISON).all(), f"{launch.label} wrote outside of what it says"
            self.memory[n][~touched[n]] = kept[n][~touched[n]]

    def _run(self, launch: Launch) -> None:
        record = self.records[launch.kernel]
        arguments = dict(record["constants"])
        for argument, (name, kind) in zip(launch.arguments, record["types"].items(), strict=False):
            if isinstance(argument, Pointer):
                raw = self.memory[argument.region][argument.offset :]
                arguments[name] = raw[: raw.numel() // DTYPES[kind].itemsize * DTYPES[kind].itemsize].view(DTYPES[kind])
            elif kind.startswith("fp"):
                data = bytearray.fromhex(argument.data)
                arguments[name] = torch.frombuffer(data, dtype={4: torch.float32, 8: torch.float64}[len(data)]).item()
            else:
                arguments[name] = int.from_bytes(bytes.fromhex(argument.data), "little", signed=True)
        self.kernels[launch.kernel][launch.grid](**arguments)


def main(folder: Path, seed: int) -> None:
    machine, choose = Machine(folder), random.Random(seed)
    steps = load_file(folder / "steps.safetensors")
    results: dict[str, Tensor] = {}
    for number in range(len({name.split(".")[0] for name in steps})):
        inputs = {name.split(".", 1)[1]: value for name, value in steps.items() if name.startswith(f"{number}.")}
        results |= {f"{number}.{name}": value for name, value in machine.step(inputs, choose).items()}
    save_file(results, folder / "results.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
