"""Permutations of any size computed from a key, without a table: random blocks are the same on every rank and device."""

from __future__ import annotations

import numpy as np

from dilcompile.progression import Positions

_MASK32 = np.uint64(0xFFFFFFFF)


def mixed(x: Positions) -> Positions:
    """The 32-bit mixer lowbias32 (Chris Wellons, hash-prospector)."""
    y = x.astype(np.uint64) & _MASK32
    y = ((y ^ (y >> np.uint64(16))) * np.uint64(0x7FEB352D)) & _MASK32
    y = ((y ^ (y >> np.uint64(15))) * np.uint64(0x846CA68B)) & _MASK32
    found: Positions = (y ^ (y >> np.uint64(16))).astype(np.int64)
    return found


_ROUNDS = 4


def shuffled(x: Positions, size: Positions, keys: Positions) -> Positions:
    """Where a permutation of 0 to before ``size``, one for each of ``keys``, takes ``x``; all arrays of one shape."""
    return _walked(x, size, keys, range(_ROUNDS))


def unshuffled(x: Positions, size: Positions, keys: Positions) -> Positions:
    """The inverse of ``shuffled``."""
    return _walked(x, size, keys, range(_ROUNDS - 1, -1, -1))


def _walked(x: Positions, size: Positions, keys: Positions, rounds: range) -> Positions:
    """A Feistel network permutes a power of 4 that holds ``size``; numbers behind ``size`` go on until they are inside."""
    half = np.ceil(np.log2(np.maximum(size, 2)) / 2).astype(np.int64)
    half += (np.int64(1) << (2 * half)) < size
    found: Positions = np.array(x, dtype=np.int64)
    open_ones = np.ones(found.shape, dtype=np.bool_)
    while open_ones.any():
        found[open_ones] = _permuted(found[open_ones], half[open_ones], keys[open_ones], rounds)
        open_ones &= found >= size
    return found


def _permuted(x: Positions, half: Positions, keys: Positions, rounds: range) -> Positions:
    mask = (np.int64(1) << half) - 1
    high, low = x >> half, x & mask
    for number in rounds:
        if rounds.step > 0:
            high, low = low, high ^ (mixed(low + keys + number * 0x632BE5AB) & mask)
        else:
            high, low = low ^ (mixed(high + keys + number * 0x632BE5AB) & mask), high
    found: Positions = (high << half) | low
    return found
