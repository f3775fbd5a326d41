"""What the manifest says of a target: what it is, what a machine must have, what computes each op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from llmc.artifacts.manifest import CudaRequirements, Gpu, Requirements
from llmc.artifacts.manifest import Target as TargetRecord
from llmc.artifacts.version import FORMAT_VERSION
from llmc.compiler.targets import Target
from llmc.kernels.cuda_targets import CudaTarget
from llmc.kernels.ops import CACHE_OPS, COMPILED
from llmc.kernels.registry import OPS

# Machine code of CUDA 12's tools loads on every driver of CUDA 12 and later. Source: CUDA Compatibility guide, "minor version
# compatibility". For architectures since 10.0 the wheel of triton carries an assembler of CUDA 12.9.
_DRIVER = 12000
_DRIVER_BLACKWELL = 12080  # the first that knows compute capability 10.0


def target_record(target: Target) -> TargetRecord:
    """The target as the manifest holds it."""
    if not isinstance(target, CudaTarget):
        return TargetRecord(name=target.name, kind="cpu", isa=target.isa)
    gpu = Gpu(
        device_name=target.device_name,
        num_sms=target.num_sms,
        shared_memory_per_block_bytes=target.shared_memory_per_block_bytes,
        registers_per_sm=target.registers_per_sm,
        l2_bytes=target.l2_bytes,
        memory_bytes=target.memory_bytes,
        bandwidth_bytes_per_s=target.bandwidth_bytes_per_s,
        bf16_flops=target.bf16_flops,
    )
    return TargetRecord(name=target.name, kind="cuda", isa=target.architecture, gpu=gpu)


def requirements(target: Target, *, uses_torch: bool, tvm: str | None = None, shared_bytes: int = 0) -> Requirements:
    """What a machine must have to run the artifact.

    Args:
        uses_torch: the code calls libtorch's C interface.
        tvm: version of apache-tvm whose runtime runs the code; None: another compiler made it.
        shared_bytes: the most shared memory that a block of any kernel takes; of a GPU alone.
    """
    version = ".".join(torch.__version__.split(".")[:2]) if uses_torch else None
    if not isinstance(target, CudaTarget):
        features = sorted(target.cpu_features)
        minor = ".".join(tvm.split(".")[:2]) if tvm is not None else None
        return Requirements(machine=target.machine, cpu_features=features, torch=version, min_format=FORMAT_VERSION, tvm=minor)
    cuda = CudaRequirements(
        compute_capability=".".join(map(str, target.compute_capability)),
        driver_version=_DRIVER if target.capability_number < 100 else _DRIVER_BLACKWELL,
        shared_memory_per_block_bytes=shared_bytes,
        num_sms=target.num_sms,
    )
    # The host's part is Python alone; the machine is that of every other artifact.
    return Requirements(machine="x86_64", cpu_features=[], torch=None, min_format=FORMAT_VERSION, cuda=cuda)


def implementations(
    target: Target, ops: Iterable[str], executor: str, from_torch: Sequence[str] = (), calls: Iterable[str] = ()
) -> dict[str, str]:
    """What computes each op. `ops`: of the graph that was lowered, as "llmc.rms_norm.default". `executor`: of the entry. `from_torch`:
    C functions of libtorch's that the program calls. `calls`: ops of ours that it calls, as "llmc::linear"."""
    if isinstance(target, CudaTarget):
        ours = {f"llmc.{name}": f"Triton, {target.architecture}" for name in OPS if f"llmc.{name}.default" in set(ops)}
        return {**ours, "everything else": f"Inductor, Triton, {target.architecture}"}
    chosen = {"llmc.paged_attention": f"C++, {target.isa}"}
    if executor == "tvm":
        kernels = {call.replace("::", "."): f"C++, {target.isa}" for call in calls}
        return {**chosen, **kernels, "everything else": f"TVM through LLVM, {target.isa}"}
    if executor == "nodes":
        return {**chosen, "everything else": "aten"}
    return {
        **chosen, **{f"llmc.{name}": f"C++, {target.isa}" for name in (*CACHE_OPS, *COMPILED)},
        "everything else": f"Inductor C++, {target.isa}",
        "tensors": f"libtorch, for {', '.join(from_torch)}" if from_torch else f"llmc's tensor runtime, {target.isa}",
    }  # fmt: skip
