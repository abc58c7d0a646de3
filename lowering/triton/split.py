"""Which calls are split over their keys (a decode step), and into how many parts. Nothing here imports Triton.

The tiles of the ordinary forward are its only parallelism. With one or a few query rows there are about as many of them as key
heads, too few for a device; the keys of a tile are then shared out to several programs.
"""

from __future__ import annotations

from dilcompile.lowering.triton.config import Tile
from dilcompile.lowering.triton.plan import Plan, most_keys
from dilcompile.relation import Problem, Relation

# Rows in a tile, and with how many query heads side by side rows are counted where a key head has more.
_MOST_ROWS = 64
_HEADS_COUNTED = 8
# With fewer keys the one program that walks them all is done as soon.
LEAST_KEYS = 256
# A part of fewer keys costs more to join than it saves.
_LEAST_KEYS_OF_PART = 128
_MOST_PARTS = 128


def is_decode(size: Problem) -> bool:
    """Whether the query rows of a key head are few and the keys many: 8 positions of any group, or 64 rows."""
    return size.q_len * min(size.group, _HEADS_COUNTED) <= _MOST_ROWS and size.k_len >= LEAST_KEYS


def packed(size: Problem) -> int:
    """Query heads side by side in a tile: all that share a key head, where they and the query rows fit."""
    fitting = (n for n in range(1, _MOST_ROWS + 1) if size.group % n == 0 and n * size.q_len <= _MOST_ROWS)
    return max(fitting, default=1)


def rows_of_tile(size: Problem, pack: int) -> int:
    """16, 32 or 64: the fewest that hold so many heads side by side at all query positions."""
    rows = pack * size.q_len
    return next((count for count in (16, 32) if rows <= count), _MOST_ROWS)


def parts_of(relation: Relation, plan: Plan, tile: Tile, wanted: int) -> int:
    """Into how many parts the keys of each tile are split, from the sizes alone.

    Args:
        wanted: programs that fill the device.
    """
    size = relation.problem
    programs = plan.queries.tiles.shape[1] * (size.heads // packed(size)) * size.batch
    keys = most_keys(relation, plan.counted) if plan.lists is None else plan.lists.most_positions
    most = keys // max(_LEAST_KEYS_OF_PART, tile.other)
    return max(1, min(-(-wanted // programs), most, _MOST_PARTS))


def most_parts(relation: Relation, wanted: int) -> int:
    """No call of these sizes is split into more parts, whatever its tiles are and wherever its queries stand."""
    size = relation.problem
    programs = max(1, size.heads // packed(size) * size.batch)
    # Of blocks the last one may stick out.
    keys = max(2, len(relation.terms)) * size.k_len
    return max(1, min(-(-wanted // programs), keys // _LEAST_KEYS_OF_PART, _MOST_PARTS))
