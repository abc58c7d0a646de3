"""One rank's part of a tree: queries that all ranks have attend to the keys that it holds. No rank is asked for anything here."""

from __future__ import annotations

from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.call import Call, Held, Room
from dilcompile.lowering.distributed import meshes, plan
from dilcompile.lowering.distributed.plan import Sizes
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.lowering.distributed.step import Upstream, add, result, wide_dtype, with_results
from dilcompile.lowering.merge import merge_into
from dilcompile.placements.shards import Shards
from dilcompile.progression import Progression
from dilcompile.relation import Relation

# Nothing was there before.
_NOWHERE = Room()

Masks = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, spec: Spec, rank: int | None = None, room: Room = _NOWHERE
) -> tuple[Tensor, Tensor]:
    """Out and LSE over the keys of a rank, this one by default; into the results of the room, where there is one."""
    from dilcompile.lowering.select import select

    wide, results = wide_dtype(q), room.results or (None, None)
    out = result(results[0], q, int(v.shape[3]), wide).zero_()
    lse = (q.new_empty(q.shape[:3], dtype=wide) if results[1] is None else results[1]).fill_(-float("inf"))
    space = room.space()
    for _, call in calls(q, k, v, masks, spec, rank):
        with space.again():
            found = select(call, spec.kernel).forward(with_results(call, space, backward=False))
            merge_into(out, lse, *found, fresh=False, space=space)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, upstream: Upstream, spec: Spec, rank: int | None = None, room: Room = _NOWHERE
) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank adds to the gradient of q, and the gradients of its keys and values."""
    from dilcompile.lowering.select import select

    results = room.results or (None,) * 3
    grad_q, grad_k, grad_v = (
        result(into, x, int(x.shape[3]), wide_dtype(q)).zero_() for into, x in zip(results, (q, k, v), strict=True)
    )
    space = room.space()
    for places, call in calls(q, k, v, masks, spec, rank):
        kernel = select(call, spec.kernel, backward=True)
        with space.again():
            call = with_results(call, space, backward=True)
            found = kernel.backward(call, upstream.out, upstream.lse, upstream.grad_out, upstream.grad_lse)
            for total, grad in zip((grad_q, grad_k[:, :, places], grad_v[:, :, places]), found[:3], strict=True):
                add(total, grad, space)
    return grad_q, grad_k, grad_v


def shards_of(k: Tensor, spec: Spec) -> Shards:
    """Who holds which key."""
    ranks = meshes.size_of(spec.axis)
    length = ranks * int(k.shape[2]) if spec.length is None else spec.length
    shards = Shards(length, ranks, spec.order)
    if shards.places != k.shape[2]:
        raise PlacementError(
            f"{spec.site}: {length} tokens over {ranks} ranks ({spec.order}) are {shards.places} places a rank, but k and v have "
            f"{k.shape[2]}; cut and pad them with dilcompile.distributed.shard_inputs"
        )
    return shards


def calls(q: Tensor, k: Tensor, v: Tensor, masks: Masks, spec: Spec, rank: int | None) -> list[tuple[slice, Call]]:
    """The attention of the queries to each run of a rank's keys, with its places."""
    key_padding, documents, row_limits, dropout_seed = masks
    shards = shards_of(k, spec)
    relation = _relation(q, v, shards, spec)
    first = relation.problem.q_offset
    queries = Progression(first, first + int(q.shape[2]))
    found = []
    for run in shards.runs(meshes.rank_of(spec.axis) if rank is None else rank):
        places = slice(run.place, run.place + len(run.positions))
        call = Call(
            q, k[:, :, places], v[:, :, places], key_padding, documents, None, dropout_seed, relation, spec.scale, spec.softcap,
            spec.dropout_p, row_limits=row_limits, held=Held(queries, run.positions),
        )  # fmt: skip
        found.append((places, call))
    return found


def _relation(q: Tensor, v: Tensor, shards: Shards, spec: Spec) -> Relation:
    """The relation of the queries to the whole sequence."""
    rows = int(q.shape[2])
    offset = shards.length - rows if spec.q_offset is None else spec.q_offset
    sizes = Sizes(int(q.shape[0]), shards.places, int(q.shape[3]), int(v.shape[3]), shards.ranks)
    relation = plan.whole_relation(spec, sizes, shards.length, rows, offset)
    reason = plan.refusal(spec, relation, sizes)
    if reason is None and (offset < 0 or offset + rows > shards.length):
        reason = f"queries at positions {offset} to {offset + rows} of {shards.length} tokens; give a q_offset inside"
    if reason is not None:
        raise PlacementError(f"{spec.site}: placement 'tree' can't be had: {reason}")
    return relation
