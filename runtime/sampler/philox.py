"""Counter-based random numbers: the draw for (seed, position) is a pure function, so nothing but them decides it.

Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in plain Python: one draw per
token costs a few microseconds, and `numpy.random` would cost 20 ms at every start.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox_4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds over four 32-bit words of counter and two of key; four 32-bit words come out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The draw of `seed` (any integer, taken modulo 2**64) at `position`: 53 bits in [0, 1)."""
    seed &= (1 << 64) - 1
    high, low, _, _ = philox_4x32((position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53
