"""Estimators: how much softmax weight each block of queries and keys holds, guessed from far fewer products than there are pairs.

An estimator takes the operands and gives a function of half-open ranges of block rows, which returns the logarithm of the
estimated weight, float [B, H, rows, columns], up to a constant in each row. What lies outside of a block's reach is the caller's
to hide. Every shape comes from sizes alone and no number is read back, so nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable

from dilcompile.lowering.estimators import antidiagonal, pooled, vertical_slash
from dilcompile.lowering.estimators.operands import Operands, Rows

# Their names are also `ESTIMATORS` in blocks/adaptive.py, which patterns are checked by.
ESTIMATORS: dict[str, Callable[[Operands], Rows]] = {
    "pooled": pooled.estimate,
    "antidiagonal": antidiagonal.estimate,
    "vertical_slash": vertical_slash.estimate,
}
