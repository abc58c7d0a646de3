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

from dataclasses import dataclass, replace
from functools import lru_cache

from dilcompile.generators import Everything, Window
from dilcompile.progression import Progression
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
def band_of(relation: Relation, places: tuple[Progression, Progression] | None = None) -> Band | str:
    """The band of a relation, or why it is none. In a band every row sees a key.

    Args:
        places: where the rows of q and of k stand, if they are a part of their sequence.
    """
    limits = limits_of(relation)
    if isinstance(limits, str):
        return limits
    return _cut(relation.problem, *limits) if places is None else _cut_part(relation.problem, *places, *limits)


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


def _cut_part(size: Problem, queries: Progression, keys: Progression, left: int | None, right: int | None) -> Band | str:
    """The band in numbers of rows, where those of both sides are as far apart."""
    rows, columns = len(queries), len(keys)
    if rows > 1 and columns > 1 and queries.step != keys.step:
        return f"queries are {queries.step} positions apart and keys {keys.step}"
    step, ahead = max(queries.step, keys.step), queries.start - keys.start
    # Row i sees the keys j with i - j <= left and j - i <= right.
    left = None if left is None else (left - ahead) // step
    right = None if right is None else (right + ahead) // step
    left = None if left is None or left >= rows - 1 else left
    right = None if right is None or right >= columns - 1 else right
    # Where the first row would stand if its last key, or else its first, were its own.
    offset = right if right is not None else 0 if left is None else -left
    part = replace(size, q_len=rows, k_len=columns, q_offset=offset)
    return _cut(part, None if left is None else left + offset, None if right is None else right - offset)


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
