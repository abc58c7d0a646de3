"""In which order ranks should hold the tokens: found before the batch is cut, for all attentions of a model together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes
from dilcompile.placements.choose import OrderChoice
from dilcompile.placements.device import Device, device_of
from dilcompile.placements.marks import MARKS
from dilcompile.placements.shards import Order
from dilcompile.policy import Policy
from dilcompile.sharding_plan import plan


def best_order(
    model: Callable[..., Any],
    /,
    *args: Any,
    policy: str | os.PathLike[str] | dict[str, Any] | Policy | None = None,
    axis: str = "cp",
    heads_axis: str | None = None,
    length: int | None = None,
    device: Device | None = None,
    train: bool = True,
    **kwargs: Any,
) -> OrderChoice:
    """The order that is predicted to be fastest for all attentions of a model together, since tokens are held once.

    ``shard_inputs(order="auto")`` takes it afterwards, and a policy whose mesh axis has ``layout: auto`` takes the order that the
    batch was cut in. All ranks call it with the same model; none is asked for anything::

        choice = distributed.best_order(model, input_ids, policy=policy)
        print(choice)  # zigzag: 1.2 s for all sites against contiguous 1.9 s
        shard = distributed.shard_inputs(batch, order="auto")

    Args:
        model, args, kwargs: an example call of the whole sequence; it is looked at as by ``dilcompile.explain``.
        policy: as in the backend's options. Orders that it names itself don't count here.
        axis, heads_axis: the mesh axes, known by ``set_mesh``.
        length: tokens of the whole sequence, in place of the example's.
        device: what is predicted with; by default that of ``calibrate`` for the axis, else what is known of the model's device.
        train: backwards count, too.

    Returns:
        the order, the seconds of each that may be worth it, and why.

    Raises:
        PolicyError: for a policy that can't be read; PlacementError: for an unknown axis; DilcompileError: if the model has no
            attention.
    """
    loaded = Policy.load(policy)
    mesh = {name: meshes.size_of(name) for name in (axis, heads_axis) if name is not None}
    given = device or device_of(_device(model, args, kwargs), axis)
    found = plan(model, args, kwargs, loaded, mesh, given, length, None, train).orders
    MARKS.best[axis] = found.order
    return found


def _device(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    tensors: list[torch.Tensor] = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    tensors += [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def order_found(axis: str) -> Order:
    """What ``best_order`` found last.

    Raises:
        PlacementError: if it was not asked.
    """
    if axis not in MARKS.best:
        raise PlacementError(
            f"order 'auto' is the one that dilcompile.distributed.best_order has found for mesh axis {axis!r}, and it was not "
            f"asked; call it with the model and the policy first, or name an order"
        )
    return MARKS.best[axis]
