"""The cubin reader, on images that Triton 3.7 made of one small kernel, whole and damaged.

scale(x: *fp32, out: *fp32, factor: fp32, n: i32), 4 warps, and two pointers that Triton appends for scratch memory
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmc.artifacts.cubin import Cubin, read_cubin
from llmc.errors import ArtifactError

FOLDER = Path(__file__).parents[1] / "data" / "cubins"
LAYOUT = ((0, 8), (8, 8), (16, 4), (20, 4), (24, 8), (32, 8))


@pytest.mark.parametrize("architecture", [90, 100])  # ELF ABI versions 7 and 8
def test_reads_what_a_launch_must_match(architecture: int) -> None:
    cubin = read_cubin((FOLDER / f"scale_sm_{architecture}.cubin").read_bytes(), "scale")
    assert cubin.architecture == architecture
    (kernel,) = cubin.kernels.values()
    assert kernel.entry == "scale"
    assert kernel.parameters == LAYOUT
    assert kernel.threads == (128, 1, 1)
    assert 8 <= kernel.registers <= 64
    assert kernel.frame_bytes == 0 and kernel.shared_bytes == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ELF"),
        (b"\x7fELF\x01\x01" + bytes(100), "64-bit"),
        (b"//\n.version 8.7\n.target sm_90a\n", "ELF"),
        (b"\x50\xed\x55\xba" + bytes(100), "ELF"),  # a fatbin
        (Path("/proc/self/exe").read_bytes()[:4096], "ELF machine"),
    ],
)
def test_refuses_other_files(data: bytes, reason: str) -> None:
    with pytest.raises(ArtifactError, match=f"images/x.cubin: not a readable cubin .*{reason}"):
        read_cubin(data, "images/x.cubin")


def test_a_cut_file_is_refused_at_every_length() -> None:
    data = (FOLDER / "scale_sm_90.cubin").read_bytes()
    for length in range(0, len(data) - 1, 61):
        with pytest.raises(ArtifactError):
            read_cubin(data[:length], "x")


def test_a_damaged_file_never_does_anything_else() -> None:
    data = (FOLDER / "scale_sm_90.cubin").read_bytes()
    choose = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 4, 32])):
            damaged[choose.randrange(len(data))] = choose.choice([0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)])
        try:
            assert isinstance(read_cubin(bytes(damaged), "x"), Cubin)
        except ArtifactError:
            refused += 1
    assert refused > 300
