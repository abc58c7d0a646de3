"""Ulysses: an all-to-all that turns a slice of the sequence with all heads into all of it with a slice of the heads, and back
(DeepSpeed Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

from torch import Tensor

from dilcompile.lowering.distributed import ops
from dilcompile.lowering.distributed.exchange import wait


def start(x: Tensor, parts: int, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """Start to send each part its heads of ``x`` [B, heads, n, D]."""
    batch, count, places, dim = x.shape
    dealt = x.reshape(batch, parts, count // parts, places, dim).transpose(0, 1)
    started: Tensor = ops.exchange_equal(dealt, axis, spec, what, backward)
    return started


def cut(started: Tensor) -> Tensor:
    """What came of it: [B, heads / parts, parts * n, D], the parts' rows one after another."""
    return wait(started).permute(1, 2, 0, 3, 4).flatten(2, 3)


def start_back(x: Tensor, parts: int, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """Start to send each part its rows of ``x`` [B, heads, parts * n, D]."""
    batch, count, places, dim = x.shape
    sliced = x.reshape(batch, count, parts, places // parts, dim).movedim(2, 0)
    started: Tensor = ops.exchange_equal(sliced, axis, spec, what, backward)
    return started


def whole(started: Tensor) -> Tensor:
    """What came of it: [B, parts * heads, n, D]."""
    return wait(started).transpose(0, 1).flatten(1, 2)


def repeat(x: Tensor, share: int) -> Tensor:
    """Each key head of [B, Hkv, n, D] so many times."""
    return x if share == 1 else x.repeat_interleave(share, dim=1)


def sum_repeated(x: Tensor, share: int) -> Tensor:
    """The sum over the copies that ``repeat`` made."""
    return x if share == 1 else x.reshape(x.shape[0], -1, share, *x.shape[2:]).sum(2)
