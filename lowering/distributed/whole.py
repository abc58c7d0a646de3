"""Small operands of the whole sequence from the ranks' shards of them: key padding, document numbers, limits of rows, seeds."""

from __future__ import annotations

import torch
from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes, ops, plan
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.lowering.distributed.spec import Spec, parse_spec
from dilcompile.placements.shards import Shards


def by_position(
    x: Tensor | None, shards: Shards, axis: str | None, heads_axis: str | None, spec: str, what: str
) -> Tensor | None:
    """[..., length] by position, from each rank's [..., places]; what is of the whole sequence already stays."""
    if x is None:
        return None
    held, own = x.shape[-1], shards.places // shards.parts
    if held == shards.length and (held != own or shards.ranks * shards.parts == 1):
        return x
    if held != own:
        raise PlacementError(f"{what} has {held} columns; give the rank's own {own}, or those of all {shards.length} tokens")
    # Not every transport moves truth values.
    moved = x.to(torch.uint8) if x.dtype == torch.bool else x
    if heads_axis is not None and shards.parts > 1:
        moved = _gathered(moved, heads_axis, spec, what).movedim(0, -2).flatten(-2)
    if axis is not None and shards.ranks > 1:
        moved = ordered(_gathered(moved, axis, spec, what), shards)
    return moved[..., : shards.length].to(x.dtype)


def ordered(x: Tensor, shards: Shards) -> Tensor:
    """[ranks, ..., places], the shards of all ranks, as [..., ranks * places] by position; padded places are last."""
    if shards.order == "contiguous":
        return x.movedim(0, -2).flatten(-2)
    if shards.order == "striped":
        return x.movedim(0, -1).flatten(-2)
    first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return torch.cat([first, second.flip(0)]).movedim(0, -2).flatten(-2)


def of_ranks(x: Tensor | None, spec: Spec, length: int, what: str) -> Tensor | None:
    """``by_position`` for a site."""
    if x is None:
        return None
    keys_axis, heads_axis = plan.keys_axis(spec), plan.heads_axis(spec)
    shards = plan.cut_of(spec, length, meshes.size_of(keys_axis), meshes.size_of(heads_axis))
    if spec.placement == "ulysses":
        keys_axis, heads_axis = heads_axis, None
    return by_position(x, shards, keys_axis, heads_axis, str(spec), what)


def of_all_parts(x: Tensor, spec: Spec, what: str) -> Tensor:
    """[..., parts * n] from each part's [..., n], as the rows lie that heads were exchanged for."""
    axis = plan.heads_axis(spec)
    assert axis is not None, "heads are exchanged"
    gathered = _gathered(x, axis, str(spec), what)
    parts = int(gathered.shape[0])
    return ordered(gathered, Shards(parts * int(x.shape[-1]), parts, plan.order_of_parts(spec)))


def of_first(x: Tensor, axis: str, spec: str, what: str) -> Tensor:
    """What the first rank of an axis has."""
    return _gathered(x, axis, spec, what)[0]


def _gathered(x: Tensor, axis: str, spec: str, what: str) -> Tensor:
    return wait(ops.gather(x, axis, spec, what, False))


def whole_sequence(x: Tensor, spec: str) -> Tensor:
    """[..., length] by position, from each rank's [..., n] with one number a place; without gradients.

    Raises:
        PlacementError: if another rank is gone.
    """
    said = parse_spec(spec)
    keys_axis, heads_axis = plan.keys_axis(said), plan.heads_axis(said)
    ranks, parts = meshes.size_of(keys_axis), meshes.size_of(heads_axis)
    length = int(x.shape[-1]) * parts * ranks if said.length is None else said.length
    found = of_ranks(x, said, length, "positions")
    assert found is not None, "there was something to gather"
    return found
