"""The relation that one launch of a flash op computes: every key, or those in a band around the query.

Note [window of an op]: flash ops count a window from the diagonal that ends in the last row and the last key. With R rows and
K keys row i sees the keys from ``i + K - R - left`` to ``i + K - R + right``; -1 stands for no limit. Ours stands at
``q_offset``, so keys that no row sees are cut off first, and what is left of the difference moves into the two numbers.

    3 rows at positions 2, 3, 4 of 7 keys, left 1, causal: keys 1 to 4 remain, and the band's diagonal ends in their corner
    keys      0 1 2 3 4 5 6
    row 0       x x
    row 1         x x
    row 2           x x
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dilcompile.generators import Everything, Window
from dilcompile.relation import Problem, Relation


@dataclass(frozen=True)
class Band:
    """What an op is told.

    Args:
        first, stop: the keys that it gets.
        left, right: its window, see Note [window of an op]; -1: no limit.
    """

    first: int
    stop: int
    left: int
    right: int

    @property
    def is_full(self) -> bool:
        """Every row sees every key that is left."""
        return self.left < 0 and self.right < 0

    @property
    def is_causal(self) -> bool:
        """The triangle that ends in the last row and the last key."""
        return self.left < 0 and self.right == 0


@lru_cache(maxsize=1024)
def band_of(relation: Relation) -> Band | str:
    """The band of a relation, or why it is none. In a band every row sees a key."""
    limits = limits_of(relation)
    return limits if isinstance(limits, str) else _cut(relation.problem, *limits)


def limits_of(relation: Relation) -> tuple[int | None, int | None] | str:
    """Limits on ``t - k`` and ``k - t`` of a relation of one term, or why it has more than these."""
    if len(relation.terms) != 1 or not isinstance(relation.terms[0].generator, Everything | Window):
        return f"the relation is {relation}, not every key or one window"
    generator, size = relation.terms[0].generator, relation.problem
    if isinstance(generator, Everything):
        return size.left, size.right
    if generator.step != 1:
        return f"of the window only every {generator.step}th key is seen"
    return _least(size.left, generator.left), _least(size.right, generator.right)


def _cut(size: Problem, left: int | None, right: int | None) -> Band | str:
    if size.q_len == 0 or size.k_len == 0:
        return f"{size.q_len} queries and {size.k_len} keys"
    if left is None and right is None:
        return Band(0, size.k_len, -1, -1)
    if (left is not None and left < 0) or (right is not None and right < 0):
        return "the window leaves out the query's own key"
    first = 0 if left is None else max(0, size.q_offset - left)
    stop = size.k_len if right is None else min(size.k_len, size.q_offset + size.q_len + right)
    if stop - first < size.q_len:
        return f"{size.q_len} queries from position {size.q_offset} on see only {max(0, stop - first)} keys"
    # How far the op's diagonal lies behind ours.
    ahead = stop - size.q_len - size.q_offset
    op_left = -1 if left is None else left + ahead
    op_right = -1 if right is None else right - ahead
    assert min(0 if left is None else op_left, 0 if right is None else op_right) >= 0, "the diagonal is in the window"
    return Band(first, stop, op_left, op_right)


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
