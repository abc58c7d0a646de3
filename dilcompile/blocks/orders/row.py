"""Row order: the last axis runs fastest, as models flatten their grids."""

from __future__ import annotations

from math import prod

import numpy as np

from dilcompile.progression import Positions


def tokens(grid: tuple[int, ...]) -> Positions:
    """The token at each place of the curve, int64 [product of the grid]: itself.

        grid [2, 4]         along the curve
        0 1 2 3             0 1 2 3 4 5 6 7
        4 5 6 7

    The inverse is the same.
    """
    return np.arange(prod(grid), dtype=np.int64)
