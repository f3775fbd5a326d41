"""Register the llmc ops with torch: schema, fake rule, and the reference as the CPU implementation.

Importing this module registers; doing so twice is harmless, since Python imports once. The compiled kernels replace the references
only inside `use_compiled`; in an artifact they are reached through the AOTInductor shim (`C_SHIMS`) or by their C entry points.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch._ops import OpOverload

from . import all_reduce, embedding, grouped_linear, linear, lora_add, paged_attention, quantized_embedding, quantized_linear
from .gpu_ops import GPU_OPS
from .native import NativeKernels

NAMESPACE = "llmc"

_MODULES: dict[str, ModuleType | SimpleNamespace] = {
    name: module
    for name, module in {
        "paged_attention": paged_attention,
        "linear": linear,
        "embedding": embedding,
        "grouped_linear": grouped_linear,
        "quantized_linear": quantized_linear,
        "quantized_embedding": quantized_embedding,
        "all_reduce": all_reduce,
        "lora_add": lora_add,
    }.items()
    if hasattr(module, "SCHEMA")
}
_MODULES.update(GPU_OPS)
COMPILED = (  # methods of NativeKernels
    "linear", "embedding", "grouped_linear", "quantized_linear", "quantized_embedding",
    "rms_norm", "add_rms_norm", "silu_mul", "gelu_mul", "lora_add",
)  # fmt: skip
# Compiled too, and not replaced one by one: what order a cache has inside is theirs alone.
CACHE_OPS = ("rope_kv_write", "paged_attend")
_ENTRY_POINTS = {"add_rms_norm": "llmc_rms_norm", "silu_mul": "llmc_gated", "gelu_mul": "llmc_gated"}  # where the name is another
OP_NAMES: tuple[str, ...] = tuple(_MODULES)

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # kept: the registrations live as long as this object

for _name, _module in _MODULES.items():
    _LIBRARY.define(_module.SCHEMA)
    _LIBRARY.impl(_name, _module.reference, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _module.fake, lib=_LIBRARY)


def overload(name: str) -> OpOverload:
    """The op as graphs hold it, e.g. `torch.ops.llmc.linear.default`."""
    found: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


# For `torch._inductor.config.aot_inductor.custom_ops_to_c_shims`: the ops that have a compiled CPU version.
C_SHIMS: dict[OpOverload, list[str]] = {overload(name): [module.C_SHIM] for name, module in _MODULES.items() if hasattr(module, "C_SHIM")}


@contextlib.contextmanager
def use_compiled(kernels_so: Path, num_threads: int = 0) -> Iterator[NativeKernels]:
    """While open, the matmuls and embeddings of `torch.ops.llmc` on CPU run the compiled kernels in place of the references.

    Args:
        kernels_so: `BuiltKernels.kernels_so`.
        num_threads: threads per call; 0 takes OpenMP's choice.
    """
    native = NativeKernels(kernels_so, num_threads)
    override = torch.library.Library(NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # overriding is the point
            for name in (n for n in COMPILED if hasattr(native.library, _ENTRY_POINTS.get(n, f"llmc_{n}"))):
                override.impl(name, getattr(native, name), "CPU", allow_override=True)
        yield native
    finally:
        override._destroy()
