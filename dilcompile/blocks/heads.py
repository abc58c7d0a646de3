"""Query heads that have blocks of their own: parts of a pattern dealt to heads, and a pattern seen from some of its heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dilcompile.blocks.composed import AllOf, AnyOf, PerHead
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.patterns import Pattern
from dilcompile.errors import FormError
from dilcompile.progression import Positions


@dataclass(frozen=True)
class HeadsFrom:
    """A pattern whose head 0 is head ``first`` of another."""

    pattern: Pattern
    first: int
    by_head = True

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        return self.pattern.contains(h + self.first, i, j, grid)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        return self.pattern.codes(h + self.first, rows, grid)


def from_head(pattern: Pattern, first: int) -> Pattern:
    """The pattern as the query heads from ``first`` on have it, which are counted from 0 then."""
    if first == 0 or not pattern.by_head:
        return pattern
    if isinstance(pattern, (AnyOf, AllOf)):
        return replace(pattern, parts=tuple(from_head(part, first) for part in pattern.parts))
    return HeadsFrom(pattern, first)


def dealt(pattern: Pattern, heads: int) -> Pattern:
    """The pattern with parts per head dealt to so many query heads.

    Raises:
        FormError: if they are not as many, or no equal groups.
    """
    if isinstance(pattern, (AnyOf, AllOf, PerHead)):
        pattern = replace(pattern, parts=tuple(dealt(part, heads) for part in pattern.parts))
    if not isinstance(pattern, PerHead):
        return pattern
    parts = len(pattern.parts)
    if pattern.share == 0 and heads % parts:
        raise FormError(f"pattern `groups` has {parts} patterns, and {heads} query heads make no {parts} groups of equal size")
    if pattern.share == 1 and heads != parts:
        raise FormError(
            f"pattern `heads` has {parts} patterns, one for each query head, but there are {heads} query heads; `groups` gives "
            "neighbouring heads one"
        )
    return replace(pattern, share=pattern.share or heads // parts)


def in_turns(pattern: Pattern, heads: int) -> Pattern:
    """The pattern for another number of query heads, to which the parts per head are dealt in turns, one each."""
    if not isinstance(pattern, (AnyOf, AllOf, PerHead)):
        return pattern
    parts = tuple(in_turns(part, heads) for part in pattern.parts)
    if isinstance(pattern, PerHead):
        return PerHead(tuple(parts[head % len(parts)] for head in range(heads)))
    return replace(pattern, parts=parts)


def most_parts(pattern: Pattern) -> int | None:
    """How many patterns per head there are at most, or None if there are none of them."""
    if not isinstance(pattern, (AnyOf, AllOf, PerHead)):
        return None
    found = [most for part in pattern.parts if (most := most_parts(part)) is not None]
    return max([*found, *([len(pattern.parts)] if isinstance(pattern, PerHead) else [])], default=None)


def kind_of_head(pattern: Pattern, head: int) -> object:
    """What distinguishes query heads: those of equal kinds have equal blocks."""
    if not pattern.by_head:
        return None
    if isinstance(pattern, (AnyOf, AllOf)):
        return tuple(kind_of_head(part, head) for part in pattern.parts)
    if isinstance(pattern, PerHead):
        part = pattern.parts[head // pattern.share]
        return part, kind_of_head(part, head)
    return kind_of_head(pattern.pattern, head + pattern.first) if isinstance(pattern, HeadsFrom) else head


def alike_in_heads(pattern: Pattern) -> Pattern:
    """Blocks that every head has: the whole pattern where heads don't differ, or those parts of a union in which they don't."""
    if not pattern.by_head:
        return pattern
    return AnyOf(tuple(part for part in pattern.parts if not part.by_head) if isinstance(pattern, AnyOf) else ())
