"""Kernels of ours, compiled once each: a launch of a known kind costs a look-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmc.artifacts.cubin import read_cubin
from llmc.compiler.cuda.accesses import pointer_accesses
from llmc.compiler.cuda.schedule import CompiledKernel, check_kernel
from llmc.kernels.cuda_targets import CudaTarget

if TYPE_CHECKING:  # triton stands behind it
    from llmc.kernels.tuned import TunedTiles


@dataclass(frozen=True, kw_only=True)
class KernelSource:
    """What a kernel was compiled from, so that something other than a GPU can run it.

    module: the importable module of a kernel of ours, or None. source: the text of Inductor's module, or "".
    function: name in it. types: Triton type per runtime parameter, in order. constants: compile-time parameters.
    """

    module: str | None
    source: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class OwnKernel:
    """A kernel of ours as launches use it.

    aligned: parameter number -> bytes its pointer is taken to be a multiple of. read, written: names of pointers.
    """

    compiled: CompiledKernel
    source: KernelSource
    aligned: Mapping[int, int]
    read: frozenset[str]
    written: frozenset[str]


@dataclass
class KernelCache:
    """The kernels of ours of one compile, for one target, and the tiles measured for it. Use inside `cross_cuda`."""

    target: CudaTarget
    _known: dict[str, OwnKernel] = field(default_factory=dict)

    @cached_property
    def tuned(self) -> TunedTiles:
        """The target's table.

        Raises:
            ConfigError: it is damaged.
        """
        from llmc.kernels.tuned import read_tuned

        return read_tuned(self.target.name)

    def kernel(self, launch: Any) -> OwnKernel:
        """What runs a launch (`kernels.launch.Launch`); its tensors may be fake.

        Raises:
            InternalError: it spills, or does not fit the target.
        """
        from llmc.kernels.aot import signature_text

        key = signature_text(launch)
        if key not in self._known:
            self._known[key] = _compile(launch, self.target)
        return self._known[key]


def _compile(launch: Any, target: CudaTarget) -> OwnKernel:
    from triton.backends.compiler import GPUTarget

    from llmc.kernels.aot import compile_launch

    made = compile_launch(launch, GPUTarget("cuda", target.capability_number, 32))
    compiled = CompiledKernel(
        image=made.cubin,
        entry=made.entry,
        kernel=read_cubin(made.cubin, made.entry).kernels[made.entry],
        num_warps=made.num_warps,
        shared_bytes=made.shared_bytes,
        num_ctas=1,
        source="",
        scratch_bytes=made.scratch_bytes,
    )
    check_kernel(compiled, target)
    types = {p.name: _type(launch.args[p.name]) for p in launch.kernel.params if p.name not in launch.constants}
    function = launch.kernel.fn
    read, written = pointer_accesses(launch)
    return OwnKernel(
        compiled=compiled,
        source=KernelSource(
            module=function.__module__, source="", function=function.__name__, types=types, constants=dict(launch.constants)
        ),
        aligned={number: 16 for number, name in enumerate(types) if _starts_aligned(launch.args[name])},
        read=read,
        written=written,
    )


def _starts_aligned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.storage_offset() * value.itemsize % 16 == 0


def _type(value: Any) -> str:
    from llmc.kernels.aot import _type as argument_type

    return argument_type("", value)
