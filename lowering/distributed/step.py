"""The arithmetic of one step: a rank's queries attend to the keys that it has now. No rank is asked for anything here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilcompile.lowering.call import Call, Held, Kernel, Room, empty_output
from dilcompile.lowering.distributed import rows
from dilcompile.lowering.distributed.plan import Plan, Where
from dilcompile.lowering.merge import merge_into
from dilcompile.lowering.selection import select_blocks
from dilcompile.lowering.space import NOWHERE, Space
from dilcompile.placements.shards import Run
from dilcompile.progression import Progression
from dilcompile.relation import Problem

# Nothing was there before.
_NOWHERE = Room()


@dataclass(frozen=True)
class Operands:
    """What a rank holds of one attention.

    Args:
        q: [B, H, n, D]; k: [B, Hkv, n, D]; v: [B, Hkv, n, Dv]; the rank's places.
        key_padding: bool [B, length]; documents: int64 [B or 1, length]; of the whole sequence.
        row_limits: int64 [2, B or 1, n].
        dropout_seed: int64 with one element, the same on all ranks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None = None
    documents: Tensor | None = None
    row_limits: Tensor | None = None
    dropout_seed: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """See ``wide_dtype``."""
        return wide_dtype(self.q)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which steps are merged and gradients added: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def result(given: Tensor | None, like: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result [B, H, n, dim]: what is given, or as ``empty_output`` makes it."""
    return empty_output(like, dim, dtype) if given is None else given


def forward(
    plan: Plan,
    at: Where,
    number: int,
    given: Operands,
    received: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    room: Room = _NOWHERE,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of a step and merge with the steps before.

    Args:
        received: the flat message of this step.
        out, lse: of the steps before, [B, H, n, Dv] and [B, H, n] in ``wide``; None in the first.
        room: holds the results, and what is needed besides (``needs.py``).

    Returns:
        out and lse of all steps up to this; places without a token, and rows that saw no key: 0 and -inf.
    """
    before = None if out is None or lse is None else (out, lse)
    results = room.results or (None, None)
    out = result(results[0], given.q, int(given.v.shape[3]), given.wide)
    lse = given.q.new_empty(given.q.shape[:3], dtype=given.wide) if results[1] is None else results[1]
    if before is None:
        out.zero_()
        lse.fill_(-torch.inf)
    else:
        out.copy_(before[0])
        lse.copy_(before[1])
    space = room.space()
    for run, keys in meetings(plan, at, number, given.k, given.v, received, space):
        with space.again():
            call, index = _call(plan, at, given, run, keys.part, space)
            found = _kernel(plan, call, backward=False).forward(with_results(call, space, backward=False))
            merge_into(out[index], lse[index], *found, fresh=False, space=space)
    return out, lse


@dataclass(frozen=True)
class Upstream:
    """What a backward step starts from, all of it over all steps: out in q's dtype, lse and what comes from behind."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


def backward(
    plan: Plan, at: Where, number: int, given: Operands, received: Tensor | None, upstream: Upstream, room: Room = _NOWHERE
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What one step adds to the gradients, in ``wide``.

    A key's share of a row's softmax is made from the LSE of the whole row, so steps need nothing of one another.

    Args:
        room: holds the results, and what is needed besides (``needs.py``).

    Returns:
        gradients of q; of k and v where some rank attends to own keys in this step; and of the received rows, laid out as they.
    """
    wide, results = given.wide, room.results or (None,) * 4
    grad_q = result(results[0], given.q, int(given.q.shape[3]), wide).zero_()
    grad_k, grad_v, grad_received = None, None, None
    if plan.attends_own(number):
        grad_k, grad_v = (
            result(into, x, int(x.shape[3]), wide).zero_() for into, x in zip(results[1:3], (given.k, given.v), strict=True)
        )
    if received is not None:
        grad_received = (received.new_empty(received.shape, dtype=wide) if results[3] is None else results[3]).zero_()
    space = room.space()
    grads = meetings(plan, at, number, grad_k, grad_v, grad_received, space)
    for (run, keys), (_, into) in zip(meetings(plan, at, number, given.k, given.v, received, space), grads, strict=True):
        with space.again():
            call, index = _call(plan, at, given, run, keys.part, space)
            kernel = _kernel(plan, call, backward=True)
            lse = space.contiguous(upstream.lse[index])
            grad_lse = None if upstream.grad_lse is None else space.contiguous(upstream.grad_lse[index])
            call = with_results(call, space, backward=True)
            found = kernel.backward(call, upstream.out[index], lse, upstream.grad_out[index], grad_lse)
            for target, grad in zip((grad_q[index], into.part.k, into.part.v), found[:3], strict=True):
                add(target, grad, space)
        into.write_back()
    return grad_q, grad_k, grad_v, grad_received


def result_shapes(call: Call, backward: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what a kernel returns but the gradient of a bias, which no step has."""
    if backward:
        return [(tuple(x.shape), call.out_dtype) for x in (call.q, call.k, call.v)]
    rows = tuple(call.q.shape[:3])
    return [((*rows, call.v.shape[3]), call.out_dtype), (rows, call.score_dtype)]


def with_results(call: Call, space: Space, backward: bool) -> Call:
    """The call with memory for its results, and a workspace: what is left of the space. Itself where there is none."""
    if space.rest() is None:
        return call
    device = call.q.device
    results = tuple(
        space.heads_inside(shape, dtype, device) if len(shape) == 4 else space.take(shape, dtype, device)
        for shape, dtype in result_shapes(call, backward)
    )
    return replace(call, room=Room(results, space.rest()))


def add(total: Tensor, part: Tensor, space: Space) -> None:
    """Add what a kernel returned, which may be of a narrower dtype."""
    with space.again():
        total += part if part.dtype == total.dtype else space.like(part, total.dtype).copy_(part)


def _kernel(plan: Plan, call: Call, backward: bool) -> Kernel:
    from dilcompile.lowering.select import select

    return select(call, plan.spec.kernel, backward)


def meetings(
    plan: Plan, at: Where, number: int, k: Tensor | None, v: Tensor | None, received: Tensor | None, space: Space = NOWHERE
) -> Iterator[tuple[Run, rows.Stretch]]:
    """Each run of own rows with each stretch of the step's keys that some of its rows may see: the calls of the step.

    Rows that are received once, and so are few, are put together to stretches that go over several ranks, which lie in the space.
    """
    step, runs, sizes = plan.step(at, number), plan.runs(at), plan.sizes
    found: list[rows.Stretch] = []
    if k is not None and v is not None:
        found += map(rows.Stretch, rows.own(k, v, step.local, runs))
    if received is not None:
        came = rows.parts(received, step.receives, sizes.batch, sizes.head_dim, sizes.v_dim)
        found += map(rows.Stretch, came) if plan.resends else rows.stretches(came, space)
    for keys in found:
        for run in runs:
            if _may_meet(plan.relations[at.part].problem, run.positions, keys.part.positions):
                yield run, keys


def _may_meet(problem: Problem, queries: Progression, keys: Progression) -> bool:
    """Does the site's own mask let some pair through?"""
    first, last = queries.start, queries.positions()[-1]
    low, high = keys.start, keys.positions()[-1]
    near_enough = problem.left is None or first - high <= problem.left
    return near_enough and (problem.right is None or low - last <= problem.right)


def _call(
    plan: Plan, at: Where, given: Operands, run: Run, part: rows.Part, space: Space
) -> tuple[Call, tuple[slice, slice, slice]]:
    """``call_of``, with its blocks chosen where the data does that."""
    call, index = call_of(plan, at, given, run, part, space)
    chosen = select_blocks(call.relation, call.q, call.k, call.key_padding, call.scale, call.softcap)
    return replace(call, selection=chosen), index


def call_of(
    plan: Plan, at: Where, given: Operands, run: Run, part: rows.Part, space: Space = NOWHERE
) -> tuple[Call, tuple[slice, slice, slice]]:
    """The attention of the rows of a run to a part of the keys, and where those rows lie.

    Where that is the whole sequence, in order, every kernel can have it.
    """
    spec, group = plan.spec, plan.heads // plan.kv_heads
    heads = slice(part.kv_heads[0] * group, part.kv_heads[1] * group)
    places = slice(run.place, run.place + len(run.positions))
    index = (slice(None), heads, places)
    whole, first_head = Progression(0, plan.shards.length), at.part * plan.heads + heads.start
    alone = run.positions == part.positions == whole and not (first_head and spec.dropout_p)
    relation = plan.relation(at.part, part.kv_heads, len(run.positions))
    call = Call(
        given.q[index], part.k, part.v, given.key_padding, given.documents, None, given.dropout_seed,
        relation, spec.scale, spec.softcap, spec.dropout_p,
        row_limits=None if given.row_limits is None else space.contiguous(given.row_limits[:, :, places]),
        held=None if alone else Held(run.positions, part.positions, first_head),
    )  # fmt: skip
    return call, index
