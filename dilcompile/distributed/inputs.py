"""The batch of one rank from that of all: cut, padded, with positions and labels of the whole sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dilcompile.distributed.order import order_found
from dilcompile.distributed.positions import all_positions, held, ordinal
from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import cuts, meshes
from dilcompile.near import hint
from dilcompile.placements.marks import MARKS
from dilcompile.placements.shards import Order

# Where the sequence lies in what Transformers calls by these names. Position ids may be [S], [B, S] or [3, B, S].
_DIMS = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "attention_mask": 1,
    "position_ids": -1,
    "labels": 1,
    "token_type_ids": 1,
    "loss_mask": 1,
}
# mesh axis -> the group that was seen to be given one batch
_compared: dict[str, Any] = {}


def shard_inputs(
    batch: Mapping[str, Any],
    *,
    axis: str = "cp",
    order: Order | Literal["auto"] = "contiguous",
    heads_axis: str | None = None,
    dims: Mapping[str, int | None] | None = None,
    shift_labels: bool = True,
    is_causal: bool = False,
    pad_token_id: int = 0,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """This rank's shard of a batch that all ranks of the axis have.

    A length that the ranks don't divide is padded at its end: every rank gets equally many rows n, and rows without a token stand
    behind all tokens. What the last batch was cut like is remembered, and a compiled attention that takes its rows for others is
    refused when it runs.

    Args:
        batch: tensors by the names that Transformers' models take: ``input_ids`` or in its place ``inputs_embeds`` [B, S, E],
            ``attention_mask``, ``labels``, ``position_ids``, ``token_type_ids``, ``loss_mask``, all [B, S]. What is no tensor, or
            holds one number, stays as it is.
        axis: the mesh axis over which the sequence is held, known by ``set_mesh``.
        order: which positions a rank holds, that of the policy: ``contiguous``, ``zigzag`` or ``striped``; ``auto``: that which
            ``best_order`` found last for this axis.
        heads_axis: with method ``usp`` the other mesh axis.
        dims: for other names the dim that the sequence lies along, padded with zeros, or None for what has none.
        shift_labels: the label of a token becomes the token that follows it, also where that is on another rank; the last one's
            is ``ignore_index``. False for models whose labels are of the token itself (masked language models, token classes).
        is_causal: no token of the model sees a later one, so that padding needs no mask. An attention that does is refused then.
        pad_token_id: the token at padded places.
        ignore_index: the label at padded places.

    Returns:
        the same names, cut, and ``position_ids`` int64 [B, n] of the whole sequence, so that rotary and learned positions are
        those of one rank. At padded places ``attention_mask`` is 0; where the batch has none it is made, if there are such places
        and the model is not causal. Take ``labels`` out for ``sharded_loss``: a model that is given them would shift them again.

    Raises:
        PlacementError: for an unknown axis, order or name, tensors of different lengths, a mask that is not [B, S], and, at the
            first batch of an axis, ranks that were given different tokens.
    """
    order = order_found(axis) if order == "auto" else order
    along = _along(batch, dims or {})
    length = _length(batch, along)
    shards = held(length, axis, order, heads_axis)
    for name in (axis, heads_axis):
        _compare_ranks(batch, name)
    tokens = batch[_tokens(batch)]
    mine = all_positions(shards, tokens.device)[ordinal(axis, heads_axis)]
    missing = shards.ranks * shards.places - length
    cut: dict[str, Any] = dict(batch)
    for name, dim in along.items():
        tensor = batch[name]
        if name == "labels" and shift_labels:
            tensor = torch.cat([tensor[:, 1:], tensor.new_full((len(tensor), 1), ignore_index)], dim=1)
        pad = {"input_ids": pad_token_id, "labels": ignore_index}.get(name, 0)
        cut[name] = _padded(name, tensor, dim, missing, pad).index_select(dim, mine.to(tensor.device))
    if "position_ids" not in along:
        cut["position_ids"] = mine.repeat(len(tokens), 1)
    if missing and not is_causal and "attention_mask" not in along:
        if "position_ids" in along:
            raise PlacementError(
                f"{length} tokens are padded to {length + missing}, which takes an attention_mask, but a model that is given one "
                f"may no longer see from position_ids where packed documents begin; say is_causal=True if no token sees a later "
                f"one, else give an attention_mask, or a length that is a multiple of {(length + missing) // len(mine)}"
            )
        cut["attention_mask"] = (mine < length).long().repeat(len(tokens), 1)
    if shards.ranks * shards.parts > 1:
        MARKS.note_batch(axis, len(mine), order, cut, {"position_ids": -1, "attention_mask": 1, **along})
    cuts.note(axis, cuts.Cut(order, heads_axis, bool(missing) and "attention_mask" not in cut))
    return cut


def _along(batch: Mapping[str, Any], dims: Mapping[str, int | None]) -> dict[str, int]:
    """The dim of the sequence, by name; what has none is left out."""
    known: dict[str, int | None] = {**_DIMS, **dims}
    for name in dims:
        if name not in batch:
            had = ", ".join(batch)
            raise PlacementError(f"dims names {name!r}{hint(name, batch)}, which the batch doesn't have; it has {had}")
    found = {}
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor) or (tensor.dim() == 0 and name not in _DIMS):
            continue
        if name not in known:
            raise PlacementError(
                f"batch[{name!r}] {list(tensor.shape)} is of no known name{hint(name, known)}; say where its sequence lies, as "
                f"in dims={{{name!r}: 1}}, or {{{name!r}: None}} if every rank needs all of it"
            )
        dim = known[name]
        if dim is None:
            continue
        if not -tensor.dim() <= dim < tensor.dim():
            raise PlacementError(f"batch[{name!r}] {list(tensor.shape)} has no dim {dim}; say where its sequence lies in dims")
        if name == "attention_mask" and tensor.dim() != 2:
            raise PlacementError(
                f"batch['attention_mask'] is {list(tensor.shape)}; a mask of pairs can't be cut by rows, give one [B, S]"
            )
        found[name] = dim
    return found


def _tokens(batch: Mapping[str, Any]) -> str:
    """The name of what the model is given a token."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            return name
    raise PlacementError(f"the batch has no input_ids [B, S] or inputs_embeds [B, S, E]; it has {', '.join(batch) or 'nothing'}")


def _length(batch: Mapping[str, Any], along: Mapping[str, int]) -> int:
    _tokens(batch)
    lengths = {name: int(batch[name].shape[dim]) for name, dim in along.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise PlacementError(f"the tensors of the batch are of different lengths: {said}; give every rank the whole sequence")
    return next(iter(lengths.values()))


def _padded(name: str, tensor: Tensor, dim: int, count: int, value: int) -> Tensor:
    """The tensor with ``count`` more places behind its last token."""
    if not count:
        return tensor
    if name == "position_ids":
        # Counted on, so that nobody takes it for another document.
        more = tensor.select(dim, -1).unsqueeze(dim) + torch.arange(1, count + 1, device=tensor.device)
    else:
        shape = list(tensor.shape)
        shape[dim] = count
        more = tensor.new_full(shape, value)
    return torch.cat([tensor, more], dim)


def _compare_ranks(batch: Mapping[str, Any], axis: str | None) -> None:
    """At the first batch of an axis: all ranks must have the same one. A loader that deals them out is not seen otherwise."""
    if axis is None:
        return
    at = meshes.axis_of(axis)
    if at.size == 1 or _compared.get(axis) is at.group:
        return
    exact = {name: x for name, x in batch.items() if isinstance(x, Tensor) and not x.is_floating_point()}
    own = {name: _digest(tensor) for name, tensor in exact.items()}
    all_given: list[Any] = [None] * at.size
    dist.all_gather_object(all_given, own, group=at.group)
    first = all_given[0]
    for rank, given in enumerate(all_given):
        for name in sorted({*given, *first}):
            if given.get(name) != first.get(name):
                raise PlacementError(
                    f"the ranks of mesh axis {axis!r} were given different batches: {name!r} is {first.get(name, 'missing')} on "
                    f"rank 0 of the axis, and {given.get(name, 'missing')} on rank {rank}; give all ranks of the axis the same "
                    f"batch (deal out batches over the data-parallel axis alone)"
                )
    _compared[axis] = at.group


def _digest(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} sha256 {hashlib.sha256(numbers.tobytes()).hexdigest()[:8]}"
