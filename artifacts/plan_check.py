"""Whether a plan may be given to a driver. Everything is judged before a byte of it is used.

Run by the compiler on what it wrote (a failure is our bug) and by the runtime on what it read (a failure is theirs).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from llmc.artifacts.cubin import Cubin, read_cubin
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.plan import Launch, Plan, PlanKernel, Pointer, Region, Span
from llmc.artifacts.plan_hazards import first_unwritten_read, unordered_hazard
from llmc.errors import ArtifactError

REGION_ALIGNMENT = 256  # bytes; of every region's address
MAX_REGIONS = 100_000
MAX_IMAGES = 10_000
MAX_LAUNCHES = 20_000  # 28 layers have some 300; a bit per pair is kept
MAX_EDGES = 200_000
MAX_SPANS = 1024  # of one launch
MAX_PARAMETER_BYTES = 32_764  # what a kernel can have in all, since CUDA 12.1
MAX_SHARED_BYTES = 232_448  # of the largest architecture; the device's own limit is asked at load
MAX_BYTES = 1 << 48  # a region; the address space of a GPU

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TARGET = re.compile(r"sm_([1-9][0-9]{1,2})", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)
_GRID = (2**31 - 1, 65535, 65535)


def check_plan(plan: Plan, images: Mapping[str, bytes], where: str, seen: dict[str, Cubin] | None = None, *, order: bool = True) -> None:
    """Check a plan against itself and against its images.

    Args:
        plan: as `decode_plan` gives it.
        images: SHA-256 -> the bytes that will be loaded.
        where: how messages call the plan.
        order: also compute every hazard anew from what launches read and write, and hold the edges against it; most of the time that
            all checks take, and a question of what the compiler did, which asks it itself, as `llmc verify` does.
        seen: images that were hashed and read already, by SHA-256; added to. One dict serves the plans that share `images`.

    Raises:
        ArtifactError: one sentence about the first thing that is wrong.
    """
    seen = {} if seen is None else seen
    target = _TARGET.fullmatch(plan.target)
    if target is None:
        raise ArtifactError(f"{where}: target {plan.target[:50]!r}, expected an architecture as sm_90")
    counts = (len(plan.regions), len(plan.images), len(plan.kernels), len(plan.launches), len(plan.edges))
    limits = (MAX_REGIONS, MAX_IMAGES, MAX_LAUNCHES, MAX_LAUNCHES, MAX_EDGES)
    if any(count > limit for count, limit in zip(counts, limits, strict=True)):
        raise ArtifactError(f"{where}: {counts} regions, images, kernels, launches and edges, more than a plan may have {limits}")
    if any(size < 1 for size in plan.sizes.values()):
        raise ArtifactError(f"{where}: sizes {dict(list(plan.sizes.items())[:20])}, expected 1 or more each")
    _check_regions(plan.regions, where)
    cubins = _check_images(plan, images, int(target.group(1)), where, seen)
    for index, kernel in enumerate(plan.kernels):
        _check_kernel(kernel, cubins, f"{where}: kernel {index}")
    for index, launch in enumerate(plan.launches):
        _check_launch(launch, plan, f"{where}: launch {index} ({launch.label[:100]})")
    _check_edges(plan, where)
    if order:
        _check_order(plan, where)
    _check_outputs(plan, where)


def _check_regions(regions: list[Region], where: str) -> None:
    names = [region.name for region in regions]
    if len(set(names)) != len(names):
        raise ArtifactError(f"{where}: two regions share a name")
    if sum(region.kind == "arena" for region in regions) > 1:
        raise ArtifactError(f"{where}: more than one arena")
    for region in regions:
        if region.size_bytes is None and region.kind != "cache":
            raise ArtifactError(f"{where}: region {region.name[:200]!r} has no size, which only a cache may leave open")
        if region.size_bytes is not None and not 0 <= region.size_bytes <= MAX_BYTES:
            raise ArtifactError(f"{where}: region {region.name[:200]!r} has {region.size_bytes} bytes, expected 0 to {MAX_BYTES}")


def _check_images(plan: Plan, images: Mapping[str, bytes], architecture: int, where: str, seen: dict[str, Cubin]) -> list[Cubin]:
    if len({image.sha256 for image in plan.images}) != len(plan.images):
        raise ArtifactError(f"{where}: lists an image twice")
    cubins = []
    for image in plan.images:
        if not _SHA256.fullmatch(image.sha256):
            raise ArtifactError(f"{where}: image {image.sha256[:80]!r} is not named by a SHA-256")
        if image.sha256 not in images:
            raise ArtifactError(f"{where}: image {image.sha256} is not there; fetch the artifact again or compile again")
        data = images[image.sha256]
        found = image.sha256 if image.sha256 in seen else hashlib.sha256(data).hexdigest()
        if len(data) != image.size_bytes or found != image.sha256:
            raise ArtifactError(
                f"{where}: image {image.sha256} of {image.size_bytes} bytes is damaged: {len(data)} bytes that hash to {found}; "
                "fetch the artifact again or compile again"
            )
        if image.sha256 not in seen:
            seen[image.sha256] = read_cubin(data, f"{where}: image {image.sha256}")
        cubin = seen[image.sha256]
        if cubin.architecture != architecture:
            raise ArtifactError(f"{where}: image {image.sha256} is for sm_{cubin.architecture}, the plan for {plan.target}")
        cubins.append(cubin)
    return cubins


def _check_kernel(kernel: PlanKernel, cubins: list[Cubin], where: str) -> None:
    if not 0 <= kernel.image < len(cubins):
        raise ArtifactError(f"{where}: image {kernel.image} of {len(cubins)}")
    entries = cubins[kernel.image].kernels
    if not _NAME.fullmatch(kernel.entry) or kernel.entry not in entries:
        raise ArtifactError(f"{where}: entry {kernel.entry[:200]!r} is not in its image")
    found = entries[kernel.entry]
    stated = tuple((p.offset, p.size) for p in kernel.parameters)
    if stated != found.parameters:
        raise ArtifactError(
            f"{where}: {kernel.entry} has parameters {list(found.parameters)[:40]} in its image and {list(stated)[:40]} in the plan; "
            "compile again"
        )
    if sum(size for _, size in stated) > MAX_PARAMETER_BYTES:
        raise ArtifactError(f"{where}: {kernel.entry} has more than {MAX_PARAMETER_BYTES} bytes of parameters")
    if any(p.align_bytes not in (1, 2, 4, 8, 16, 32, 64, 128, 256) for p in kernel.parameters):
        raise ArtifactError(f"{where}: {kernel.entry} has an alignment that is no power of two up to {REGION_ALIGNMENT}")
    if not 1 <= kernel.num_warps <= 32 or found.threads not in (None, (32 * kernel.num_warps, 1, 1)):
        raise ArtifactError(f"{where}: {kernel.entry} is launched with {kernel.num_warps} warps, its image wants {found.threads} threads")
    if not 1 <= kernel.cluster <= 16:
        raise ArtifactError(f"{where}: clusters of {kernel.cluster} blocks, expected 1 to 16")
    if not 0 <= kernel.shared_bytes <= MAX_SHARED_BYTES - found.shared_bytes:
        raise ArtifactError(f"{where}: {kernel.shared_bytes} bytes of shared memory, at most {MAX_SHARED_BYTES} fit")


def _check_launch(launch: Launch, plan: Plan, where: str) -> None:
    if not 0 <= launch.kernel < len(plan.kernels):
        raise ArtifactError(f"{where}: kernel {launch.kernel} of {len(plan.kernels)}")
    kernel = plan.kernels[launch.kernel]
    blocks = (launch.grid[0] * kernel.cluster, *launch.grid[1:])
    if not all(1 <= size <= limit for size, limit in zip(blocks, _GRID, strict=True)):
        raise ArtifactError(f"{where}: grid {launch.grid}, expected 1 to {_GRID} blocks")
    if len(launch.reads) + len(launch.writes) > MAX_SPANS:
        raise ArtifactError(f"{where}: {len(launch.reads) + len(launch.writes)} spans, at most {MAX_SPANS} are allowed")
    for span in launch.reads:
        _check_span(span, plan.regions, where)
    for span in launch.writes:
        if _check_span(span, plan.regions, where).kind in ("weight", "input"):
            raise ArtifactError(f"{where}: writes to {plan.regions[span.region].name[:200]!r}, which is read only")
    if len(launch.arguments) != len(kernel.parameters):
        raise ArtifactError(f"{where}: {len(launch.arguments)} arguments for {len(kernel.parameters)} parameters of {kernel.entry}")
    for number, (argument, parameter) in enumerate(zip(launch.arguments, kernel.parameters, strict=True)):
        here = f"{where}: argument {number}"
        if not isinstance(argument, Pointer):
            if not _HEX.fullmatch(argument.data) or len(argument.data) != 2 * parameter.size:
                raise ArtifactError(f"{here}: {argument.data[:80]!r} is not {parameter.size} bytes in hex")
        else:
            if parameter.size != 8:
                raise ArtifactError(f"{here}: a pointer for a parameter of {parameter.size} bytes")
            _check_pointer(argument, parameter.align_bytes, launch, plan.regions, here)


def _check_span(span: Span, regions: list[Region], where: str) -> Region:
    if not 0 <= span.region < len(regions):
        raise ArtifactError(f"{where}: region {span.region} of {len(regions)}")
    region = regions[span.region]
    size = region.size_bytes
    if (size is None) != (span.stop is None):
        raise ArtifactError(
            f"{where}: a span of {region.name[:200]!r} is open at its end; that is so for caches of open size, and only for them"
        )
    if span.start < 0 or (span.stop is not None and size is not None and not span.start <= span.stop <= size):
        raise ArtifactError(f"{where}: bytes {span.start} to {span.stop} of {region.name[:200]!r}, which has {size}")
    return region


def _check_pointer(pointer: Pointer, align_bytes: int, launch: Launch, regions: list[Region], where: str) -> None:
    if not 0 <= pointer.region < len(regions):
        raise ArtifactError(f"{where}: region {pointer.region} of {len(regions)}")
    name, size = regions[pointer.region].name[:200], regions[pointer.region].size_bytes
    if pointer.offset < 0 or (size is not None and pointer.offset > size):
        raise ArtifactError(f"{where}: byte {pointer.offset} of {name!r}, which has {size}")
    if pointer.offset % align_bytes:
        raise ArtifactError(f"{where}: byte {pointer.offset} of {name!r}, but the kernel's code needs a multiple of {align_bytes}")
    spans = [span for span in (*launch.reads, *launch.writes) if span.region == pointer.region]
    if not any(span.start <= pointer.offset and (span.stop is None or pointer.offset <= span.stop) for span in spans):
        raise ArtifactError(f"{where}: points to byte {pointer.offset} of {name!r}, which the launch does not say it reads or writes")


def _check_edges(plan: Plan, where: str) -> None:
    count = len(plan.launches)
    if len(set(plan.edges)) != len(plan.edges):
        raise ArtifactError(f"{where}: lists an edge twice")
    for earlier, later in plan.edges:
        if not 0 <= earlier < later < count:
            raise ArtifactError(f"{where}: edge from launch {earlier} to {later} of {count}; edges lead from earlier to later launches")


def _check_order(plan: Plan, where: str) -> None:
    open_hazard = unordered_hazard(plan.launches, plan.edges)
    if open_hazard is not None:
        earlier, later = open_hazard
        raise ArtifactError(
            f"{where}: launches {earlier} ({plan.launches[earlier].label[:100]}) and {later} ({plan.launches[later].label[:100]}) "
            "touch the same bytes, and no edge orders them; compile again"
        )
    for number, region in enumerate(plan.regions):
        if region.kind == "arena" and (found := first_unwritten_read(plan.launches, number)) is not None:
            launch, span = found
            raise ArtifactError(f"{where}: launch {launch} reads bytes {span.start} to {span.stop} of the arena, which nothing has written")


def _check_outputs(plan: Plan, where: str) -> None:
    if len({output.name for output in plan.outputs}) != len(plan.outputs):
        raise ArtifactError(f"{where}: two outputs share a name")
    for output in plan.outputs:
        here = f"{where}: output {output.name[:200]!r}"
        if not 0 <= output.region < len(plan.regions) or plan.regions[output.region].kind != "arena":
            raise ArtifactError(f"{here} does not lie in the arena")
        if len(output.shape) > 16 or any(size < 0 for size in output.shape):
            raise ArtifactError(f"{here} has shape {output.shape[:20]}, expected at most 16 sizes of 0 or more")
        start, nbytes = output.offset, nbytes_of(output.dtype, output.shape)
        size = plan.regions[output.region].size_bytes
        if start < 0 or size is None or start + nbytes > size:
            raise ArtifactError(f"{here} takes bytes {start} to {start + nbytes} of an arena of {size}")
        writes = [span for launch in plan.launches for span in launch.writes if span.region == output.region]
        if nbytes and not any(span.stop is not None and span.start < start + nbytes and start < span.stop for span in writes):
            raise ArtifactError(f"{here} is written by no launch")
