"""Starting the collectives of sharded attention: what is sent is packed, and results are made where there is no room for them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering.call import Room
from dilcompile.lowering.distributed import exchange as wire
from dilcompile.lowering.distributed import meshes, rows
from dilcompile.lowering.distributed.exchange import Errand
from dilcompile.lowering.distributed.plan import Plan, here, plan_of
from dilcompile.lowering.distributed.spec import parse_spec
from dilcompile.placements.schedule import Transfer


def exchange(room: Room, k: Tensor, v: Tensor, after: Tensor | None, spec: str, step: int, backward: bool) -> Tensor:
    """``ops.exchange``; the message lies in the room's workspace."""
    plan = plan_of(spec, k, v)
    own = plan.step(here(plan.spec), step)
    message = _message(room, k, plan.elements(own.rows_sent))
    rows.pack(message, k, v, own.sends, plan.runs(here(plan.spec)))
    out = _result(room, k, (plan.receives(step),))
    errand = Errand(plan.spec.site, f"step {step}, keys and values", "backward" if backward else "forward")
    wire.all_to_all(plan.spec.axis, out, message, _splits(plan, own.receives), _splits(plan, own.sends), errand)
    return out


def return_gradients(room: Room, grads: Tensor, k: Tensor, v: Tensor, spec: str, step: int) -> Tensor:
    """``ops.return_gradients``; with room for the result ``grads`` is sent as it lies, and must stay until the wait."""
    plan = plan_of(spec, k, v)
    own = plan.step(here(plan.spec), step)
    message = grads[: plan.elements(own.rows_received)]
    out = _result(room, grads, (plan.sends(step),))
    if not room.results:
        message = message.clone()
    errand = Errand(plan.spec.site, f"step {step}, gradients of keys and values", "backward")
    wire.all_to_all(plan.spec.axis, out, message, _splits(plan, own.sends), _splits(plan, own.receives), errand)
    return out


def gather(room: Room, x: Tensor, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """``ops.gather``; the message lies in the room's workspace."""
    message = _copied(room, x)
    out = _result(room, x, (meshes.size_of(axis), *x.shape))
    wire.all_gather(axis, out.view(-1), message, Errand(parse_spec(spec).site, what, "backward" if backward else "forward"))
    return out


def exchange_equal(room: Room, x: Tensor, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """``ops.exchange_equal``; the message lies in the room's workspace."""
    message = _copied(room, x)
    out = _result(room, x, x.shape)
    each = [message.numel() // x.shape[0]] * x.shape[0]
    errand = Errand(parse_spec(spec).site, what, "backward" if backward else "forward")
    wire.all_to_all(axis, out.view(-1), message, each, each, errand)
    return out


def _splits(plan: Plan, transfers: tuple[Transfer, ...]) -> list[int]:
    counts = {transfer.peer: plan.elements(transfer.count) for transfer in transfers}
    return [counts.get(rank, 0) for rank in range(plan.sizes.ranks)]


def _result(room: Room, like: Tensor, shape: Sequence[int]) -> Tensor:
    given = room.results[0] if room.results else None
    return like.new_empty(shape) if given is None else given


def _message(room: Room, like: Tensor, count: int) -> Tensor:
    """Flat room for so many numbers."""
    size = count * like.element_size()
    if room.workspace is None or room.workspace.numel() < size:
        return like.new_empty(count)
    return room.workspace[:size].view(like.dtype)


def _copied(room: Room, x: Tensor) -> Tensor:
    message = _message(room, x, x.numel())
    message.view(x.shape).copy_(x)
    return message


def message_bytes(target: object, operands: Sequence[Any]) -> Any:
    """Bytes that a collective packs for sending, on the rank that sends most: a number, or an expression over the lengths.

    0 where it takes none.

    Args:
        target: the operator.
        operands: those of a call in a graph, by place; tensors may hold no data.
    """
    ours = torch.ops._c10d_functional
    if target is ours.dilcompile_exchange.default:
        k, v, _, spec, step, _ = operands
        return plan_of(spec, k, v).sends(step) * k.element_size()
    if target in (ours.dilcompile_gather.default, ours.dilcompile_exchange_equal.default):
        x = operands[0]
        size = prod(side.node.expr if isinstance(side, torch.SymInt) else side for side in x.shape)
        return size * x.element_size()
    return 0
