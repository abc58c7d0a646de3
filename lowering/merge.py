"""The one place where partial attentions become one: out and LSE of disjoint key sets, merged in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, fresh: bool) -> None:
    """Merge a part into the accumulators, in place.

    Args:
        out: [..., R, Dv] float32 or float64 accumulator; lse: [..., R] of the same dtype.
        part: [..., R, Dv] of any float dtype; part_lse: [..., R], -inf for rows that the part has no key for.
        fresh: nothing has been written to these rows yet.

    The weight of the part is sigmoid(part_lse - lse); where both are -inf that is NaN and means 0.
    """
    if fresh:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(nan=0.0).to(out.dtype)[..., None]
    if part.dtype == out.dtype:
        out.lerp_(part, weight)
    else:
        # Copy by copy, so that never more than one of them is held in float32.
        for target, source, share in zip(out, part, weight, strict=True):
            target.lerp_(source.to(out.dtype), share)
    lse.copy_(torch.logaddexp(lse, part_lse))
