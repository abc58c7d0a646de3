"""Schedules as data: which rows each rank sends, receives and attends to, step by step. See ``Placement``.

A schedule moves keys and values only; queries, outputs and LSE stay where they are. It is the same arithmetic on every rank,
so that what one rank sends is what the other expects, without a message about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dilcompile.placements.rows import Rows
from dilcompile.placements.shards import Shards
from dilcompile.placements.volume import Volume
from dilcompile.relation import Relation


@dataclass(frozen=True)
class Transfer:
    """Rows to or from another rank, in the order in which they lie in the message: by entry of ``rows``, head, position."""

    peer: int
    rows: tuple[Rows, ...]

    @property
    def count(self) -> int:
        """Rows of one key head each."""
        return sum(part.count for part in self.rows)


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Args:
        sends: what this rank gives away so that others can take this step; peers ascend.
        receives: what must have come before this rank takes it; peers ascend.
        local: keys of the rank's own shard that its queries attend to in this step.

    The step attends to ``local`` and to everything received.
    """

    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    local: tuple[Rows, ...] = ()

    @property
    def rows_sent(self) -> int:
        """Rows of one key head each."""
        return sum(transfer.count for transfer in self.sends)

    @property
    def rows_received(self) -> int:
        """Rows of one key head each."""
        return sum(transfer.count for transfer in self.receives)

    @property
    def attended(self) -> tuple[Rows, ...]:
        """The keys that are attended to."""
        return (*self.local, *(rows for transfer in self.receives for rows in transfer.rows))


@dataclass(frozen=True)
class RankSchedule:
    """All steps of one rank; every rank has equally many. The transfers of step i + 1 travel while step i computes."""

    rank: int
    steps: tuple[Step, ...]

    @property
    def rows_sent(self) -> int:
        """Rows of one key head each."""
        return sum(step.rows_sent for step in self.steps)

    @property
    def rows_received(self) -> int:
        """Rows of one key head each."""
        return sum(step.rows_received for step in self.steps)


class Placement(Protocol):
    """A way to bring keys to queries. Modules of this folder satisfy it.

    ``RESENDS``: the backward receives the keys again, so that nothing but the rank's own shard is held between forward and
    backward; otherwise received rows are held. ``ONLY_NEEDED``: no row comes that no query of the rank reads.
    """

    __name__: str
    RESENDS: bool
    ONLY_NEEDED: bool

    def reject(self, relation: Relation, shards: Shards, documents: bool = False) -> str | None:
        """Why this placement can't be had, naming the limit and the cure, or None.

        Args:
            documents: the sequence is packed with documents, at each of which segments, blocks and sinks start anew.
        """

    def schedule(self, relation: Relation, shards: Shards, rank: int, documents: bool = False) -> RankSchedule:
        """The steps of a rank. Over its steps each key that its queries need is attended to exactly once.

        Args:
            relation: over the whole sequence: ``q_len == k_len == shards.length``, ``q_offset`` 0.
            documents: as for ``reject``, which has given no reason.
        """

    def volume(self, relation: Relation, shards: Shards, documents: bool = False) -> Volume:
        """How many rows the schedules of all ranks move."""
