"""How the last batch was cut over a mesh axis, so that a site which takes its rows for others is refused, not wrong."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes
from dilcompile.lowering.distributed.meshes import Axis
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.placements.shards import Order


@dataclass(frozen=True)
class Cut:
    """What ``dilcompile.distributed.shard_inputs`` did.

    Args:
        order, heads_axis: as it was given.
        unmasked: places without a token are in the batch, and no mask says which.
    """

    order: Order
    heads_axis: str | None
    unmasked: bool


# mesh axis -> the last cut over it, and what the axis was then
_cuts: dict[str, tuple[Axis, Cut]] = {}


def note(axis: str, cut: Cut) -> None:
    """Remember it until the next one, or another mesh."""
    _cuts[axis] = meshes.axis_of(axis), cut


def check(spec: Spec, key_padding: Tensor | None) -> None:
    """See that a site takes the rows of its axis for what they are; nothing is known of rows that were cut by other means.

    Raises:
        PlacementError: with both readings.
    """
    at, cut = _cuts.get(spec.axis, (None, None))
    if cut is None or at is not meshes.axis_of(spec.axis):
        return
    if (cut.order, cut.heads_axis) != (spec.order, spec.heads_axis):
        raise PlacementError(
            f"{spec.site}: the batch was cut over mesh axis {spec.axis!r} with {_said(cut.order, cut.heads_axis)}, but this site "
            f"takes its rows for {_said(spec.order, spec.heads_axis)}; give shard_inputs and the policy (`layout` of the mesh "
            f"axis) the same"
        )
    sees_later = not spec.is_causal and spec.window_right != 0
    if cut.unmasked and sees_later and key_padding is None:
        raise PlacementError(
            f"{spec.site}: the batch was padded with is_causal=True, so that no mask hides the padding, but this site sees later "
            f"tokens; leave is_causal out of shard_inputs"
        )


def _said(order: str, heads_axis: str | None) -> str:
    return f"order {order!r}" + ("" if heads_axis is None else f" and heads_axis {heads_axis!r}")
