"""How many bytes the exchanges of sharded attention move, counted where they start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["forward", "backward"]


@dataclass
class Moved:
    """Bytes to and from other ranks; what a rank keeps for itself is not counted.

    Args:
        calls: exchanges in which this rank took part.
        sent, received: bytes.
    """

    calls: int = 0
    sent: int = 0
    received: int = 0

    def add(self, sent: int, received: int) -> None:
        """Count one exchange."""
        self.calls += 1
        self.sent += sent
        self.received += received


@dataclass
class Traffic:
    """What this process moved while it was counted.

    Args:
        by_site: for each (site, direction).
    """

    by_site: dict[tuple[str, Direction], Moved] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """Bytes sent in all."""
        return sum(each.sent for each in self.by_site.values())

    @property
    def received(self) -> int:
        """Bytes received in all."""
        return sum(each.received for each in self.by_site.values())

    @property
    def calls(self) -> int:
        """Exchanges in all."""
        return sum(each.calls for each in self.by_site.values())

    def of(self, direction: Direction) -> Moved:
        """The sum over sites in one direction."""
        total = Moved()
        for (_, which), each in self.by_site.items():
            if which == direction:
                total.calls, total.sent, total.received = (
                    total.calls + each.calls,
                    total.sent + each.sent,
                    total.received + each.received,
                )
        return total

    def __str__(self) -> str:
        lines = [
            f"{site} {direction}: {each.calls} exchanges, {each.sent:,} bytes sent, {each.received:,} received"
            for (site, direction), each in self.by_site.items()
        ]
        return "\n".join(lines) or "nothing moved"


_counting: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what sharded attention moves inside the ``with`` block, in this process.

    ``.sent``, ``.received`` and ``.calls`` are the totals, ``.of("backward")`` those of one direction, ``.by_site`` the details.
    Blocks may be nested; each counts all that happens in it.
    """
    counter = Traffic()
    _counting.append(counter)
    try:
        yield counter
    finally:
        # By identity: counters with equal numbers are equal.
        _counting[:] = [each for each in _counting if each is not counter]


def count(site: str, direction: Direction, sent: int, received: int) -> None:
    """Tell the open counters of one exchange."""
    for counter in _counting:
        counter.by_site.setdefault((site, direction), Moved()).add(sent, received)
