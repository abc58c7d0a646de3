"""Dropout from a counter: whether a pair is kept depends on its position alone, never on tiling or device."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The 32-bit mixer lowbias32 (Chris Wellons, hash-prospector) on int64 tensors holding 32-bit values."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keep_factor(seed: Tensor, b: Tensor, h: Tensor, t: Tensor, k: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) for pairs that are kept, 0 for the dropped.

    Args:
        seed: int64, one element.
        b, h, t, k: int64 batch row, query head, query position and key position, broadcastable.
        p: probability to drop a pair.

    Returns:
        ``dtype`` over the broadcast shape.
    """
    return (drawn(seed, b, h, t, k) >= round(p * 2**32)).to(dtype) / (1.0 - p)


def drawn(seed: Tensor, b: Tensor, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
    """A number from 0 to before 2^32 for each position, int64 over the broadcast shape; the arguments as above."""
    seed = seed.reshape(()).to(torch.int64)
    state = _mix(seed) ^ _mix((seed >> 32) + 0x9E3779B9)
    state = _mix(state + b * 0x85EBCA6B)
    state = _mix(state + h * 0xC2B2AE35)
    state = _mix(state + t)
    return _mix(state ^ _mix(k + 0x27D4EB2F))
