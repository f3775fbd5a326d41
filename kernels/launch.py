"""One launch of a Triton kernel as plain data, so that running it, compiling it for another machine and storing it read the same thing.

An implementation is a function of the op's arguments that allocates its results and hands its launches, in order, to `launch`.
`run` starts them here; a list's `append` collects them over fake tensors; `wrap` traces them into a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | float
HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What an implementation may know of the GPU it is written for. Part of an artifact: another value may give other bits."""

    num_sms: int = 132
    shared_bytes: int = 232448  # per block, opted in


H200 = Device()


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel, its grid and its arguments.

    `args` are the kernel's own parameters in their order, `constants` its compile-time ones. A pointer that the constants say is
    not read stands for a missing optional argument. scratch: the kernel takes memory of its own, so many bytes a program as Triton says.
    """

    kernel: Any  # a function made by triton.jit
    grid: tuple[int, int, int]
    args: dict[str, Argument]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    scratch: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do, as for a tensor without rows."""
        return 0 in self.grid


Launcher = Callable[[Launch], None]


def run(launch: Launch) -> None:
    """Start the kernel on the current device (or in Triton's interpreter)."""
    if not launch.empty:
        if launch.scratch:
            import triton

            triton.set_allocator(_allocate)
        launch.kernel[launch.grid](**launch.args, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages)


def _allocate(nbytes: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for Triton's own use in one launch; torch aligns it to 512 bytes and frees it in the stream's order."""
    assert alignment <= 512
    return torch.empty(nbytes, device="cuda", dtype=torch.int8)


def wrap(launch: Launch) -> None:
    """Start the kernel so that torch.export and torch.compile record it: for use inside a `torch.library.triton_op`."""
    if not launch.empty:
        traced = torch.library.wrap_triton(launch.kernel)
        traced[launch.grid](**launch.args, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def fitting_stages(stages: int, stage_bytes: int, device: Device) -> int:
    """As many stages of a pipelined loop, up to `stages`, as the device's shared memory holds. No bit of a result depends on them."""
    return max(2, min(stages, (device.shared_bytes - 2048) // stage_bytes))  # a program's reductions need some as well


def as_rows(x: Tensor) -> Tensor:
    """x [..., n] as a view [rows, n]; only for tensors that `row_reason` takes."""
    return x.view(-1, x.shape[-1])


def row_reason(**tensors: Tensor) -> str | None:
    """Why a tensor cannot be walked row by row with one stride, or None."""
    for name, x in tensors.items():
        if x.dim() < 1 or (x.shape[-1] > 1 and x.stride(-1) != 1):
            return f"{name} must be contiguous along its last dimension, its strides are {list(x.stride())}"
        try:
            x.view(-1, x.shape[-1])
        except RuntimeError:
            return f"the rows of {name} have no common stride (sizes {list(x.shape)}, strides {list(x.stride())})"
    return None


def dtype_reason(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> str | None:
    """Why the tensors' dtype is not taken, or None: all must share one of `allowed`."""
    found = {name: x.dtype for name, x in tensors.items() if x is not None}
    if len(set(found.values())) > 1 or not set(found.values()) <= set(allowed):
        return f"expected one dtype of {[str(d) for d in allowed]}, got { ({name: str(d) for name, d in found.items()}) }"
    return None
