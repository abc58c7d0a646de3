"""Patterns that can be met at no length: known from the pattern alone, before there is a sequence."""

from __future__ import annotations

from itertools import pairwise
from math import lcm

from dilcompile.blocks.coverage import first_without_keys
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.heads import most_parts
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.spec import Spec, parts_of, pattern_of

# The options after whose least common multiple the blocks of a pattern repeat themselves; other numbers are places.
_PERIODS: dict[str, tuple[str, ...]] = {
    "local": (),
    "global": (),
    "strided": ("stride",),
    "dilated_sliding": ("dilation",),
    "fixed": ("stride",),
    "vertical_slash": (),
    "hierarchical": ("spans",),
    "explicit": (),
    "longformer": (),
}
_MOST_ROWS = 2048


def first_unmet(spec: Spec, sizes: tuple[int, int], causal: bool) -> int | None:
    """The first query that the pattern leaves without keys at every length that has it; None: there is none, or it is not known.

    Args:
        sizes: queries and keys in a block.
        causal: whether queries see no later keys.
    """
    found = _looked_at(spec, sizes, causal)
    return None if found is None else first_without_keys(*found)


def holds_nothing(spec: Spec, sizes: tuple[int, int], causal: bool) -> bool:
    """Whether the pattern surely has no block that any query sees, at any length. Arguments as in ``first_unmet``."""
    found = _looked_at(spec, sizes, causal)
    return found is not None and not len(found[0])


def listed_beyond(spec: Spec, rows: int, columns: int) -> tuple[int, int] | None:
    """The first (row, column) of a list of blocks that a grid of so many rows and columns doesn't have."""
    for name, given in parts_of(spec):
        options = dict(given)
        starts, listed = options.get("starts", ()), options.get("columns", ())
        if name != "explicit":
            continue
        for row, (start, stop) in enumerate(pairwise(starts)):
            wrong = [column for column in listed[start:stop] if row >= rows or column >= columns]
            if wrong:
                return row, min(wrong)
    return None


def _looked_at(spec: Spec, sizes: tuple[int, int], causal: bool) -> tuple[BlockLists, Grid] | None:
    """The blocks of so many rows and columns that what follows is repetition; None where that is too many, or not known."""
    periods, places = [1], [1]
    for name, given in parts_of(spec):
        options = dict(given)
        if name == "random" and not options["blocks"]:
            continue
        if name not in _PERIODS:
            return None
        held = {option: value if isinstance(value, tuple) else (value,) for option, value in options.items()}
        periods += [period for option in _PERIODS[name] for period in held.get(option, ())]
        places += [len(held.pop("starts", ())), *(place for option in held for place in held[option])]
        if name == "dilated_sliding":
            places.append(options["dilation"] * options["blocks"])
    if most_parts(pattern_of(spec)) is not None:
        return None
    # Blocks of other sizes than their neighbours' stand beside each other again after as many.
    rows = 2 * (max(places) + lcm(*periods) * lcm(*sizes) // min(sizes))
    if rows > _MOST_ROWS:
        return None
    grid = Grid(*sizes, 0, rows * sizes[0], rows * sizes[0], right=0 if causal else None)
    return lists_of(pattern_of(spec).codes(0, grid.rows, grid), grid), grid
