"""Register the llmc ops with torch: schema, fake rule, and the reference as the CPU implementation.

Importing this module registers; doing so twice is harmless, since Python imports once. The compiled kernels replace the references
only inside `use_compiled`; in an artifact they are reached through the AOTInductor shim (`C_SHIMS`) or by their C entry points.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch._ops import OpOverload

from . import embedding, grouped_linear, linear, paged_attention

NAMESPACE = "llmc"

_MODULES: dict[str, ModuleType] = {
    name: module
    for name, module in {
        "paged_attention": paged_attention,
        "linear": linear,
        "embedding": embedding,
        "grouped_linear": grouped_linear,
    }.items()
    if hasattr(module, "SCHEMA")
}
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


# For `torch._inductor.config.aot_inductor.custom_ops_to_c_shims`.
C_SHIMS: dict[OpOverload, list[str]] = {overload(name): [module.C_SHIM] for name, module in _MODULES.items()}
