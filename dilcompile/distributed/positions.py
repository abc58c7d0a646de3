"""Which positions of a sequence a rank holds, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes
from dilcompile.near import hint
from dilcompile.placements.shards import ORDERS, Order, Shards


def local_positions(
    length: int,
    *,
    axis: str = "cp",
    order: Order = "contiguous",
    heads_axis: str | None = None,
    rank: int | None = None,
    ranks: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The positions that this rank holds, int64 [n], in the order of its rows.

    All ranks hold equally many. Those from ``length`` on are padding: they hold no token, and stand behind all tokens::

        5 tokens over 2 ranks   contiguous  rank 0: 0 1 2   rank 1: 3 4 (5)
                                striped     rank 0: 0 2 4   rank 1: 1 3 (5)
                                zigzag      rank 0: 0 1 (6) (7)   rank 1: 2 3 4 (5)

    Args:
        length: tokens of the sequence, S.
        axis: the mesh axis over which the sequence is held, known by ``set_mesh``.
        order: ``contiguous``, ``zigzag`` or ``striped``, see ``dilcompile.placements.shards.Shards``.
        heads_axis: with method ``usp`` the other axis; its ranks hold slices of a shard of ``axis``.
        rank, ranks: this rank and how many there are, in place of the mesh; no process group is needed then.
        device: of the result.

    Raises:
        PlacementError: for an unknown axis or order, a length below 1, or a rank outside of its range.
    """
    if rank is None and ranks is None:
        shards = held(length, axis, order, heads_axis)
        return all_positions(shards, device)[ordinal(axis, heads_axis)]
    if rank is None or ranks is None or heads_axis is not None:
        raise PlacementError("give rank and ranks together and no heads_axis, or neither to take them from the mesh")
    if not 0 <= rank < ranks:
        raise PlacementError(f"rank {rank} is not among {ranks} ranks; they are numbered from 0")
    return all_positions(_checked(length, ranks, order, 1), device)[rank]


def held(length: int, axis: str, order: Order, heads_axis: str | None) -> Shards:
    """How the ranks of these mesh axes hold a sequence.

    Raises:
        PlacementError: for an unknown axis or order, or a length below 1.
    """
    return _checked(length, meshes.size_of(axis), order, meshes.size_of(heads_axis))


def ordinal(axis: str, heads_axis: str | None) -> int:
    """This rank's row of ``all_positions``."""
    return meshes.rank_of(axis) * meshes.size_of(heads_axis) + meshes.rank_of(heads_axis)


def _checked(length: int, ranks: int, order: Order, parts: int) -> Shards:
    if order not in ORDERS:
        raise PlacementError(f"order {order!r} is unknown{hint(order, ORDERS)}; the orders are {', '.join(ORDERS)}")
    if length < 1:
        raise PlacementError(f"a sequence has at least one token, got length {length}")
    # One rank holds all in any order, and needs no padding for it.
    return Shards(length, ranks, order if ranks * parts > 1 else "contiguous", parts)


def all_positions(shards: Shards, device: torch.device | str | None = None) -> Tensor:
    """What every rank holds, padding included: int64 [ranks * parts, n], all numbers below ``ranks * parts * n`` once."""
    ranks, places = shards.ranks, shards.places
    positions = torch.arange(ranks * places, device=device)
    if shards.order == "striped":
        positions = positions.view(places, ranks).T
    elif shards.order == "zigzag":
        pieces = positions.view(2, ranks, places // 2)
        positions = torch.cat([pieces[0], pieces[1].flip(0)], dim=1)
    return positions.reshape(ranks * shards.parts, places // shards.parts)
