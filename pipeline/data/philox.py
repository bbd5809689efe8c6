"""Philox4x32-10, a counter-based random generator, over arrays of counters.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A number is a pure function of (key,
counter): no state, no order of drawing, the same on every machine.
"""

import hashlib

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four 32-bit words for every counter: uint64 [4, ...] of 32-bit values in, the same out."""
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2  # 32 x 32 -> 64 bits: exact
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def key_of(*parts: object) -> tuple[int, int]:
    """A 64-bit key from anything that prints: a seed, a split, a purpose."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def uniforms(key: tuple[int, int], index: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """``count`` uniform numbers in [0, 1) with 53 bits for every index: float64 [len(index), count].

    Number d of index i depends on (key, i, d, stream) alone.
    """
    index = np.asarray(index, dtype=np.uint64)
    blocks = (count + 1) // 2  # a block of four words makes two numbers
    shape = (len(index), blocks)
    counter = np.empty((4, *shape), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = np.uint64(stream)
    counter[2] = (index & _LOW)[:, None]
    counter[3] = (index >> _32)[:, None]
    words = philox(counter, key)
    high = np.stack([words[0], words[2]], axis=-1)
    low = np.stack([words[1], words[3]], axis=-1)
    bits = ((high << _32) | low) >> np.uint64(11)
    return (bits.astype(np.float64) * 2.0**-53).reshape(len(index), 2 * blocks)[:, :count]
