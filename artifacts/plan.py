"""A plan: the static schedule of one program at one size, as data. docs/plan_format.md is its description.

Written by the compiler, read and checked (`plan_check.py`) by the runtime before it touches a driver. Addresses exist only at load:
an argument is a region and an offset, or the bytes of a number.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llmc.artifacts.manifest import Dtype
from llmc.errors import ArtifactError

# History: one dated line per version.
#   1  2026-11  first form: kernels of cubins, pointers and scalars, hazard edges.
PLAN_FORMAT = 1

MAX_PLAN_BYTES = 64 * 1024 * 1024

RegionKind = Literal["weight", "input", "cache", "arena"]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every record of a plan."""


class Region(_Record, frozen=True):
    """A range of device memory whose address is chosen at load, 256-byte aligned.

    kind "weight": a tensor of the manifest, by name; never written. "input": a graph input, filled before a step; never written.
    "cache": a layer's K or V, read and written, its size chosen at load. "arena": what lives only during a step; at most one.
    """

    name: str
    kind: RegionKind
    size_bytes: int | None  # None: chosen at load, for caches alone


class PlanImage(_Record, frozen=True):
    """A cubin, stored as images/<sha256>.cubin."""

    sha256: str
    size_bytes: int


class Parameter(_Record, frozen=True):
    """One kernel parameter, as the image has it. `align_bytes`: what the code assumes of a pointer given here; 1: nothing."""

    offset: int
    size: int
    align_bytes: int


class PlanKernel(_Record, frozen=True):
    """An entry of an image and what every launch of it has in common."""

    image: int  # index into `images`
    entry: str
    num_warps: int  # a block has 32 threads per warp, all along x
    shared_bytes: int  # dynamic shared memory of a block
    cluster: int  # blocks per cluster, along x; 1: none
    parameters: list[Parameter]


class Pointer(_Record, frozen=True, tag="pointer", tag_field="kind"):
    """The address of a byte of a region."""

    region: int  # index into `regions`
    offset: int  # bytes


class Scalar(_Record, frozen=True, tag="scalar", tag_field="kind"):
    """A number, or a null pointer, as the bytes the kernel receives; lower-case hex, little-endian."""

    data: str


class Span(_Record, frozen=True):
    """Bytes [start, stop) of a region. A strided view counts as the span from its first to its last byte."""

    region: int
    start: int
    stop: int | None  # None: to the end of a region whose size is chosen at load


class Launch(_Record, frozen=True):
    """One kernel launch. `reads` and `writes` hold every byte it may touch."""

    kernel: int  # index into `kernels`
    grid: tuple[int, int, int]  # blocks, before clusters multiply x
    arguments: list[Pointer | Scalar]
    reads: list[Span]
    writes: list[Span]
    label: str  # for people and traces


class PlanOutput(_Record, frozen=True):
    """A result, contiguous in memory."""

    name: str
    dtype: Dtype
    shape: list[int]
    region: int
    offset: int  # bytes


class Plan(_Record, frozen=True):
    """One program at one size."""

    format: int
    target: str  # "sm_90"
    sizes: dict[str, int]  # value of each symbolic dimension, "T": 8
    regions: list[Region]
    images: list[PlanImage]
    kernels: list[PlanKernel]
    launches: list[Launch]  # in an order that is right
    edges: list[tuple[int, int]]  # (earlier, later) indices of launches; what may run side by side has no path between
    outputs: list[PlanOutput]


class _FormatOnly(msgspec.Struct):
    """What is read first; everything else of a plan may change with its format."""

    format: int


def encode_plan(plan: Plan) -> bytes:
    """Write a plan as canonical JSON: sorted keys, no spaces, one newline at the end. Equal plans give equal bytes."""
    return msgspec.json.encode(plan, order="sorted") + b"\n"


def decode_plan(data: bytes, where: str) -> Plan:
    """Read a plan's fields and their types; `plan_check.check_plan` judges what they say.

    Args:
        data: the file's bytes, already held against its SHA-256.
        where: how messages call the file.

    Raises:
        ArtifactError: too large, not JSON, another format, unknown or missing fields, wrong types.
    """
    if len(data) > MAX_PLAN_BYTES:
        raise ArtifactError(f"{where}: {len(data)} bytes are more than a plan may have ({MAX_PLAN_BYTES})")
    try:
        found = msgspec.json.decode(data, type=_FormatOnly).format
        if found != PLAN_FORMAT:
            raise ArtifactError(
                f"{where}: plan format {found}, this runtime reads {PLAN_FORMAT}; use the llmc it was compiled with or compile again"
            )
        return msgspec.json.decode(data, type=Plan)
    except RecursionError:
        raise ArtifactError(f"{where}: nested too deeply to be a plan; fetch the artifact again or compile again") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{where}: not a plan of format {PLAN_FORMAT}: {error}; fetch the artifact again or compile again") from None
