"""GB/s of argmax on a GPU, against torch: python -m llmc.kernels.argmax.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from ..gpu_bench import Case, main, random


def arguments(rows: int) -> tuple[Tensor]:
    return (random(rows, 151936),)


def cases() -> Iterator[Case]:
    from .triton_impl import argmax

    for rows in (1, 16, 64, 256):
        yield Case(
            name=f"argmax {rows}x151936",
            make=partial(arguments, rows),
            ours=argmax,
            moved_bytes=rows * 151936 * 2,
            baselines={"torch": lambda logits: logits.argmax(1)},
        )


if __name__ == "__main__":
    main(cases)
