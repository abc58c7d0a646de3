"""What a decision says of one site's placement: who holds the sequence, and how keys come to queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from dilcompile.placements.shards import Order

Method = Literal["gather_needed", "halo", "ring", "all_gather", "ulysses", "usp", "tree"]
METHODS: tuple[Method, ...] = get_args(Method)
Overlap = Literal["prefetch", "off"]


@dataclass(frozen=True)
class PlacementChoice:
    """One site's placement.

    Args:
        axis: the mesh axis whose ranks hold the sequence; for ``usp`` the one over which keys move.
        ranks: of that axis.
        method: how keys come to queries.
        order: which positions each rank holds, see ``Shards``.
        overlap: ``prefetch``: rows of the next step travel while this one computes; ``off``: after it.
        heads_axis: for ``usp`` the mesh axis over which heads are exchanged.
        heads_ranks: of that axis; 1 without one.
        moving: for ``usp`` how keys move over ``axis``.
        why: why this method, in words.
    """

    axis: str
    ranks: int
    method: Method
    order: Order = "contiguous"
    overlap: Overlap = "prefetch"
    heads_axis: str | None = None
    heads_ranks: int = 1
    moving: str | None = None
    why: str = field(default="", compare=False)

    @property
    def axes(self) -> dict[str, int]:
        """Ranks by mesh axis, outermost first."""
        own = {self.axis: self.ranks}
        return own if self.heads_axis is None else {**own, self.heads_axis: self.heads_ranks}

    def __str__(self) -> str:
        axes = " x ".join(f"{name}={ranks}" for name, ranks in self.axes.items())
        method = self.method if self.moving is None else f"{self.method} with {self.moving}"
        return f"{method} over {axes}, {self.order}, {self.overlap}"
