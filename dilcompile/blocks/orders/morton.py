"""Morton order (Z order): the bits of the coordinates, interleaved.

G. M. Morton, A computer oriented geodetic data base, IBM 1966.
"""

from __future__ import annotations

import numpy as np

from dilcompile.progression import Positions


def tokens(grid: tuple[int, ...]) -> Positions:
    """The token at each place of the curve, int64 [product of the grid].

        grid [4, 4]         along the curve                         the curve
        0  1  2  3          0 1 4 5  2 3 6 7                        0  1  4  5
        4  5  6  7          8 9 12 13  10 11 14 15                  2  3  6  7
        8  9  10 11                                                 8  9  12 13
        12 13 14 15         inverse: the picture on the right       10 11 14 15

    Where sizes are not powers of two, the places of the larger curve that lie outside of the grid are left out.
    """
    places = np.indices(grid, dtype=np.int64).reshape(len(grid), -1)
    code = np.zeros_like(places[0])
    for bit in range(max(grid).bit_length()):
        for axis, place in enumerate(places):
            code |= (place >> bit & 1) << (bit * len(grid) + len(grid) - 1 - axis)
    return np.argsort(code).astype(np.int64)
