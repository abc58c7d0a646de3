"""Which tensors hold a rank's part of a sequence, as far as it is known: those of the last batch, and what graphs returned.

Where torch.compile breaks a model into several graphs, only some hold a sharded attention to follow the sequence from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dilcompile.placements.shards import Order


@dataclass(frozen=True)
class Mark:
    """What is known of a tensor.

    Args:
        axes: by dim, the mesh axis over whose ranks the sequence along it is held; None: not known which dims are.
        counted: dims along which its numbers were counted from this rank's first row on.
    """

    axes: Mapping[int, str] | None
    counted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Waiting:
    """A graph that was compiled before it was known how many tokens a rank holds.

    Args:
        name: of the graph.
        wrong: what would be wrong in it, by the number of tokens.
    """

    name: str
    wrong: Mapping[int, tuple[str, ...]]


@dataclass
class Marks:
    """What is known in this process.

    Args:
        tensors: by identity, while they live.
        batch: by mesh axis, how many tokens of the last batch a rank holds, and in which order ranks hold them.
        best: by mesh axis, the order that was found to be fastest for a model.
        rows: how many tokens of a sequence the sharded sites of compiled graphs have had.
        waiting: graphs that are still to be checked.
    """

    tensors: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    batch: dict[str, tuple[int, Order]] = field(default_factory=dict)
    best: dict[str, Order] = field(default_factory=dict)
    rows: dict[str, frozenset[int]] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)

    def of(self, value: object) -> Mark | None:
        """What is known of a value."""
        found: Mark | None = self.tensors.get(value) if isinstance(value, torch.Tensor) else None  # type: ignore[no-untyped-call]
        return found

    def order_of(self, axis: str) -> Order | None:
        """The order of the last batch that was cut over a mesh axis; None without one."""
        return self.batch[axis][1] if axis in self.batch else None

    def note_batch(self, axis: str, rows: int, order: Order, tensors: Mapping[str, Any], along: Mapping[str, int]) -> None:
        """Remember a batch that was cut.

        Args:
            rows, order: tokens of a rank, and of which positions.
            tensors: the rank's shard of the batch.
            along: the dim of the sequence by name; what has none is left out.
        """
        self.batch[axis] = rows, order
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                self.tensors[tensor] = Mark({along[name] % tensor.dim(): axis} if name in along else {})

    def note_results(self, results: Sequence[Any], marks: Sequence[Mark | None]) -> None:
        """Remember what a graph returned."""
        for result, mark in zip(results, marks, strict=True):
            if mark is not None and isinstance(result, torch.Tensor):
                self.tensors[result] = mark

    def note_rows(self, axis: str, rows: int) -> None:
        """Remember how many tokens of a rank a sharded site has had."""
        self.rows[axis] = self.rows.get(axis, frozenset()) | {rows}

    def all_rows(self) -> dict[str, frozenset[int]]:
        """How many tokens a rank may hold, by mesh axis."""
        axes = dict.fromkeys((*self.batch, *self.rows))
        cut = {axis: {self.batch[axis][0]} if axis in self.batch else set() for axis in axes}
        return {axis: self.rows.get(axis, frozenset()) | cut[axis] for axis in axes}

    def apart(self) -> Marks:
        """The same for somebody who only looks: what is noted there is not noted here."""
        tensors = self.tensors.copy()  # type: ignore[no-untyped-call]
        return Marks(tensors, dict(self.batch), dict(self.best), dict(self.rows))

    def forget_graphs(self) -> None:
        """What compiled graphs told is no longer so."""
        self.rows.clear()
        self.waiting.clear()

    def forget(self) -> None:
        """There is another mesh."""
        self.forget_graphs()
        self.tensors.clear()
        self.batch.clear()
        self.best.clear()


MARKS = Marks()
