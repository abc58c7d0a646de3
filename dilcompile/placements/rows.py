"""Rows: positions under some key heads, what schedules move and attend to."""

from __future__ import annotations

from dataclasses import dataclass

from dilcompile.progression import Progression


@dataclass(frozen=True)
class Rows:
    """Positions under some key heads.

    Args:
        kv_heads: half-open range of key heads.
        positions: disjoint progressions, ascending by their first position.
    """

    kv_heads: tuple[int, int]
    positions: tuple[Progression, ...]

    @property
    def count(self) -> int:
        """Positions times key heads."""
        return (self.kv_heads[1] - self.kv_heads[0]) * sum(len(part) for part in self.positions)
