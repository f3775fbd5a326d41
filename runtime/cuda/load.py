"""An open artifact of plans -> an executor. Everything is read and checked before the driver is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmc.artifacts.cubin import Cubin
from llmc.artifacts.manifest import Entry, Manifest
from llmc.artifacts.plan import MAX_PLAN_BYTES, Plan, decode_plan
from llmc.artifacts.plan_check import check_plan
from llmc.artifacts.weight_source import WeightSource
from llmc.errors import ArtifactError
from llmc.runtime.cuda.api import OLDEST_DRIVER
from llmc.runtime.cuda.device import Device
from llmc.runtime.cuda.driver import Driver
from llmc.runtime.cuda.executor import PlanExecutor
from llmc.runtime.cuda.modules import Modules
from llmc.runtime.cuda.weights import WeightLoading
from llmc.runtime.stage_timer import StageTimer
from llmc.runtime.weights import Weights

MAX_IMAGE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class CheckedPlans:
    """The plans of an entry and those that sample, in its order, and the images they name by SHA-256."""

    plans: Sequence[Plan]
    sampling: Sequence[Plan]
    images: Mapping[str, bytes]


def read_plans(manifest: Manifest, entry: Entry, descriptors: Mapping[str, int]) -> CheckedPlans:
    """Read and check all plans of an entry and their images.

    Args:
        descriptors: open descriptor of each verified file, by its path in the artifact.

    Raises:
        ArtifactError: one sentence about the first thing that is wrong.
    """
    images: dict[str, bytes] = {}
    for image in manifest.images:
        if image.role == "cubin":
            images[image.sha256] = _read(descriptors[image.path], image.path, MAX_IMAGE_BYTES)
    cubins: dict[str, Cubin] = {}
    plans: list[Plan] = []
    for record in entry.plans:
        plan = _read_plan(record.path, manifest, descriptors, images, cubins)
        stated = {"T": record.num_tokens, "B": record.num_seqs, "N": record.num_logits, "M": record.table_blocks}
        found = {name: plan.sizes.get(name) for name in stated}
        if found != stated:
            raise ArtifactError(f"{record.path}: made for sizes {found}, the manifest says {stated}; compile again")
        plans.append(plan)
    if not plans:
        raise ArtifactError(f"manifest.json: entry {entry.name} has no plans; compile again")
    _check_limits(manifest, entry)
    sampling = [_read_plan(record.path, manifest, descriptors, images, cubins) for record in entry.sampling]
    return CheckedPlans(plans=plans, sampling=sampling, images=images)


def _read_plan(
    path: str, manifest: Manifest, descriptors: Mapping[str, int], images: Mapping[str, bytes], cubins: dict[str, Cubin]
) -> Plan:
    plan = decode_plan(_read(descriptors[path], path, MAX_PLAN_BYTES), path)
    check_plan(plan, images, path, cubins, order=False)
    if plan.target != manifest.target.isa:
        raise ArtifactError(f"{path}: made for {plan.target}, the manifest says {manifest.target.isa}; compile again")
    return plan


def open_device(manifest: Manifest) -> Device:
    """The GPU, if it is what the artifact needs.

    Raises:
        ConfigError: no driver, one too old, or no GPU.
        ArtifactError: the artifact was compiled for another GPU.
    """
    needs = manifest.requirements.cuda
    device = Device(Driver(needed=needs.driver_version if needs is not None else OLDEST_DRIVER))
    major, minor = device.capability
    here = f"sm_{major}{minor}"
    problem = None
    if here != manifest.target.isa or (needs is not None and needs.compute_capability != f"{major}.{minor}"):
        problem = f"compiled for {manifest.target.isa}, this GPU ({device.name}) is {here}; compile again with --target cuda:{here}"
    elif needs is not None and device.shared_bytes < needs.shared_memory_per_block_bytes:
        problem = (
            f"needs {needs.shared_memory_per_block_bytes} bytes of shared memory per block, this GPU ({device.name}) has "
            f"{device.shared_bytes}; compile again for it"
        )
    if problem is not None:
        device.close()
        raise ArtifactError(f"manifest.json: {problem}")
    return device


def load_executor(
    manifest: Manifest,
    entry: Entry,
    descriptors: Mapping[str, int],
    sources: Sequence[WeightSource],
    bound: Weights | None,
    timer: StageTimer,
    *,
    num_threads: int,
) -> PlanExecutor:
    """Everything up to the KV cache: plans checked, the device opened, code on it and weights on their way, for which
    `PlanExecutor.allocate_kv` waits: graphs are built meanwhile.

    Args:
        sources: the artifact's weight files.
        bound: tensors that lie in no file, from a checkpoint.
        num_threads: that read and hash weights.

    Raises:
        ArtifactError, ConfigError: as `read_plans`, `open_device`, `WeightLoading` and `PlanExecutor` say.
    """
    checked = timer.timed("plans", lambda: read_plans(manifest, entry, descriptors))
    device = timer.timed("device", lambda: open_device(manifest))
    loading: WeightLoading | None = None
    try:
        with timer.stage("load"):
            loading = WeightLoading(
                device,
                sources,
                manifest.tensors,
                bound,
                num_threads=max(2, num_threads),
                timed=lambda work: timer.timed("load.weights", work),
            )
            modules = timer.timed("load.code", lambda: _modules(device, checked))

        return PlanExecutor(
            device=device,
            entry=entry,
            kv=manifest.kv,
            plans=checked.plans,
            sampling=checked.sampling,
            modules=modules,
            weights=loading.placed,
            loaded=loading.wait,
            stop_loading=loading.stop,
        )
    except BaseException:
        if loading is not None:
            loading.stop()
        device.close()
        raise


def _modules(device: Device, checked: CheckedPlans) -> Modules:
    device.enter()
    return Modules(device, [*checked.plans, *checked.sampling], checked.images)


def _read(fd: int, path: str, most: int) -> bytes:
    """A whole verified file."""
    size = os.fstat(fd).st_size
    if size > most:
        raise ArtifactError(f"{path}: {size} bytes, at most {most} are expected; compile again")
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise ArtifactError(f"{path}: ends at byte {len(data)}, expected {size}; fetch the artifact again")
    return data


def _check_limits(manifest: Manifest, entry: Entry) -> None:
    """Whether the largest step of the manifest's limits has a plan."""
    limits, block_size = manifest.limits, manifest.kv.block_size
    columns = -(-limits.max_model_len // block_size)
    sequences = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    for record in entry.plans:
        large = record.num_tokens >= limits.max_num_batched_tokens and record.num_seqs >= sequences
        if large and not record.decode and record.table_blocks >= columns:
            return
    raise ArtifactError(
        f"manifest.json: entry {entry.name} has no plan for a step of {limits.max_num_batched_tokens} tokens of {sequences} sequences "
        f"of up to {columns} blocks, which its limits allow; compile again"
    )
