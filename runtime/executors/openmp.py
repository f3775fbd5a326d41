"""How long OpenMP's threads spin before they sleep.

A step is some hundred short parallel regions, so a thread that spins between two of them saves a wake-up of the kernel each time.
But libgomp spins for milliseconds, and where another process wants the core, that spinning takes it from the very thread that is
waited for. Two threads on two busy cores, milliseconds per token of the demo model by spin count: 180 (libgomp's default, 300000),
10 (2000), 0.8 (200). On idle cores, tokens per second of benchmark model S: 700 (300000), 709 (20000), 664 (2000), 138 (200): too
short a spin does not bridge the gaps between regions, and every region then waits for the kernel. 2000, about 100 microseconds,
costs a twentieth where the cores are idle and saves nine tenths where they are not.
"""

from __future__ import annotations

import os

_SPINS = "2000"  # of libgomp's waiting loop; one is a PAUSE instruction, about 45 ns


def bound_spinning() -> None:
    """Set libgomp's spin count, unless the environment has a say of its own. Acts where libgomp is not loaded yet."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
