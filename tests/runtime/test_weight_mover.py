"""Mapped weights move into memory of their own: same addresses and bytes throughout, and a file changed meanwhile ends the engine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from llmc.artifacts.verify import open_artifact
from llmc.errors import ArtifactError, DeviceLost
from llmc.runtime.lane_hash import LaneHash
from llmc.runtime.memory import HUGE_PAGE_BYTES
from llmc.runtime.weight_mover import WeightMover, can_move
from llmc.runtime.weights import Weights, map_weights
from tests.runtime.toy_artifact import write_toy_artifact

TENSORS = {
    "big": np.random.default_rng(0).normal(size=(5, 1 << 21)).astype(np.float32),  # 40 MB: two chunks and a half
    "embed": np.arange(32 * 16, dtype=np.float32).reshape(32, 16),
    "head": np.ones((32, 16), dtype=np.float32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program").write_bytes(b"\x7fELF")
    return write_toy_artifact(tmp_path / "artifact", tmp_path / "program", TENSORS)


def mapped(folder: Path, verify: str = "always", lanes: Lanes | None = None) -> Weights:
    with open_artifact(folder) as artifact:
        sources = artifact.weights(verify=verify)  # type: ignore[arg-type]
        assert all(map(can_move, sources))
        return map_weights(sources, artifact.manifest.tensors, num_threads=2, lane_hash=lambda: cast("LaneHash | None", lanes))


def mover_of(weights: Weights) -> WeightMover:
    assert weights.mover is not None
    return weights.mover


def backing(address: int) -> str:
    """What lies behind an address, as the kernel has it: a file's path, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end:
            return fields[5] if len(fields) > 5 else ""
    raise AssertionError("unmapped")


@pytest.fixture
def moved(folder: Path) -> Iterator[Weights]:
    weights = mapped(folder)
    mover_of(weights).start()
    mover_of(weights).wait()
    yield weights


@pytest.mark.parametrize("verify", ["always", "never"])
def test_bytes_and_addresses_stay(folder: Path, verify: str) -> None:
    weights = mapped(folder, verify)
    before = {name: view.address for name, view in weights.views.items()}
    assert all(backing(address).endswith("model.safetensors") for address in before.values())
    assert mover_of(weights).pending_bytes == weights.num_bytes > TENSORS["big"].nbytes
    mover_of(weights).start()
    mover_of(weights).wait()
    mover_of(weights).check()
    assert mover_of(weights).pending_bytes == 0
    for name, view in weights.views.items():
        assert view.address == before[name] and backing(view.address) == ""
        assert backing(view.address + view.array.nbytes - 1) == ""
        np.testing.assert_array_equal(view.array, TENSORS[name])


def test_a_moved_weight_no_longer_depends_on_the_file(folder: Path, moved: Weights) -> None:
    (file,) = (folder / "weights").iterdir()
    with file.open("r+b") as handle:
        handle.write(bytes(file.stat().st_size))
    np.testing.assert_array_equal(moved.views["big"].array, TENSORS["big"])


def test_readers_see_the_same_bytes_throughout(folder: Path) -> None:
    weights = mapped(folder)
    array, expected = weights.views["big"].array, TENSORS["big"]
    stop, wrong, rounds = threading.Event(), [], [0]

    def read() -> None:
        while not stop.is_set() or not rounds[0]:
            if not np.array_equal(array, expected):
                wrong.append(rounds[0])
            rounds[0] += 1

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    mover_of(weights).start()
    mover_of(weights).wait()
    stop.set()
    for reader in readers:
        reader.join()
    mover_of(weights).check()
    assert rounds[0] > 0 and not wrong


def test_a_file_changed_before_it_moved_is_found(folder: Path) -> None:
    weights = mapped(folder)
    (file,) = (folder / "weights").iterdir()
    with file.open("r+b") as handle:
        handle.seek(20 << 20)  # in the second chunk
        handle.write(b"\x01\x02\x03\x04")
    mover_of(weights).start()
    mover_of(weights).wait()
    with pytest.raises(DeviceLost, match=r"the weights could not move into memory: .*bytes 16777216 to 33554432 are damaged"):
        mover_of(weights).check()
    assert mover_of(weights).pending_bytes == weights.num_bytes - (16 << 20)
    assert weights.views["big"].array[0, 0] == TENSORS["big"][0, 0]  # what was read is still there


def test_a_damaged_file_never_starts(folder: Path) -> None:
    (file,) = (folder / "weights").iterdir()
    with file.open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\xff")
    with pytest.raises(ArtifactError, match="are damaged"):
        mapped(folder)


def test_closing_stops_it_and_leaves_the_weights(folder: Path) -> None:
    weights = mapped(folder)
    mover = mover_of(weights)
    mover.close()  # not begun: nothing to wait for
    mover.start()
    mover.wait()
    assert mover.pending_bytes == weights.num_bytes
    np.testing.assert_array_equal(weights.views["big"].array, TENSORS["big"])


def test_a_region_freed_with_its_views_takes_the_moved_pages_along(folder: Path, moved: Weights) -> None:
    address = moved.views["big"].address & ~(HUGE_PAGE_BYTES - 1)
    assert backing(address) == ""
    array = moved.views["big"].array
    del moved
    np.testing.assert_array_equal(array, TENSORS["big"])  # a view keeps all of it


class Lanes:
    """hashlib for several buffers at once, as LaneHash would; `wrong` digests are of nothing that is there."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong
        self.groups: list[list[int]] = []

    def __call__(self, buffers: Sequence[np.ndarray]) -> list[str]:
        self.groups.append([buffer.nbytes for buffer in buffers])
        return ["0" * 64 if self.wrong else hashlib.sha256(buffer).hexdigest() for buffer in buffers]


@pytest.mark.parametrize("wrong", [False, True])
def test_chunks_of_one_length_are_hashed_together(folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    monkeypatch.setattr("llmc.runtime.weights._FEWEST_LANES", 2)
    lanes = Lanes(wrong)
    weights = mapped(folder, lanes=lanes)
    assert lanes.groups == [[16 << 20, 16 << 20]], "the third, shorter, is hashed alone"
    assert weights.num_bytes_hashed == weights.num_bytes
    np.testing.assert_array_equal(weights.views["big"].array, TENSORS["big"])  # also where hashlib had to say that they are right


@pytest.mark.parametrize("at", [20 << 20, -1])  # in a lane, and in the chunk beside the lanes
def test_a_damaged_chunk_among_lanes_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr("llmc.runtime.weights._FEWEST_LANES", 2)
    (file,) = (folder / "weights").iterdir()
    with file.open("r+b") as handle:
        handle.seek(at, 2 if at < 0 else 0)
        handle.write(b"\xff")
    place = "bytes 16777216 to 33554432" if at > 0 else "bytes 33554432 to"
    with pytest.raises(ArtifactError, match=rf"{place}.* are damaged, expected SHA-256 \w+, found \w+"):
        mapped(folder, lanes=Lanes())


def test_the_first_step_goes_before(folder: Path) -> None:
    weights = mapped(folder)
    mover = mover_of(weights)
    mover.check()  # canaries, before the start
    mover.check()
    mover.start(head_start_s=3600)
    mover.check()
    assert mover.pending_bytes == weights.num_bytes
    mover.check()  # the second step
    mover.wait()
    assert mover.pending_bytes == 0


def test_closing_does_not_wait_for_a_first_step(folder: Path) -> None:
    weights = mapped(folder)
    mover_of(weights).start(head_start_s=3600)
    mover_of(weights).close()
    assert mover_of(weights).pending_bytes == weights.num_bytes
