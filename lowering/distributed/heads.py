"""Ulysses: an all-to-all that turns a slice of the sequence with all heads into all of it with a slice of the heads, and back
(DeepSpeed Ulysses, arXiv 2309.14509).

Where the ranks' slices are zigzag or striped shards, rows are put into the order of positions as they are unpacked, and back as
they are packed, so that every kernel has a whole sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilcompile.lowering.distributed import ops
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.placements.shards import Order


def start(x: Tensor, parts: int, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """Start to send each part its heads of ``x`` [B, heads, n, D]."""
    batch, count, places, dim = x.shape
    dealt = x.reshape(batch, parts, count // parts, places, dim).transpose(0, 1)
    started: Tensor = ops.exchange_equal(dealt, axis, spec, what, backward)
    return started


def cut(started: Tensor, order: Order) -> Tensor:
    """What came of it: [B, heads / parts, parts * n, D], by position if each part has a shard of this order."""
    came = wait(started)
    if order == "striped":
        return came.permute(1, 2, 3, 0, 4).flatten(2, 3)
    if order == "zigzag":
        first, second = came.reshape(*came.shape[:3], 2, -1, came.shape[4]).unbind(3)
        came = torch.cat([first, second.flip(0)])
    return came.permute(1, 2, 0, 3, 4).flatten(2, 3)


def start_back(x: Tensor, parts: int, order: Order, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """Start to send each part its rows of ``x`` [B, heads, parts * n, D], which are by position."""
    batch, count, places, dim = x.shape
    if order == "striped":
        sliced = x.reshape(batch, count, places // parts, parts, dim).movedim(3, 0)
    elif order == "zigzag":
        first, second = x.reshape(batch, count, 2, parts, places // parts // 2, dim).unbind(2)
        sliced = torch.cat([first, second.flip(2)], dim=3).movedim(2, 0)
    else:
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
