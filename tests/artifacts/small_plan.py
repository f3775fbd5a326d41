"""A plan of three launches over the test image, to be broken in one place each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from llmc.artifacts.plan import (
    PLAN_FORMAT,
    Launch,
    Parameter,
    Plan,
    PlanImage,
    PlanKernel,
    PlanOutput,
    Pointer,
    Region,
    Scalar,
    Span,
)
from llmc.artifacts.plan_hazards import hazard_edges

IMAGE = (Path(__file__).parents[1] / "data" / "cubins" / "scale_sm_90.cubin").read_bytes()
SHA256 = hashlib.sha256(IMAGE).hexdigest()
IMAGES = {SHA256: IMAGE}
INPUT, WEIGHT, ARENA, CACHE = range(4)


def scale(source: tuple[int, int], result: tuple[int, int], label: str) -> Launch:
    """x and out are (region, offset) of 512 bytes; those of a cache are its whole."""

    def span(place: tuple[int, int]) -> Span:
        region, offset = place
        return Span(region=region, start=0, stop=None) if region == CACHE else Span(region=region, start=offset, stop=offset + 512)

    pointers = [Pointer(region=region, offset=offset) for region, offset in (source, result)]
    null = Scalar(data="00" * 8)
    arguments = [*pointers, Scalar(data="0000803f"), Scalar(data="80000000"), null, null]
    return Launch(kernel=0, grid=(1, 1, 1), arguments=arguments, reads=[span(source)], writes=[span(result)], label=label)


def small_plan() -> Plan:
    """input -> arena[0:512] -> cache; weight -> arena[512:1024], which is the output."""
    parameters = [(0, 8, 16), (8, 8, 16), (16, 4, 1), (20, 4, 1), (24, 8, 1), (32, 8, 1)]
    launches = [
        scale((INPUT, 0), (ARENA, 0), "first"),
        scale((ARENA, 0), (CACHE, 0), "second"),
        scale((WEIGHT, 256), (ARENA, 512), "third"),
    ]
    return Plan(
        format=PLAN_FORMAT,
        target="sm_90",
        sizes={"T": 8},
        regions=[
            Region(name="x", kind="input", size_bytes=512),
            Region(name="model.norm.weight", kind="weight", size_bytes=1024),
            Region(name="arena", kind="arena", size_bytes=1024),
            Region(name="k_cache.0", kind="cache", size_bytes=None),
        ],
        images=[PlanImage(sha256=SHA256, size_bytes=len(IMAGE))],
        kernels=[
            PlanKernel(
                image=0,
                entry="scale",
                num_warps=4,
                shared_bytes=0,
                cluster=1,
                parameters=[Parameter(offset=offset, size=size, align_bytes=align) for offset, size, align in parameters],
            )
        ],
        launches=launches,
        edges=hazard_edges(launches),
        outputs=[PlanOutput(name="logits", dtype="float32", shape=[2, 64], region=ARENA, offset=512)],
    )


def changed(plan: Plan, path: str, value: Any) -> Plan:
    """A copy with one field replaced: "launches.0.grid" -> value."""
    tree = msgspec.to_builtins(plan)
    *parents, last = path.split(".")
    at: Any = tree
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]
    at[int(last) if isinstance(at, list) else last] = value
    return msgspec.convert(tree, Plan)
