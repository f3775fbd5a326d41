"""Artifacts of every format version still read, kept under tests/data/artifact_v<N>; a version's file never changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmc.artifacts import FORMAT_VERSION, OLDEST_READABLE
from llmc.artifacts.verify import verify

DATA = Path(__file__).parent.parent / "data"
DIGESTS = {
    1: "f19c60433abf859714fde74594cd3aea90b3206e88ee681c88789a587c571c4e",
    2: "8b2aef142b69f81b5fcbc2380b8dc8f4213358086c17365acfbc08d20d4c0215",
    3: "3e73ef5a94ea0360badd1634d068d2a7601eb69bb62e26cbda83b8ce65adce8b",
}


@pytest.mark.parametrize("version", range(OLDEST_READABLE, FORMAT_VERSION + 1))
def test_a_kept_artifact_still_reads(version: int, tmp_path: Path):
    copied = tmp_path / "out"
    shutil.copytree(DATA / f"artifact_v{version}", copied)
    for path in [copied, *copied.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o022)  # a checkout takes the umask's word for it
    assert verify(copied).digest == DIGESTS[version]
