"""What the operators of sharded attention need besides their results on the rank that needs most: bytes, before they run.

It is the same number on all ranks, so that a budget has one answer on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dilcompile.lowering import workspaces
from dilcompile.lowering.call import Call
from dilcompile.lowering.distributed import keys_shard, rows, step
from dilcompile.lowering.distributed.plan import Where, plan_of
from dilcompile.lowering.distributed.spec import parse_spec
from dilcompile.lowering.merge import merging_bytes
from dilcompile.lowering.selection import adaptive_blocks, unchosen
from dilcompile.lowering.space import bytes_of
from dilcompile.placements.shards import Run


def step_bytes(target: object, operands: Sequence[Any], share: float) -> int:
    """Of a call in a graph; 0 where it takes none.

    Args:
        target: the operator; operands: those of a call, by place; tensors may hold no data.
        share: see ``Kernel.workspace_bytes``.
    """
    ours = torch.ops.dilcompile
    if target is ours.attend_step.default:
        spec, number = operands[11:13]
        return _most_of_step(_alike(spec), number, _facts(operands[2:9], None, share), torch.get_num_threads())
    if target is ours.attend_step_backward.default:
        spec, number = operands[14:16]
        return _most_of_step(_alike(spec), number, _facts(operands[5:12], operands[:2], share), torch.get_num_threads())
    if target is ours.attend_shard.default:
        return _most_of_shard(_alike(operands[7]), _facts(operands[:7], None, share), torch.get_num_threads())
    if target is ours.attend_shard_backward.default:
        return _most_of_shard(_alike(operands[11]), _facts(operands[4:11], operands[:2], share), torch.get_num_threads())
    if target is ours.merge_parts.default:
        outs = operands[0]
        return merging_bytes(_sizes(outs)[1:4], int(outs.shape[4]), outs.dtype, outs.dtype)
    return 0


def _alike(text: str) -> str:
    """The spec without its site: layers that are alike need the same, which is worked out once."""
    return str(parse_spec(text).within(site=""))


@dataclass(frozen=True)
class _Facts:
    """What is known of the operands: (shape, dtype, device) of q, k, v and masks; is there a gradient of the LSE?"""

    given: tuple[tuple[tuple[int, ...], torch.dtype, str] | None, ...]
    backward: bool
    grad_lse: bool
    share: float

    def operands(self) -> step.Operands:
        """Tensors like them; without data in a mode of fake tensors."""
        made = [None if fact is None else torch.empty(fact[0], dtype=fact[1], device=fact[2]) for fact in self.given]
        return step.Operands(*made)  # type: ignore[arg-type]


def _facts(given: Sequence[Tensor | None], upstream: Sequence[Tensor | None] | None, share: float) -> _Facts:
    """upstream: the gradients of out and LSE; None: it is the forward."""
    return _Facts(tuple(map(_fact, given)), upstream is not None, upstream is not None and upstream[1] is not None, share)


def _fact(x: Tensor | None) -> tuple[tuple[int, ...], torch.dtype, str] | None:
    return None if x is None else (_sizes(x), x.dtype, str(x.device))


def _sizes(x: Tensor) -> tuple[int, ...]:
    return tuple(map(int, x.shape))


@dataclass(frozen=True)
class _Meeting:
    """What the need of one kernel call of a step depends on: how many positions, how far apart, and heads."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: int
    alone: bool


@lru_cache(maxsize=1024)
def _most_of_step(spec: str, number: int, facts: _Facts, threads: int) -> int:
    """threads: of other threads a kernel may need something else."""
    with unset_fake_temporarily():
        found, joined = _met(spec, number, facts)
        with FakeTensorMode():
            given = facts.operands()
            plan = plan_of(spec, given.k, given.v)
            calls = [
                step.call_of(plan, at, given, run, replace(keys, k=_like(keys.k, given.k), v=_like(keys.v, given.v)))[0]
                for at, run, keys in found.values()
            ]
            return joined + max((_of_call(call, plan.spec.kernel, facts) for call in calls), default=0)


def _met(spec: str, number: int, facts: _Facts) -> tuple[dict[_Meeting, tuple[Where, Run, rows.Part]], int]:
    """One of each kind of call that some rank makes in a step; and bytes of what is put together, on the rank with most."""
    _, (shape_k, dtype, _), (shape_v, _, _) = facts.given[:3]  # type: ignore[misc]
    k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in (shape_k, shape_v))
    plan = plan_of(spec, k, v)
    received = k.new_empty(plan.receives(number)) if plan.receives(number) else None
    dtypes = (dtype, step.wide_dtype(k)) if facts.backward else (dtype,)
    found: dict[_Meeting, tuple[Where, Run, rows.Part]] = {}
    most = 0
    for at in (Where(rank, part) for part, ranks in enumerate(plan.schedules) for rank in range(len(ranks))):
        joined = dict[int, int]()
        for run, keys in step.meetings(plan, at, number, k, v, received):
            part = keys.part
            queries, others = ((len(each), each.step) for each in (run.positions, part.positions))
            alone = run.positions == part.positions
            found.setdefault(_Meeting(queries, others, part.k.shape[1], alone), (at, run, part))
            if keys.pieces:
                joined[id(keys)] = bytes_of(*((x.shape, each) for each in dtypes for x in (part.k, part.v)))
        most = max(most, sum(joined.values()))
    return found, most


def _like(x: Tensor, device_of: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device_of.device)


def _of_call(call: Call, kernel: str | None, facts: _Facts) -> int:
    """Its results, what is made of the operands for it, and the more of the kernel's workspace and what adds the results up."""
    if adaptive_blocks(call.relation) is not None:
        call = replace(call, selection=unchosen(call.q))
    wide, by_row = call.score_dtype, tuple(call.q.shape[:3])
    held = step.result_shapes(call, facts.backward)
    if call.row_limits is not None:
        held.append((tuple(call.row_limits.shape), call.row_limits.dtype))
    if facts.backward:
        held += [(by_row, wide)] * (2 if facts.grad_lse else 1)
        adding = max(bytes_of((shape, wide)) for shape, dtype in held[:3]) if call.out_dtype != wide else 0
    else:
        adding = merging_bytes(by_row, int(call.v.shape[3]), call.out_dtype, wide)
    return bytes_of(*held) + max(adding, workspaces.of_call(call, kernel, facts.backward, facts.share, facts.grad_lse))


@lru_cache(maxsize=256)
def _most_of_shard(text: str, facts: _Facts, threads: int) -> int:
    spec = parse_spec(text)
    with unset_fake_temporarily(), FakeTensorMode():
        given = facts.operands()
        shards = keys_shard.shards_of(given.k, spec)
        masks = (given.key_padding, given.documents, given.row_limits, given.dropout_seed)
        found: dict[tuple[int, int], Call] = {}
        for rank in range(shards.ranks):
            for _, call in keys_shard.calls(given.q, given.k, given.v, masks, spec, rank):
                assert call.held is not None, "a rank has a part of the keys"
                found.setdefault((len(call.held.keys), call.held.keys.step), call)
        return max((_of_call(call, spec.kernel, facts) for call in found.values()), default=0)
