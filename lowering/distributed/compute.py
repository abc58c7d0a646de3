"""What the operators of sharded attention compute on one rank, into the results of a room where it has some.

Operands and results are those of the operators, see ``ops.py``. Collectives are in ``start.py``.
"""

from __future__ import annotations

from torch import Tensor

from dilcompile.lowering.call import Room
from dilcompile.lowering.distributed import cuts, keys_shard, rows
from dilcompile.lowering.distributed import step as _step
from dilcompile.lowering.distributed.plan import here, plan_of
from dilcompile.lowering.distributed.spec import parse_spec
from dilcompile.lowering.distributed.step import Operands, Upstream, result
from dilcompile.lowering.merge import merge_into


def step(
    room: Room,
    out: Tensor | None,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    received: Tensor | None,
    started: Tensor | None,
    spec: str,
    step: int,
) -> tuple[Tensor, Tensor]:
    """``ops.attend_step``."""
    plan = plan_of(spec, k, v)
    cuts.check(plan.spec, key_padding)
    given = Operands(q, k, v, key_padding, documents, row_limits, dropout_seed)
    return _step.forward(plan, here(plan.spec), step, given, received, out, lse, room)


def step_backward(
    room: Room,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    returning: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    received: Tensor | None,
    started: Tensor | None,
    spec: str,
    step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ops.attend_step_backward``."""
    plan = plan_of(spec, k, v)
    given = Operands(q, k, v, key_padding, documents, row_limits, dropout_seed)
    found = _step.backward(plan, here(plan.spec), step, given, received, Upstream(out, lse, grad_out, grad_lse), room)
    grad_k, grad_v, grad_received = (q.new_empty(0, dtype=given.wide) if x is None else x for x in found[1:])
    return found[0], grad_k, grad_v, grad_received


def sums(room: Room, grad_k: Tensor, grad_v: Tensor, returned: Tensor, spec: str, step: int) -> tuple[Tensor, Tensor]:
    """``ops.add_returned``."""
    plan = plan_of(spec, grad_k, grad_v)
    at = here(plan.spec)
    results = room.results or (None, None)
    sum_k, sum_v = (result(into, x, x.shape[3], x.dtype).copy_(x) for into, x in zip(results, (grad_k, grad_v), strict=True))
    rows.add(returned, sum_k, sum_v, plan.step(at, step).sends, plan.runs(at))
    return sum_k, sum_v


def shard(
    room: Room,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """``ops.attend_shard``."""
    masks = (key_padding, documents, row_limits, dropout_seed)
    return keys_shard.forward(q, k, v, masks, parse_spec(spec), room=room)


def shard_backward(
    room: Room,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.attend_shard_backward``."""
    masks = (key_padding, documents, row_limits, dropout_seed)
    return keys_shard.backward(q, k, v, masks, Upstream(out, lse, grad_out, grad_lse), parse_spec(spec), room=room)


def merge(room: Room, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.merge_parts``."""
    results = room.results or (None, None)
    out = result(results[0], outs[0], outs.shape[4], outs.dtype).copy_(outs[0])
    lse = lses[0].clone() if results[1] is None else results[1].copy_(lses[0])
    space = room.space()
    for part, part_lse in zip(outs[1:], lses[1:], strict=True):
        merge_into(out, lse, part, part_lse, fresh=False, space=space)
    return out, lse
