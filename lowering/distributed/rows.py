"""Rows of keys and values in messages: where each lies, and how it gets there and back.

A message holds the entries of its transfers one after the other. An entry is the keys of its heads and positions,
[B, heads, positions, D], and behind them the values, [B, heads, positions, Dv].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dilcompile.lowering.space import Space
from dilcompile.placements.rows import Rows
from dilcompile.placements.schedule import Transfer
from dilcompile.placements.shards import Run
from dilcompile.position_sets import meet
from dilcompile.progression import Progression


@dataclass(frozen=True)
class Part:
    """Keys of one progression of positions under some key heads.

    Args:
        kv_heads: half-open range.
        k: [B, heads, positions, D]; v: [B, heads, positions, Dv]; views.
    """

    kv_heads: tuple[int, int]
    positions: Progression
    k: Tensor
    v: Tensor


def placed(runs: Sequence[Run], part: Progression) -> list[tuple[slice, slice]]:
    """Where positions lie in a rank's memory: (which of them, their places), one pair for each run that holds some."""
    found = []
    for run in runs:
        common = meet(part, run.positions)
        if len(common):
            which = _stretch(common, part, 0)
            found.append((which, _stretch(common, run.positions, run.place)))
    return found


def _stretch(common: Progression, of: Progression, first: int) -> slice:
    """The indices that positions have among others, counted from ``first``."""
    start, step = first + (common.start - of.start) // of.step, common.step // of.step
    return slice(start, start + (len(common) - 1) * step + 1, step)


def own(k: Tensor, v: Tensor, entries: Sequence[Rows], runs: Sequence[Run]) -> Iterator[Part]:
    """Rows of a rank's own shard, as views of k [B, Hkv, n, D] and v [B, Hkv, n, Dv]."""
    for rows in entries:
        heads = slice(*rows.kv_heads)
        for positions in rows.positions:
            for which, places in placed(runs, positions):
                step = positions.step * which.step
                first = positions.start + positions.step * which.start
                held = Progression(first, first + step * len(range(which.start, which.stop, which.step)), step)
                yield Part(rows.kv_heads, held, k[:, heads, places], v[:, heads, places])


def parts(message: Tensor, transfers: Sequence[Transfer], batch: int, head_dim: int, v_dim: int) -> Iterator[Part]:
    """What a flat message holds, as views of it."""
    at = 0
    for transfer in transfers:
        for rows in transfer.rows:
            heads = rows.kv_heads[1] - rows.kv_heads[0]
            count = sum(map(len, rows.positions))
            middle = at + batch * heads * count * head_dim
            stop = middle + batch * heads * count * v_dim
            k = message[at:middle].view(batch, heads, count, head_dim)
            v = message[middle:stop].view(batch, heads, count, v_dim)
            at, first = stop, 0
            for positions in rows.positions:
                here = slice(first, first + len(positions))
                yield Part(rows.kv_heads, positions, k[:, :, here], v[:, :, here])
                first = here.stop


@dataclass(frozen=True)
class Stretch:
    """Parts of one class of positions that continue one another, as one part.

    Args:
        pieces: what it was copied from, and which of its rows those are; none where it is a view of a single one.
    """

    part: Part
    pieces: tuple[tuple[Part, slice], ...] = ()

    def write_back(self) -> None:
        """Copy its rows to what it was made of."""
        for piece, which in self.pieces:
            piece.k.copy_(self.part.k[:, :, which])
            piece.v.copy_(self.part.v[:, :, which])


def stretches(found: Iterable[Part], space: Space) -> list[Stretch]:
    """The parts with those put together, in the space, that continue one another, as one branch's keys do from rank to rank."""
    classes: dict[tuple[tuple[int, int], int, int], list[Part]] = {}
    for part in found:
        step = part.positions.step
        classes.setdefault((part.kv_heads, step, part.positions.start % step), []).append(part)
    made = []
    for parts_of_class in classes.values():
        chain: list[Part] = []
        for part in sorted(parts_of_class, key=lambda each: each.positions.start):
            if chain and part.positions.start != _behind(chain[-1].positions):
                made.append(_together(chain, space))
                chain = []
            chain.append(part)
        made.append(_together(chain, space))
    return made


def _behind(positions: Progression) -> int:
    return positions.positions()[-1] + positions.step


def _together(chain: list[Part], space: Space) -> Stretch:
    first, last = chain[0], chain[-1]
    if len(chain) == 1:
        return Stretch(first)
    positions = Progression(first.positions.start, _behind(last.positions), first.positions.step)
    k, v = (_joined(x, len(positions), space) for x in ([part.k for part in chain], [part.v for part in chain]))
    stops = list(accumulate(len(part.positions) for part in chain))
    which = (slice(stop - len(part.positions), stop) for part, stop in zip(chain, stops, strict=True))
    return Stretch(Part(first.kv_heads, positions, k, v), tuple(zip(chain, which, strict=True)))


def _joined(found: list[Tensor], count: int, space: Space) -> Tensor:
    """Rows of tensors one after the other."""
    batch, heads, _, dim = found[0].shape
    return torch.cat(found, 2, out=space.take((batch, heads, count, dim), found[0].dtype, found[0].device))


def pack(message: Tensor, k: Tensor, v: Tensor, transfers: Sequence[Transfer], runs: Sequence[Run]) -> None:
    """Write rows of a rank's own shard into a flat message."""
    for part in parts(message, transfers, k.shape[0], k.shape[3], v.shape[3]):
        heads = slice(*part.kv_heads)
        for which, places in placed(runs, part.positions):
            part.k[:, :, which] = k[:, heads, places]
            part.v[:, :, which] = v[:, heads, places]


def add(message: Tensor, k: Tensor, v: Tensor, transfers: Sequence[Transfer], runs: Sequence[Run]) -> None:
    """Add the rows of a flat message to those of a rank's own shard, in place."""
    for part in parts(message, transfers, k.shape[0], k.shape[3], v.shape[3]):
        heads = slice(*part.kv_heads)
        for which, places in placed(runs, part.positions):
            k[:, heads, places] += part.k[:, :, which]
            v[:, heads, places] += part.v[:, :, which]
