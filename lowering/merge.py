"""The one place where partial attentions become one: out and LSE of disjoint key sets, merged in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilcompile.lowering.space import NOWHERE, Space, bytes_of


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, fresh: bool, space: Space = NOWHERE) -> None:
    """Merge a part into the accumulators, in place.

    Args:
        out: [..., R, Dv] float32 or float64 accumulator; lse: [..., R] of the same dtype.
        part: [..., R, Dv] of any float dtype; part_lse: [..., R], -inf for rows that the part has no key for.
        fresh: nothing has been written to these rows yet.
        space: for what is needed meanwhile, see ``merging_bytes``.

    The weight of the part is sigmoid(part_lse - lse); where both are -inf that is NaN and means 0.
    """
    if fresh:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    with space.again():
        by_row = space.like(lse)
        weight = torch.sub(part_lse, lse, out=by_row).sigmoid_().nan_to_num_(nan=0.0)[..., None]
        if part.dtype == out.dtype:
            out.lerp_(part, weight)
        else:
            # Copy by copy, so that never more than one of them is held in float32.
            for target, source, share in zip(out, part, weight, strict=True):
                with space.again():
                    target.lerp_(space.like(source, out.dtype).copy_(source), share)
        lse.copy_(torch.logaddexp(lse, part_lse, out=by_row))


def merging_bytes(rows: Sequence[int], dim: int, of: torch.dtype, into: torch.dtype) -> int:
    """What ``merge_into`` takes for parts [*rows, dim] of a dtype."""
    copied = [((*rows[1:], dim), into)] if of != into else []
    return bytes_of((rows, into), *copied)
