"""Counter-based random numbers: the draw for (seed, position) is a pure function, so nothing but them decides it.

Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in plain Python: one draw per
token costs a few microseconds, many at a time less than one each, and `numpy.random` would cost 20 ms at every start.
"""

from __future__ import annotations

import numpy as np

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.array(_MASK, dtype=np.uint64), np.array(32, dtype=np.uint64)
_MULTIPLIERS = np.array([[[_M0]], [[_M1]]], dtype=np.uint64)  # [2, 1, 1], as are the key's steps of each round
_STEPS = np.arange(10, dtype=np.uint64)[:, None, None, None] * np.array([[[_W0]], [[_W1]]], dtype=np.uint64)


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


def uniforms(seeds: list[int], positions: list[int], count: int) -> np.ndarray:
    """`uniform` of each seed at its position and the `count` - 1 behind it: float64 [len(seeds), count]."""
    at: np.ndarray = np.array(positions, dtype=np.uint64)[:, None] + np.arange(count, dtype=np.uint64)
    even, odd = np.stack([at & _LOW, np.zeros_like(at)]), np.stack([at >> _HALF, np.zeros_like(at)])  # words 0 and 2, words 1 and 3
    key = np.array([[seed & _MASK for seed in seeds], [seed >> 32 & _MASK for seed in seeds]], dtype=np.uint64)[..., None]
    for step in _STEPS:
        products = _MULTIPLIERS * even
        even = (products >> _HALF)[::-1] ^ odd ^ (key + step & _LOW)
        odd = (products & _LOW)[::-1]
    return ((even[0] << _HALF | odd[0]) >> np.uint64(11)) * 2.0**-53
