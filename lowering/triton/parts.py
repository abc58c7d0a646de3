"""What the kernels know of a part of a sequence: where the rows of q and of k stand, as numbers. Nothing here imports Triton.

Rows of a part stand at ``start, start + step, ...``. A tile walks the positions of a residue class of a term that are also of the
part: again one progression, by the Chinese remainder theorem, whose one modular inverse a term is worked out here.
"""

from __future__ import annotations

from math import gcd, lcm

import torch
from torch import Tensor

from dilcompile.lowering.call import Held

# Of two progressions together: a block of positions this far apart must fit in 32 bits.
_LARGEST_STEP = 1 << 22
# Products of two numbers below it fit in 32 bits.
_LARGEST_OVER = 46340


def numbers_of(held: Held, rates: tuple[int, ...]) -> Tensor:
    """int32: first, stop and step of the keys, step of the queries, the first query head; then for each term divisor and inverse
    with the step of the keys, and those with that of the queries (``walk.met``)."""
    keys, queries = held.keys, held.queries
    found = [keys.start, keys.stop, keys.step, queries.step, held.first_head]
    for rate in rates:
        for step in (keys.step, queries.step):
            divisor, over = _split(rate, step)
            found += [divisor, pow(rate // divisor, -1, over) if over > 1 else 0]
    return torch.tensor(found, dtype=torch.int32, device="cpu")


def _split(rate: int, step: int) -> tuple[int, int]:
    divisor = gcd(rate, step)
    return divisor, step // divisor


def unwalkable(held: Held, rates: tuple[int, ...]) -> str | None:
    """Why rows of a part can't be walked in 32 bits, or None."""
    for step in (held.queries.step, held.keys.step):
        for rate in rates:
            if lcm(rate, step) > _LARGEST_STEP or _split(rate, step)[1] > _LARGEST_OVER:
                return f"rows {step} positions apart and a rate of {rate}: what both hold is too far apart for 32 bits"
    return None
