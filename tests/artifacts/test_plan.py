"""Plans: written canonically, read strictly, every broken one refused with its own sentence before anything is loaded."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.artifacts.plan import MAX_PLAN_BYTES, PLAN_FORMAT, Launch, Scalar, Span, decode_plan, encode_plan
from llmc.artifacts.plan_check import check_plan
from llmc.artifacts.plan_hazards import first_unwritten_read, hazard_edges, hazards, unordered_hazard
from llmc.errors import ArtifactError
from tests.artifacts.small_plan import ARENA, CACHE, IMAGE, IMAGES, INPUT, SHA256, WEIGHT, changed, scale, small_plan

POINTER = {"kind": "pointer", "region": INPUT, "offset": 0}


def test_a_good_plan_is_read_as_it_was_written() -> None:
    plan = small_plan()
    data = encode_plan(plan)
    assert decode_plan(data, "plan") == plan
    assert encode_plan(decode_plan(data, "plan")) == data
    check_plan(plan, IMAGES, "plan")
    assert plan.edges == [(0, 1)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a plan"),
        (b"[]", "not a plan"),
        (b"\xff\xfe", "not a plan"),
        (b'{"format": 1}', "not a plan.*target"),
        (b'{"format": "1"}', "not a plan.*int"),
        (b'{"format": 2, "anything": 0}', f"plan format 2, this runtime reads {PLAN_FORMAT}"),
        (b"[" * 100_000, "nested too deeply|not a plan"),
        (b" " * (MAX_PLAN_BYTES + 1), "more than a plan may have"),
    ],
    ids=range(8),
)
def test_what_is_no_plan_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"plans/8.json: .*({reason})"):
        decode_plan(data, "plans/8.json")


def test_unknown_fields_are_refused() -> None:
    tree = msgspec.to_builtins(small_plan())
    tree["launches"][0]["stream"] = 1
    with pytest.raises(ArtifactError, match="unknown field `stream`"):
        decode_plan(msgspec.json.encode(tree), "plan")


# Where, what is put there, words of the refusal.
BROKEN: list[tuple[str, Any, str]] = [
    ("target", "h200", "expected an architecture"),
    ("target", "sm_80", "is for sm_90, the plan for sm_80"),
    ("sizes", {"T": 0}, "expected 1 or more"),
    ("regions.1.name", "x", "two regions share a name"),
    ("regions.0.kind", "arena", "more than one arena"),
    ("regions.0.size_bytes", None, "which only a cache may leave open"),
    ("regions.0.size_bytes", -1, "expected 0 to"),
    ("regions.0.size_bytes", 1 << 60, "expected 0 to"),
    ("regions.0.size_bytes", 511, "bytes 0 to 512 of 'x', which has 511"),
    ("regions.3.size_bytes", 4096, "is open at its end"),
    ("images.0.sha256", "../../etc/passwd", "not named by a SHA-256"),
    ("images.0.sha256", "0" * 64, "is not there"),
    ("images.0.size_bytes", 7, "is damaged"),
    ("kernels.0.image", 1, "image 1 of 1"),
    ("kernels.0.image", -1, "image -1 of 1"),
    ("kernels.0.entry", "other", "is not in its image"),
    ("kernels.0.entry", "a b", "is not in its image"),
    ("kernels.0.num_warps", 8, "8 warps, its image wants"),
    ("kernels.0.num_warps", 0, "0 warps"),
    ("kernels.0.shared_bytes", 300_000, "bytes of shared memory"),
    ("kernels.0.shared_bytes", -1, "bytes of shared memory"),
    ("kernels.0.cluster", 0, "clusters of 0"),
    ("kernels.0.parameters.2.size", 8, "in its image and"),
    ("kernels.0.parameters.1.offset", 16, "in its image and"),
    ("kernels.0.parameters", [], "in its image and"),
    ("kernels.0.parameters.0.align_bytes", 3, "no power of two"),
    ("launches.0.kernel", 5, "kernel 5 of 1"),
    ("launches.0.grid", [0, 1, 1], "expected 1 to"),
    ("launches.0.grid", [1, 70_000, 1], "expected 1 to"),
    ("launches.0.arguments", [POINTER], "1 arguments for 6 parameters"),
    ("launches.0.arguments.0.region", 9, "region 9 of 4"),
    ("launches.0.arguments.0.offset", -16, "byte -16 of 'x'"),
    ("launches.0.arguments.0.offset", 528, "byte 528 of 'x'"),
    ("launches.0.arguments.0.offset", 8, "needs a multiple of 16"),
    ("launches.0.arguments.0.region", WEIGHT, "does not say it reads or writes"),
    ("launches.0.arguments.2", POINTER, "a pointer for a parameter of 4 bytes"),
    ("launches.0.arguments.2.data", "00", "is not 4 bytes in hex"),
    ("launches.0.arguments.2.data", "zzzzzzzz", "is not 4 bytes in hex"),
    ("launches.0.arguments.2.data", "0000803F", "is not 4 bytes in hex"),
    ("launches.0.reads.0.region", 4, "region 4 of 4"),
    ("launches.0.reads.0.start", -1, "bytes -1 to 512"),
    ("launches.0.writes.0.stop", 4096, "bytes 0 to 4096 of 'arena', which has 1024"),
    ("launches.0.writes.0.stop", None, "is open at its end"),
    ("launches.0.writes.0.region", INPUT, "which is read only"),
    ("launches.2.writes.0.region", WEIGHT, "which is read only"),
    ("launches.1.reads.0", {"region": ARENA, "start": 512, "stop": 1024}, "does not say it reads or writes"),
    ("edges", [], "touch the same bytes, and no edge orders them"),
    ("edges", [[0, 2]], "launches 0 .first. and 1 .second. touch the same bytes"),
    ("edges", [[0, 1], [1, 0]], "edge from launch 1 to 0 of 3"),
    ("edges", [[0, 1], [1, 1]], "edge from launch 1 to 1"),
    ("edges", [[0, 1], [2, 3]], "edge from launch 2 to 3 of 3"),
    ("edges", [[0, 1], [0, 1]], "an edge twice"),
    ("outputs.0.region", INPUT, "does not lie in the arena"),
    ("outputs.0.region", 77, "does not lie in the arena"),
    ("outputs.0.offset", 1000, "of an arena of 1024"),
    ("outputs.0.offset", -4, "of an arena of 1024"),
    ("outputs.0.shape", [-1], "expected at most 16 sizes of 0 or more"),
    ("outputs.0.shape", [1 << 40, 1 << 40], "of an arena of 1024"),
]


@pytest.mark.parametrize(("path", "value", "reason"), BROKEN, ids=lambda v: str(v)[:30])
def test_each_broken_plan_is_refused_with_its_own_sentence(path: str, value: Any, reason: str) -> None:
    with pytest.raises(ArtifactError, match=rf"plans/8\.json: .*{reason}"):
        check_plan(changed(small_plan(), path, value), IMAGES, "plans/8.json")


def test_an_image_that_was_changed_is_refused() -> None:
    data = bytearray(IMAGE)
    data[-1] ^= 1
    with pytest.raises(ArtifactError, match="is damaged"):
        check_plan(small_plan(), {SHA256: bytes(data)}, "plan")
    other = b"not a cubin"
    plan = changed(small_plan(), "images.0", {"sha256": hashlib.sha256(other).hexdigest(), "size_bytes": len(other)})
    with pytest.raises(ArtifactError, match="not a readable cubin"):
        check_plan(plan, {hashlib.sha256(other).hexdigest(): other}, "plan")


def test_reading_what_nobody_wrote_is_refused() -> None:
    plan = small_plan()
    order = [plan.launches[1], plan.launches[0], plan.launches[2]]
    with pytest.raises(ArtifactError, match="launch 0 reads bytes 0 to 512 of the arena, which nothing has written"):
        check_plan(msgspec.structs.replace(plan, launches=order, edges=hazard_edges(order)), IMAGES, "plan")


def test_an_output_that_nobody_writes_is_refused() -> None:
    plan = small_plan()
    with pytest.raises(ArtifactError, match="'logits' is written by no launch"):
        check_plan(msgspec.structs.replace(plan, launches=plan.launches[:2]), IMAGES, "plan")


def test_random_damage_raises_nothing_but_artifact_errors() -> None:
    data = encode_plan(small_plan())
    choose = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 2, 8])):
            damaged[choose.randrange(len(data))] = choose.choice(b'0123456789-,:"[]{}aeun \x00\xff')
        try:
            check_plan(decode_plan(bytes(damaged), "plan"), IMAGES, "plan")
        except ArtifactError:
            continue


# --- hazards --------------------------------------------------------------------------------------------------------------


def launch(reads: list[tuple[int, int]], writes: list[tuple[int, int]], region: int = 0) -> Launch:
    spans = [[Span(region=region, start=a, stop=b) for a, b in half] for half in (reads, writes)]
    return Launch(kernel=0, grid=(1, 1, 1), arguments=[Scalar(data="00")], reads=spans[0], writes=spans[1], label="")


def test_the_three_hazards_and_none() -> None:
    write, read, apart = launch([], [(0, 8)]), launch([(4, 6)], []), launch([(8, 9)], [(9, 12)])
    assert hazards([write, read]) == [set(), {0}]  # reads what was written
    assert hazards([read, write]) == [set(), {0}]  # overwrites what was read
    assert hazards([write, write]) == [set(), {0}]
    assert hazards([read, read]) == [set(), set()]
    assert hazards([write, apart]) == [set(), set()]
    assert hazards([write, launch([(0, 8)], [], region=1)]) == [set(), set()]


def test_an_open_span_meets_everything_in_its_region() -> None:
    launches = [scale((INPUT, 0), (CACHE, 0), ""), scale((CACHE, 0), (ARENA, 0), "")]
    assert hazards(launches) == [set(), {0}]


def test_implied_edges_are_left_out() -> None:
    chain = [launch([], [(0, 8)]), launch([(0, 8)], [(0, 8)]), launch([(0, 8)], [])]
    assert hazard_edges(chain) == [(0, 1), (1, 2)]
    assert unordered_hazard(chain, [(0, 1), (1, 2)]) is None
    assert unordered_hazard(chain, [(0, 1)]) == (1, 2)
    assert unordered_hazard(chain, [(1, 2)]) == (0, 1)


def test_unwritten_reads_are_found() -> None:
    assert first_unwritten_read([launch([], [(0, 8)]), launch([(4, 12)], [])], 0) is None  # a strided view has gaps
    found = first_unwritten_read([launch([], [(0, 8)]), launch([(8, 12)], [])], 0)
    assert found is not None and found[0] == 1


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda s: (s[0], s[0] + s[1])), max_size=3)


@given(st.lists(st.builds(launch, SPANS, SPANS, st.integers(0, 1)), max_size=12))
def test_edges_order_exactly_what_touches_the_same_bytes(launches: list[Launch]) -> None:
    def touch(a: list[Span], b: list[Span]) -> bool:
        return any(
            x.region == y.region and max(x.start, y.start) < min(x.stop, y.stop)  # type: ignore[type-var]
            for x in a
            for y in b
        )

    edges = hazard_edges(launches)
    before: list[set[int]] = [set() for _ in launches]
    for earlier, later in edges:
        before[later] |= {earlier} | before[earlier]
    for later, second in enumerate(launches):
        for earlier, first in enumerate(launches[:later]):
            hazard = touch(first.writes, second.reads) or touch(first.writes, second.writes) or touch(first.reads, second.writes)
            assert not hazard or earlier in before[later]
    assert unordered_hazard(launches, edges) is None
    for dropped in edges:  # every edge is needed
        assert unordered_hazard(launches, [edge for edge in edges if edge != dropped]) is not None
