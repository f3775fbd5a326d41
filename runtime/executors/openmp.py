"""How long OpenMP's threads spin before they sleep.

A step is some hundred short parallel regions, so a thread that spins between two of them saves a wake-up of the kernel each time.
But libgomp spins for milliseconds, and where another process wants the core, that spinning takes it from the very thread that is
waited for. Two threads on two busy cores, milliseconds per token of the demo model by spin count: 180 (libgomp's default, 300000),
10 (2000), 1.9 (1000), 1.1 (500), 0.8 (200), 0.5 (none). 200, about 10 microseconds, still bridges the gaps between regions.
"""

from __future__ import annotations

import os

_SPINS = "200"  # of libgomp's waiting loop; one is a PAUSE instruction, about 45 ns


def bound_spinning() -> None:
    """Set libgomp's spin count, unless the environment has a say of its own. Acts where libgomp is not loaded yet."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
