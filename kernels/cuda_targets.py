"""CUDA targets by name: an architecture (`cuda:sm_90`) or a product (`cuda:h200`), described by `cuda_targets.toml`.

A description is all that compiling asks about a GPU, so that no GPU and no driver is needed. An architecture's limits decide what
fits; a product's figures only steer choices such as tile sizes, and a cubin runs on every GPU of its architecture.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from llmc.errors import ConfigError

PREFIX = "cuda:"


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaTarget:
    """What is known of a GPU without having one.

    Attributes:
        name: as given, "cuda:sm_90" or "cuda:h200".
        device_name: what the driver calls the product, or the typical product of an architecture.
        architecture: "sm_90"; a cubin for it runs on this architecture alone.
        compute_capability: (major, minor).
        num_sms: streaming multiprocessors.
        shared_memory_per_block_bytes: most a block can have after opting in. shared_memory_per_sm_bytes: of all blocks of an SM.
        registers_per_sm: 32-bit registers.
        l2_bytes, memory_bytes, bandwidth_bytes_per_s, bf16_flops: figures of the product.
    """

    name: str
    device_name: str
    architecture: str
    compute_capability: tuple[int, int]
    num_sms: int
    shared_memory_per_block_bytes: int
    shared_memory_per_sm_bytes: int
    registers_per_sm: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    l2_bytes: int
    memory_bytes: int
    bandwidth_bytes_per_s: int
    bf16_flops: int

    @property
    def kind(self) -> str:
        """As the manifest names it; a CPU's is "cpu"."""
        return "cuda"

    @property
    def capability_number(self) -> int:
        """The compute capability as Triton writes it: 90 for 9.0, 100 for 10.0."""
        major, minor = self.compute_capability
        return major * 10 + minor


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads((files("llmc.kernels") / "cuda_targets.toml").read_text(encoding="utf-8"))


def cuda_target_names() -> tuple[str, ...]:
    """Every accepted name: architectures first, then products, in the file's order."""
    tables = _tables()
    return tuple(PREFIX + name for name in (*tables["architecture"], *tables["product"]))


def cuda_target(name: str) -> CudaTarget:
    """Look a CUDA target up.

    Args:
        name: "cuda:" and an architecture or a product.

    Raises:
        ConfigError: no such target; names the known ones.
    """
    tables = _tables()
    key = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or key not in tables["architecture"] | tables["product"]:
        raise ConfigError(f"target {name!r} is unknown; CUDA targets: {', '.join(cuda_target_names())}")
    product = tables["product"][tables["architecture"][key]["typical"] if key in tables["architecture"] else key]
    limits = tables["architecture"][product["architecture"]]
    major, minor = limits["compute_capability"]
    return CudaTarget(
        name=name,
        device_name=product["name"],
        architecture=product["architecture"],
        compute_capability=(major, minor),
        num_sms=product["num_sms"],
        shared_memory_per_block_bytes=limits["shared_memory_per_block_bytes"],
        shared_memory_per_sm_bytes=limits["shared_memory_per_sm_bytes"],
        registers_per_sm=limits["registers_per_sm"],
        max_threads_per_sm=limits["max_threads_per_sm"],
        max_blocks_per_sm=limits["max_blocks_per_sm"],
        l2_bytes=product["l2_mib"] << 20,
        memory_bytes=product["memory_gb"] * 10**9,
        bandwidth_bytes_per_s=product["bandwidth_gb_s"] * 10**9,
        bf16_flops=product["bf16_tflops"] * 10**12,
    )
