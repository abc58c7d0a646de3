"""Sums of scores along antidiagonals (XAttention)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dilcompile.lowering.estimators.operands import Operands, Rows, cut

# The stride of the paper's most exact setting; an eighth of the products of all pairs.
_STRIDE = 8
# Tiles whose scores are held at once.
_TILES_AT_ONCE = 1 << 23


def estimate(operands: Operands) -> Rows:
    """The softmax weight of blocks, where each tile of stride x stride pairs counts by the mean score of its antidiagonal.

    XAttention (arXiv 2503.16428, section 2.1): an antidiagonal crosses every vertical and every slash line of its tile. Its sum
    is one product of the stride's queries and its reversed keys, laid end to end. Tiles of which every pair is out of reach,
    without a kept key on the antidiagonal, count for nothing. The stride is 8, or what of it divides the sizes of a block.
    """
    grid, (keys, there) = operands.grid, operands.keys()
    stride = math.gcd(_STRIDE, grid.q_block, grid.k_block)
    ends = cut(keys.flatten(2, 3), 2, stride).flip(3).flatten(3)
    kept = cut(there.flatten(1), 1, stride).flip(2).to(operands.dtype)

    def rows(first: int, stop: int) -> Tensor:
        queries, held = operands.queries(first, stop)
        own = cut(queries.flatten(2, 3), 2, stride).flatten(3)
        pairs = cut(held.flatten(), 0, stride).to(operands.dtype) @ kept.mT
        means = operands.scores(operands.products(own, ends) / pairs.clamp(min=1)[:, None])
        seen = (pairs > 0) & _reached(operands, first, stop, stride)
        # Rows of tiles without any key have no weight to give.
        weights = means.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        tiles = cut(weights, 3, grid.k_block // stride).sum(-1)
        return cut(tiles, 2, grid.q_block // stride).sum(3).log()

    in_a_row = operands.q.shape[0] * operands.q.shape[1] * kept.shape[1] * (grid.q_block // stride)
    step = max(1, _TILES_AT_ONCE // in_a_row)
    return lambda first, stop: torch.cat([rows(n, min(n + step, stop)) for n in range(first, stop, step)], 2)


def _reached(operands: Operands, first: int, stop: int, stride: int) -> Tensor:
    """Which tiles hold a pair within the limits, bool [tiles of these block rows, tiles of keys]."""
    grid, row = operands.grid, operands.first_row
    begin, end = ((row + n) * grid.q_block // stride for n in (first, stop))
    t = torch.arange(begin, end, device=operands.q.device)[:, None] * stride
    k = torch.arange(grid.columns * grid.k_block // stride, device=operands.q.device) * stride
    found = torch.ones(t.shape[0], k.shape[0], dtype=torch.bool, device=operands.q.device)
    if grid.left is not None:
        found &= k + stride - 1 >= t.clamp(min=grid.q_start) - grid.left
    if grid.right is not None:
        found &= k <= (t + stride).clamp(max=grid.q_stop) - 1 + grid.right
    return found
