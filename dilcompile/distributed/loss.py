"""The loss of one rank that has the whole sequence, from shards of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes, ops
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.near import hint

Reduction = Literal["mean", "sum"]
Gradients = Literal["mean", "sum"]
Axes = str | Sequence[str]

_SPEC = str(Spec("", "", "", site="dilcompile.distributed.sharded_loss"))


def sharded_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    axis: Axes = "cp",
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    gradients: Gradients = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy over the tokens of all ranks: every rank gets the number that one rank with all tokens gets.

    The mean is over tokens, not over the means of ranks: ranks with few labels, or none, have the weight of their tokens.

    What a rank's ``backward`` gives is of its own rows. ``gradients`` says what is done with the ranks' gradients of a weight
    afterwards, so that the result is the gradient of one rank:

    - ``mean``: they are averaged over all ranks of ``axis``, as DDP and FSDP do. Each rank's is ranks times its share.
    - ``sum``: they are added, as an all-reduce of your own does. Each rank's is its share.

    Args:
        logits: [B, n, V] (or [..., V]), this rank's rows; float16 and bfloat16 are computed in float32.
        labels: int64 [B, n], those of ``shard_inputs``: already shifted.
        axis: the mesh axis over which the sequence is held; several, as ``("dp", "cp")``, for the mean over their tokens too.
            Name all that DDP or FSDP averages over: with ``"cp"`` alone each group of ``dp`` has a mean of its own, and those are
            averaged.
        reduction: ``mean`` or ``sum`` over the tokens that have a label.
        num_items_in_batch: with gradient accumulation, how many tokens all ranks and micro-batches of the step have: ``mean`` is
            divided by it. See ``count_tokens``.
        ignore_index: the label of rows that don't count.

    Returns:
        one number, float32 (float64 for float64), the same on all ranks; 0 where no rank has a label.

    Raises:
        PlacementError: for shapes that don't fit, an unknown axis or option; and where another rank stopped.
    """
    _check(logits, labels, reduction, gradients, num_items_in_batch)
    axes = _axes(axis)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    own = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=ignore_index)
    count = (labels != ignore_index).sum()
    # One message for both; float64 holds every count.
    total = _over_ranks(torch.stack([own.detach().double(), count.double()]), axes)
    if reduction == "sum":
        items = torch.ones_like(total[1])
    elif num_items_in_batch is None:
        items = total[1].clamp(min=1)
    else:
        items = torch.as_tensor(num_items_in_batch, dtype=total.dtype, device=total.device)
    ranks = 1
    for name in axes:
        ranks *= meshes.size_of(name)
    factor = (ranks if gradients == "mean" else 1) / items
    found: Tensor = _Shared.apply(own, (total[0] / items).to(own.dtype), factor.to(own.dtype))  # type: ignore[no-untyped-call]
    return found


def count_tokens(labels: Tensor | Sequence[Tensor], *, axis: Axes = "cp", ignore_index: int = -100) -> Tensor:
    """How many tokens of all ranks have a label: ``num_items_in_batch`` of one optimizer step.

    Args:
        labels: int64 [B, n] of ``shard_inputs``, or those of all micro-batches of the step.
        axis: as given to ``sharded_loss``.

    Returns:
        int64, one number, the same on all ranks.

    Raises:
        PlacementError: for an unknown axis; and where another rank stopped.
    """
    parts = [labels] if isinstance(labels, Tensor) else list(labels)
    if not parts:
        raise PlacementError("there are no labels to count; give those of at least one micro-batch")
    own = torch.stack([(part != ignore_index).sum() for part in parts]).sum()
    return _over_ranks(own, _axes(axis))


class _Shared(torch.autograd.Function):
    """A number that all ranks share, whose gradient goes to this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        """``value``."""
        ctx.save_for_backward(factor)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """``factor`` a unit of it."""
        (factor,) = ctx.saved_tensors
        return grad * factor, None, None


def _over_ranks(x: Tensor, axes: tuple[str, ...]) -> Tensor:
    """The sum over the ranks of these axes, added in the same order on all of them."""
    for name in axes:
        if meshes.size_of(name) > 1:
            x = wait(ops.gather(x, name, _SPEC, "sum of the losses", False)).sum(0)
    return x


def _axes(axis: Axes) -> tuple[str, ...]:
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    if len(set(names)) != len(names) or not names:
        raise PlacementError(f"axis names each mesh axis once, got {names}")
    return names


def _check(logits: Tensor, labels: Tensor, reduction: str, gradients: str, items: object) -> None:
    for name, given, known in (("reduction", reduction, get_args(Reduction)), ("gradients", gradients, get_args(Gradients))):
        if given not in known:
            raise PlacementError(f"{name} {given!r} is unknown{hint(given, known)}; it is {' or '.join(known)}")
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise PlacementError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} don't fit; give [B, n, V] and [B, n], this rank's rows"
        )
    if items is not None and reduction == "sum":
        raise PlacementError("num_items_in_batch divides the mean; leave it out with reduction='sum'")
