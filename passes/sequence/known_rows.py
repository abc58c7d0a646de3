"""What is known of a graph's inputs before it is looked at: which of their dims hold a rank's part of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from dilcompile.placements.marks import Mark
from dilcompile.site import Length


@dataclass(frozen=True)
class KnownRows:
    """What the last batch and earlier graphs tell.

    Args:
        inputs: what is known of inputs; of others nothing is.
        rows: how many tokens of a sequence a rank holds, by mesh axis.
    """

    inputs: Mapping[Node, Mark] = field(default_factory=dict)
    rows: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def axis_of_size(self, size: Length) -> str | None:
        """The mesh axis of which a rank holds so many tokens, or None. One token is not told from a dim of size 1."""
        held = size if isinstance(size, int) else size.node.hint
        return next((axis for axis, rows in self.rows.items() if held in rows and held != 1), None)

    def __bool__(self) -> bool:
        """Is it known of any sequence?"""
        return bool(self.rows) or any(mark.axes for mark in self.inputs.values())


NOTHING_KNOWN = KnownRows()
