"""The whole tensor from its shards, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilcompile.distributed.positions import all_positions, held
from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes, ops
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.lowering.distributed.step import wide_dtype
from dilcompile.placements.shards import Order, Shards

_SPEC = str(Spec("", "", "", site="dilcompile.distributed.unshard"))


def unshard(
    tensor: Tensor,
    *,
    axis: str = "cp",
    dim: int = 1,
    length: int | None = None,
    order: Order = "contiguous",
    heads_axis: str | None = None,
) -> Tensor:
    """The whole tensor from the shards of all ranks, in the order of positions; every rank gets all of it.

    Its gradient is that of the sum of all ranks' losses: what a rank gets back for its shard is the sum of what all ranks have
    for those rows. Where all ranks compute the same loss from the result, that is ranks times the gradient, which DDP and FSDP
    average out.

    Args:
        tensor: [..., n, ...], any dtype; gradients for floating point.
        axis, order, heads_axis: as given to ``shard_inputs``.
        dim: that of the sequence.
        length: tokens of the whole sequence, S; rows of padding are left out. By default ranks times n, padding included.

    Returns:
        [..., S, ...].

    Raises:
        PlacementError: for an unknown axis or order, or a length that these shards are not of; and where another rank stopped.
    """
    if not -tensor.dim() <= dim < tensor.dim():
        raise PlacementError(f"tensor {list(tensor.shape)} has no dim {dim}; say which one is the sequence")
    dim %= tensor.dim()
    rows = int(tensor.shape[dim])
    ranks, parts = meshes.size_of(axis), meshes.size_of(heads_axis)
    length = ranks * parts * rows if length is None else length
    shards = held(length, axis, order, heads_axis)
    if shards.places != rows * parts:
        raise PlacementError(
            f"{length} tokens over {ranks * parts} ranks ({order}) are {shards.places // parts} rows a rank, but the tensor has "
            f"{rows} along dim {dim}; give the length and order that shard_inputs had"
        )
    if ranks * parts == 1:
        return tensor.narrow(dim, 0, length)
    found: Tensor = _Whole.apply(tensor, dim, axis, heads_axis, shards.length, order)  # type: ignore[no-untyped-call]
    return found


class _Whole(torch.autograd.Function):
    """Gather; the gradient goes back to the owners of the rows and is summed there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: str, heads_axis: str | None, length: int, order: Order) -> Tensor:
        """[..., length, ...]."""
        ctx.given = dim, axis, heads_axis, length, order
        shards = held(length, axis, order, heads_axis)
        # Not every transport moves truth values.
        moved = x.to(torch.uint8) if x.dtype == torch.bool else x
        if heads_axis is not None and shards.parts > 1:
            moved = _gathered(moved, heads_axis)
        if shards.ranks > 1:
            moved = _gathered(moved, axis)
        moved = moved.reshape(shards.ranks * shards.parts, *x.shape).movedim(0, dim).flatten(dim, dim + 1)
        if order != "contiguous":
            moved = moved.index_select(dim, all_positions(shards, x.device).flatten().argsort())
        return moved.narrow(dim, 0, length).to(x.dtype).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """[..., n, ...]."""
        dim, axis, heads_axis, length, order = ctx.given
        shards = held(length, axis, order, heads_axis)
        dealt = _dealt(grad, dim, shards)
        if shards.ranks > 1:
            dealt = _summed(dealt, axis)
        else:
            dealt = dealt[0]
        dealt = _summed(dealt, heads_axis) if shards.parts > 1 else dealt[0]
        return dealt.to(grad.dtype), *[None] * 5


def _dealt(grad: Tensor, dim: int, shards: Shards) -> Tensor:
    """The rows of every rank: [ranks, parts, ..., n, ...]."""
    shape = list(grad.shape)
    shape[dim] = shards.ranks * shards.places - shards.length
    padded = torch.cat([grad, grad.new_zeros(shape)], dim) if shape[dim] else grad
    if shards.order != "contiguous":
        padded = padded.index_select(dim, all_positions(shards, grad.device).flatten())
    rows = shards.places // shards.parts
    cut = padded.reshape(*padded.shape[:dim], shards.ranks, shards.parts, rows, *padded.shape[dim + 1 :])
    return cut.movedim((dim, dim + 1), (0, 1))


def _gathered(x: Tensor, axis: str) -> Tensor:
    return wait(ops.gather(x, axis, _SPEC, "shards", False))


def _summed(x: Tensor, axis: str) -> Tensor:
    """What the ranks have for this one, of [ranks, ...], added up in the wide dtype."""
    return wait(ops.exchange_equal(x, axis, _SPEC, "gradients of the shards", True)).sum(0, dtype=wide_dtype(x))
