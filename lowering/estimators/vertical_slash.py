"""Columns and diagonals that the last queries look at (MInference)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilcompile.blocks.grid import Grid
from dilcompile.lowering.estimators.operands import Operands, Rows, cut

_LAST = 64


def estimate(operands: Operands) -> Rows:
    """The weight that a block has if every query looks where the last 64 look: at the same keys, and at the same distances.

    MInference (arXiv 2407.02490, section 3.2, algorithm 2): exact weights of the last queries, summed by key (verticals) and by
    distance (slashes). There the best of each are united; here a block's score is the sum of both, its share of the columns and
    the mean weight of the diagonals that cross it, so that blocks of a row can be compared. For few queries, a decode step,
    these are their own exact weights.
    """
    grid, weights = operands.grid, _last_weights(operands)
    behind = grid.columns * grid.k_block - grid.k_len
    verticals = cut(pad(weights.sum(2), (0, behind)), 2, grid.k_block).sum(-1)
    # By block: sums over all of its pairs' distances, from sums of sums; float64, for they grow with the length.
    twice = pad(_by_distance(weights).double().cumsum(-1), (1, 0)).cumsum(-1)

    def rows(first: int, stop: int) -> Tensor:
        slashes = _of_blocks(twice, operands.rows(first, stop), grid)
        return (verticals[:, :, None] + slashes.to(verticals.dtype)).clamp(min=0).log()

    return rows


def _last_weights(operands: Operands) -> Tensor:
    """The exact softmax weights of the last queries, [B, H, queries, Sk]."""
    grid, device = operands.grid, operands.q.device
    q = operands.q[:, :, -_LAST:].to(operands.dtype)
    t = torch.arange(grid.q_stop - q.shape[2], grid.q_stop, device=device)[:, None]
    k = torch.arange(grid.k_len, device=device)
    seen = torch.ones(q.shape[2], grid.k_len, dtype=torch.bool, device=device)
    if grid.left is not None:
        seen &= k >= t - grid.left
    if grid.right is not None:
        seen &= k <= t + grid.right
    if operands.keep is not None:
        seen = seen & operands.keep[:, None, None, :]
    scores = operands.scores(operands.products(q, operands.k.to(operands.dtype)))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def _by_distance(weights: Tensor) -> Tensor:
    """Sums [B, H, n + Sk - 1] along the diagonals of [B, H, n, Sk]: entry c is that of pairs with t - k = last query - c.

    Made by a view of padded rows: sums by index would be in no fixed order on a device.

    [[a, b],   the last row first, each row one     c  d
     [c, d]]   entry further than the row before:      a  b    ->   c, d + a, b
    """
    count, keys = weights.shape[2:]
    spread = pad(weights.flip(2), (0, count)).flatten(2)[:, :, : count * (keys + count - 1)]
    return cut(spread, 2, keys + count - 1).sum(2)


def _of_blocks(twice: Tensor, rows: Tensor, grid: Grid) -> Tensor:
    """For each block of these rows the sum over its keys of the weight at a pair's distance, the mean over the row's queries:
    [B, H, rows, columns]."""
    columns, rows = torch.arange(grid.columns, device=rows.device), rows[:, None]
    begin = (rows * grid.q_block).clamp(min=grid.q_start)
    height = ((rows + 1) * grid.q_block).clamp(max=grid.q_stop) - begin
    last = twice.shape[-1] - 1
    # Entry c of the distances is t - k = q_stop - 1 - c, so that of a block's first query and first key is:
    place = grid.q_stop - 1 - begin + columns * grid.k_block

    def upto(c: Tensor) -> Tensor:
        """The sum over n <= c of the sums of entries before n; beyond the last entry each is the total."""
        inside = twice[..., c.clamp(min=0, max=last)]
        total = twice[..., last:] - twice[..., last - 1 : last]
        return inside + total[..., None] * (c - last).clamp(min=0)

    # Query a and key b of the block have entry place - a + b.
    def above(c: Tensor) -> Tensor:
        return upto(c + grid.k_block) - upto(c)

    return (above(place) - above(place - height)) / height
