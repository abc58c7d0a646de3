"""Predicted time of a placement: FLOPs of the busiest rank, bytes on the wire, what of them is hidden, and what is packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dilcompile.placements import PLACEMENTS
from dilcompile.placements.account import heads_traffic, imbalance, pairs_by_rank, traffic, tree_traffic
from dilcompile.placements.device import Device
from dilcompile.placements.parts import by_part
from dilcompile.placements.shards import Order, Shards
from dilcompile.placements.volume import held
from dilcompile.position_sets import disjoint, meet
from dilcompile.progression import Positions, Progression
from dilcompile.relation import Problem, Relation


@dataclass(frozen=True)
class Estimate:
    """One method over one order, of the rank that has the most of each: bytes, and seconds.

    Args:
        moving: for ``usp`` what moves keys over the first axis.
        rows_received, rows_sent: of one key head each, in the forward; for ``tree`` of one query head.
        received, sent, received_backward, sent_backward: bytes.
        extra: bytes of others' keys and values at once; for ``tree`` of others' results.
        imbalance: work of the busiest rank over the mean.
        calls: of a kernel, in the forward, at most; the backward has as many.
        compute, wire, packing: seconds of the forward for computing with these calls, for moving alone, and for packing what is
            sent.
        seconds: of the forward; ``backward``: of the backward.
    """

    method: str
    order: Order
    steps: int
    rows_received: int
    rows_sent: int
    received: int
    sent: int
    received_backward: int
    sent_backward: int
    extra: int
    imbalance: float
    calls: int
    compute: float
    wire: float
    packing: float
    seconds: float
    backward: float
    moving: str | None = None

    @property
    def name(self) -> str:
        """The method, with what moves keys in it."""
        return self.method if self.moving is None else f"{self.method} with {self.moving}"

    @property
    def hidden(self) -> bool:
        """Does most of the moving happen while the rank computes?"""
        return self.seconds - self.compute - self.packing <= self.wire / 2


@lru_cache(maxsize=1024)
def estimate(
    name: str, relation: Relation, shards: Shards, device: Device, itemsize: int, documents: bool = False, prefetch: bool = True
) -> Estimate:
    """Of a placement that moves keys over the ranks of ``shards``; where those have parts, inside of ``usp``.

    A step's work is taken to be in proportion to its rows; each step's rows travel while the step before computes.

    Args:
        name: of ``PLACEMENTS``, which does not refuse the relation.
        itemsize: bytes of a number of q, k and v.
        prefetch: rows travel while a rank computes.
    """
    parts = shards.parts
    method, moving = (name, None) if parts == 1 else ("usp", name)
    return _estimate(
        method, moving, relation, shards, shards.places // parts, shards.order, device, itemsize, documents, prefetch
    )


@lru_cache(maxsize=1024)
def estimate_ulysses(relation: Relation, shards: Shards, device: Device, itemsize: int) -> Estimate:
    """Of heads for positions and back (arXiv 2309.14509): q, k, v before, the output behind; nothing is hidden.

    Key heads are repeated where ranks would else have no whole ones.
    """
    whole = Shards(shards.length, 1, "contiguous", shards.ranks)
    return _estimate("ulysses", None, relation, whole, shards.places, shards.order, device, itemsize, False, True)


def heads_refused(relation: Relation, parts: int) -> str | None:
    """Why heads can't be dealt to so many ranks, or None."""
    heads = relation.problem.heads
    return f"{heads} query heads can't be dealt to {parts} ranks" if heads % parts else None


def _estimate(
    method: str,
    moving: str | None,
    relation: Relation,
    shards: Shards,
    rows: int,
    order: Order,
    device: Device,
    itemsize: int,
    documents: bool,
    prefetch: bool,
) -> Estimate:
    """``rows``: places of one rank of both axes; ``order``: that in which ranks hold them."""
    size, parts, ranks = relation.problem, shards.parts, shards.ranks
    placement = PLACEMENTS["all_gather" if method == "ulysses" else moving or method]
    relations = by_part(relation, parts)
    volumes = [placement.volume(each, shards, documents) for each in relations] if ranks > 1 else []
    moved = [traffic(placement, each, shards, itemsize, documents) for each in relations] if ranks > 1 else []
    pairs = (
        relation.pairs_by_head().reshape(parts, -1).sum(1)
        if ranks == 1
        else np.stack([pairs_by_rank(each, shards) for each in relations])
    )
    dealt = heads_traffic(size, rows, parts, itemsize)
    most = {
        name: max((int(getattr(each, name).max()) for each in moved), default=0)
        for name in ("rows_received", "rows_sent", "received", "sent", "received_backward", "sent_backward", "extra")
    }
    forward, backward = _compute(size, int(pairs.max()), device, itemsize)
    steps = max((each.steps for each in moved), default=1)
    travel, work = _by_step(relations, shards, [(each.received, each.sent) for each in volumes], steps, device, itemsize)
    heads_wire = dealt.forward / device.wire(parts) + 2 * device.latency if parts > 1 else 0.0
    heads_back = dealt.backward / device.wire(parts) + 2 * device.latency if parts > 1 else 0.0
    packing, packing_back = 2 * (most["sent"] + dealt.packed) / device.memory, 2 * dealt.packed_backward / device.memory
    packing_back += 2 * (most["sent_backward"] + most["received_backward"]) / device.memory
    back = max(most["received_backward"], most["sent_backward"]) / device.wire(ranks * parts)
    calls = np.ones(steps, dtype=np.int64)
    for each in volumes:
        calls[: len(each.calls)] = np.maximum(calls[: len(each.calls)], each.calls.max(1))
    computing = forward * work + device.call * calls
    forward, backward = float(computing.sum()), backward + device.call * int(calls.sum())
    if prefetch:
        busy = sum(max(float(part), after) for part, after in zip(computing, travel[1:], strict=True))
        busy_back = max(backward, back)
    else:
        busy, busy_back = forward + sum(travel), backward + back
    return Estimate(
        method=method,
        order=order,
        steps=steps,
        rows_received=most["rows_received"] + dealt.rows,
        rows_sent=most["rows_sent"] + dealt.rows,
        received=most["received"] + dealt.forward,
        sent=most["sent"] + dealt.forward,
        received_backward=most["received_backward"] + dealt.backward,
        sent_backward=most["sent_backward"] + dealt.backward,
        extra=most["extra"] + dealt.forward,
        imbalance=imbalance(pairs),
        calls=int(calls.sum()),
        compute=forward,
        wire=sum(travel) + heads_wire,
        packing=packing,
        seconds=busy + heads_wire + packing,
        backward=busy_back + heads_back + packing_back + (device.latency * steps if back else 0.0),
        moving=moving,
    )


def _by_step(
    relations: tuple[Relation, ...],
    shards: Shards,
    volumes: list[tuple[Positions, Positions]],
    steps: int,
    device: Device,
    itemsize: int,
) -> tuple[list[float], Positions]:
    """Seconds that each step's rows travel, and a 0 behind the last; and each step's share of the work."""
    size = relations[0].problem
    row = size.batch * (size.head_dim + size.v_dim) * itemsize
    received, most = np.zeros(steps, dtype=np.int64), np.zeros(steps, dtype=np.int64)
    for came, sent in volumes:
        received[: len(came)] = np.maximum(received[: len(came)], came.max(1))
        most[: len(came)] = np.maximum(most[: len(came)], np.maximum(came, sent).max(1))
    wire = device.wire(shards.ranks * shards.parts)
    travel = [float(row * rows / wire + device.latency) if rows else 0.0 for rows in most] + [0.0]
    received[0] += held(size.kv_heads, shards).max()
    return travel, received / max(1, received.sum())


@lru_cache(maxsize=1024)
def estimate_tree(relation: Relation, shards: Shards, device: Device, itemsize: int) -> Estimate:
    """Of queries that all ranks have, each over its own keys, merged (arXiv 2408.04093); nothing is hidden."""
    size = relation.problem
    received, back = tree_traffic(size, shards.ranks, itemsize)
    pairs = _pairs_of_keys(relation, shards)
    forward, backward = (part + device.call for part in _compute(size, int(pairs.max()), device, itemsize))
    wire = received / device.wire(shards.ranks) + 2 * device.latency if shards.ranks > 1 else 0.0
    wire_back = back / device.wire(shards.ranks) + device.latency if shards.ranks > 1 else 0.0
    rows = (shards.ranks - 1) * size.q_len * size.heads
    return Estimate(
        "tree", shards.order, 1, rows, rows, received, received, back, back, received, imbalance(pairs), 1, forward, wire, 0.0,
        forward + wire, backward + wire_back,
    )  # fmt: skip


def _pairs_of_keys(relation: Relation, shards: Shards) -> Positions:
    """The pairs of the keys that each rank holds: all pairs, in proportion to the keys that are read."""
    size = relation.problem
    read = np.zeros(shards.ranks)
    queries = Progression(size.q_offset, size.q_offset + size.q_len)
    for heads in relation.alike_kv_heads():
        parts = disjoint(relation.keys_needed(queries, heads[0]))
        for rank in range(shards.ranks):
            runs = (run.positions for run in shards.runs(rank))
            read[rank] += len(heads) * sum(len(meet(part, run)) for run in runs for part in parts)
    found: Positions = np.ceil(relation.pairs() * read / max(1, read.sum())).astype(np.int64)
    return found


def _compute(size: Problem, pairs: int, device: Device, itemsize: int) -> tuple[float, float]:
    """Seconds of so many pairs, forward and backward; see ``Relation.flops``."""
    rate = device.flops * 2 / max(2, itemsize)
    forward, backward = 2 * (size.head_dim + size.v_dim), 2 * (3 * size.head_dim + 2 * size.v_dim)
    return size.batch * pairs * forward / rate, size.batch * pairs * backward / rate
