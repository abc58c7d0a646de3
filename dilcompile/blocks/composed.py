"""Patterns made of patterns: the blocks of any, of all, or of one for each head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.patterns import Pattern, everywhere, joined
from dilcompile.progression import Positions


@dataclass(frozen=True)
class AnyOf:
    """The blocks of any part."""

    parts: tuple[Pattern, ...]

    @property
    def by_head(self) -> bool:
        """See ``Pattern``."""
        return any(part.by_head for part in self.parts)

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        return reduce(torch.logical_or, (part.contains(h, i, j, grid) for part in self.parts))

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        return joined([part.codes(h, rows, grid) for part in self.parts])


@dataclass(frozen=True)
class AllOf:
    """The blocks of all parts."""

    parts: tuple[Pattern, ...]

    @property
    def by_head(self) -> bool:
        """See ``Pattern``."""
        return any(part.by_head for part in self.parts)

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        return reduce(torch.logical_and, (part.contains(h, i, j, grid) for part in self.parts))

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        found = [part.codes(h, rows, grid) for part in self.parts]
        return reduce(lambda one, other: np.intersect1d(one, other, assume_unique=True), found)


@dataclass(frozen=True)
class PerHead:
    """One part for each query head, or for each group of neighbouring query heads.

    Args:
        share: query heads that share a part; 0: as many as make the parts enough, which ``dealt`` says once the heads are known.
    """

    parts: tuple[Pattern, ...]
    share: int = 1
    by_head = True

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        found = everywhere(torch.zeros_like(h, dtype=torch.bool), i, j)
        number = torch.div(h, self.share, rounding_mode="floor")
        for at, part in enumerate(self.parts):
            found = found | ((number == at) & part.contains(h, i, j, grid))
        return found

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        return self.parts[h // self.share].codes(h, rows, grid)
