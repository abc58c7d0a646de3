"""All ranks in one process: schedules executed over lists of shards, by the arithmetic of real ranks, without a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.call import empty_output, form_of, output_scale
from dilcompile.lowering.distributed import heads, plan, rows, step
from dilcompile.lowering.distributed.plan import Plan, Sizes, Where
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.lowering.distributed.step import Operands, Upstream
from dilcompile.placements.parts import share_of
from dilcompile.placements.schedule import RankSchedule, Transfer
from dilcompile.placements.shards import Run

Masks = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Simulation:
    """What came of a simulated attention.

    Args:
        out: [B, H, S, Dv]; lse: [B, H, S]; differentiable.
        schedules: what each rank did; of the first part of the heads.
        sent: bytes that each rank sent in the forward pass to bring keys to queries.
    """

    out: Tensor
    lse: Tensor
    schedules: tuple[RankSchedule, ...]
    sent: tuple[int, ...]


def simulate(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, ranks: int, parts: int = 1, masks: Masks = (None, None, None, None)
) -> Simulation:
    """One sharded attention of a whole sequence.

    Args:
        q: [B, H, S, D]; k: [B, Hkv, S, D]; v: [B, Hkv, S, Dv]; the whole sequence.
        spec: its ``axis`` need not exist.
        ranks, parts: of the axis over which keys move and of that over which heads are exchanged.
        masks: key padding, documents, row limits and dropout seed, of the whole sequence.

    Raises:
        PlacementError: if the placement can't be had.
    """
    if spec.placement == "tree":
        raise PlacementError("a tree has no steps to simulate; take a placement that moves keys")
    length = int(q.shape[2])
    said = spec.within(heads=int(q.shape[1]), kv_heads=int(k.shape[1]), documents=masks[1] is not None, length=length)
    sizes = Sizes(int(q.shape[0]), plan.places_of(said, length, ranks, parts), int(q.shape[3]), int(v.shape[3]), ranks, parts)
    ready = plan.make_plan(str(said), sizes)
    out, lse = _Simulated.apply(q, k, v, *masks, str(said), sizes)  # type: ignore[no-untyped-call]
    factor = output_scale(form_of(said.form), length)
    width = q.element_size()
    sent = tuple(sum(ready.elements(part[rank].rows_sent) for part in ready.schedules) * width // parts for rank in range(ranks))
    return Simulation(out if factor == 1.0 else out * factor, lse, ready.schedules[0], sent)


class _Simulated(torch.autograd.Function):
    """Cut, steps of all ranks, and together again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Out and LSE of the whole sequence."""
        ready = plan.make_plan(rest[4], rest[5])
        given = _cut(ready, q, k, v, rest[:4])
        states: dict[Where, tuple[Tensor | None, Tensor | None]] = dict.fromkeys(given, (None, None))
        for number in range(ready.num_steps):
            came = _exchanged(ready, number, given)
            for at, operands in given.items():
                states[at] = step.forward(ready, at, number, operands, came[at], *states[at])
        out = empty_output(q, int(v.shape[3]))
        lse = q.new_empty(q.shape[:3], dtype=step.wide_dtype(q))
        _joined(ready, {at: state[0] for at, state in states.items()}, out)
        _joined(ready, {at: state[1] for at, state in states.items()}, lse)
        ctx.save_for_backward(q, k, v, out, lse, *rest[:4])
        ctx.ready = ready
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, *masks = ctx.saved_tensors
        ready: Plan = ctx.ready
        given = _cut(ready, q, k, v, tuple(masks))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        behind = {at: _upstream(ready, at, out, lse, grad_out, grad_lse) for at in given}
        grads = {at: tuple(x.new_zeros(x.shape, dtype=each.wide) for x in (each.q, each.k, each.v)) for at, each in given.items()}
        for number in range(ready.num_steps):
            came, back = _exchanged(ready, number, given), {}
            for at, operands in given.items():
                *found, back[at] = step.backward(ready, at, number, operands, came[at], behind[at])
                for into, part in zip(grads[at], found, strict=True):
                    if part is not None:
                        into += part
            _return(ready, number, back, grads)
        share = share_of(q.shape[1], k.shape[1], ready.sizes.parts)
        found = []
        for number, x in enumerate((q, k, v)):
            whole = x.new_zeros((x.shape[0], x.shape[1] * (share if number else 1), *x.shape[2:]), dtype=step.wide_dtype(q))
            _joined(ready, {at: each[number] for at, each in grads.items()}, whole)
            found.append((heads.sum_repeated(whole, share) if number else whole).to(x.dtype))
        return (*found, *[None] * 6)


def _ranks(ready: Plan) -> list[Where]:
    return [Where(rank, part) for part in range(ready.sizes.parts) for rank in range(ready.sizes.ranks)]


def _cut(ready: Plan, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> dict[Where, Operands]:
    """What each rank holds, its head slice in the order of its places."""
    parts = ready.sizes.parts
    share = share_of(q.shape[1], k.shape[1], parts)
    dealt = [x.chunk(parts, dim=1) for x in (q, heads.repeat(k, share), heads.repeat(v, share))]
    padding, documents, limits, seed = masks
    found = {}
    for at in _ranks(ready):
        runs = ready.runs(at)
        own_limits = None if limits is None else _own(limits, runs, ready.sizes.places, -1)
        own_q, own_k, own_v = (_own(x[at.part], runs, ready.sizes.places, 2) for x in dealt)
        found[at] = Operands(own_q, own_k, own_v, padding, documents, own_limits, seed)
    return found


def _own(x: Tensor, runs: tuple[Run, ...], places: int, dim: int) -> Tensor:
    """A rank's places of a whole sequence; places without a token are 0."""
    shape = list(x.shape)
    shape[dim] = places
    held = x.new_zeros(shape)
    for run in runs:
        part = run.positions
        index = torch.arange(part.start, part.stop, part.step, device=x.device)
        held.narrow(dim, run.place, len(part)).copy_(x.index_select(dim, index))
    return held


def _joined(ready: Plan, held: dict[Where, Any], whole: Tensor) -> None:
    """Write what the ranks hold, [B, heads of a part, places, ...], into [B, heads, S, ...]."""
    for at, x in held.items():
        into = whole.chunk(ready.sizes.parts, dim=1)[at.part]
        for run in ready.runs(at):
            part = run.positions
            into[:, :, part.start : part.positions()[-1] + 1 : part.step] = x[:, :, run.place : run.place + len(part)]


def _upstream(ready: Plan, at: Where, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Upstream:
    def own(x: Tensor) -> Tensor:
        return _own(x.chunk(ready.sizes.parts, dim=1)[at.part], ready.runs(at), ready.sizes.places, 2)

    return Upstream(own(out), own(lse), own(grad_out), None if grad_lse is None else own(grad_lse))


def _exchanged(ready: Plan, number: int, given: dict[Where, Operands]) -> dict[Where, Tensor | None]:
    """The message that each rank has received before a step."""
    sent = {}
    for at, held in given.items():
        transfers = ready.step(at, number).sends
        message = held.k.new_empty(sum(ready.elements(each.count) for each in transfers))
        rows.pack(message, held.k, held.v, transfers, ready.runs(at))
        sent[at] = _by_peer(ready, message, transfers)
    return {at: _message(ready.step(at, number).receives, sent, at) for at in given}


def _by_peer(ready: Plan, message: Tensor, transfers: tuple[Transfer, ...]) -> dict[int, Tensor]:
    pieces = torch.split(message, [ready.elements(each.count) for each in transfers])
    return {each.peer: piece for each, piece in zip(transfers, pieces, strict=True)}


def _message(transfers: tuple[Transfer, ...], sent: dict[Where, dict[int, Tensor]], at: Where) -> Tensor | None:
    pieces = [sent[Where(each.peer, at.part)][at.rank] for each in transfers]
    return torch.cat(pieces) if pieces else None


def _return(ready: Plan, number: int, back: dict[Where, Any], grads: dict[Where, Any]) -> None:
    """Add the gradients of received rows at their owners."""
    pieces = {at: _by_peer(ready, x, ready.step(at, number).receives) for at, x in back.items() if x is not None}
    for at, (_, grad_k, grad_v) in grads.items():
        transfers = ready.step(at, number).sends
        message = _message(transfers, pieces, at)
        if message is not None:
            rows.add(message, grad_k, grad_v, transfers, ready.runs(at))
