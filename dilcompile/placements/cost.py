"""Predicted time of a placement: FLOPs of the busiest rank, bytes on the wire, and what of them is hidden behind computing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np
import torch

from dilcompile.placements.account import imbalance, pairs_by_rank, traffic
from dilcompile.placements.schedule import Placement
from dilcompile.placements.shards import Order, Shards
from dilcompile.placements.volume import held
from dilcompile.relation import Problem, Relation


@dataclass(frozen=True)
class Device:
    """What a rank computes and moves in a second.

    Args:
        flops: of attention in dtypes of 2 bytes, multiply and add counted as 2.
        bandwidth: bytes that a rank receives in a second, while it sends as many, from ranks of its node.
        network: the same from ranks of other nodes.
        latency: seconds that an exchange takes beside its bytes.
        node: ranks of a node.
        source: where the numbers come from.
    """

    flops: float
    bandwidth: float
    network: float
    latency: float
    node: int
    source: str

    def wire(self, ranks: int) -> float:
        """Bytes a second where so many ranks exchange: the slower link if there are several nodes."""
        return self.bandwidth if ranks <= self.node else self.network


_FA3 = "0.8 of the 740 TFLOP/s that FlashAttention-3 reaches (arXiv 2407.08608)"
_FA2 = "0.8 of the 230 TFLOP/s that FlashAttention-2 reaches (arXiv 2307.08691)"
# Not measured here, but for what sources say; give measured numbers where they are at hand.
DEVICES: dict[str, Device] = {
    "h100": Device(
        592e12, 450e9, 50e9, 20e-6, 8, f"{_FA3}; NVLink 4, 900 GB/s both ways (NVIDIA H100 datasheet); 400 Gb/s network"
    ),
    "h200": Device(592e12, 450e9, 50e9, 20e-6, 8, f"as h100: {_FA3}; NVLink 4 (NVIDIA H200 datasheet); 400 Gb/s network"),
    "a100": Device(
        184e12, 300e9, 25e9, 20e-6, 8, f"{_FA2}; NVLink 3, 600 GB/s both ways (NVIDIA A100 datasheet); 200 Gb/s network"
    ),
    "cpu": Device(1e11, 2e9, 1e9, 100e-6, 1, "assumed: a few cores, gloo over a 10 Gb/s network"),
}


def device_of(device: torch.device) -> Device:
    """The entry of ``DEVICES`` for a torch device; an unknown CUDA device is taken for an ``h100``."""
    if device.type != "cuda":
        return DEVICES["cpu"]
    name = torch.cuda.get_device_name(device).lower() if torch.cuda.is_available() else ""
    return next((held for key, held in DEVICES.items() if key in name), DEVICES["h100"])


@dataclass(frozen=True)
class Estimate:
    """One method over one order, of the rank that has the most of each: bytes, and seconds.

    Args:
        rows_received, rows_sent: of one key head each, in the forward.
        received, sent, received_backward, sent_backward: bytes.
        extra: bytes of others' keys and values at once.
        imbalance: work of the busiest rank over the mean.
        compute, wire: seconds of the forward for computing and for moving alone.
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
    compute: float
    wire: float
    seconds: float
    backward: float

    @property
    def hidden(self) -> bool:
        """Does most of the moving happen while the rank computes?"""
        return self.seconds - self.compute <= self.wire / 2


@lru_cache(maxsize=256)
def estimate(
    method: str, placement: Placement, relation: Relation, shards: Shards, device: Device, itemsize: int, documents: bool = False
) -> Estimate:
    """Of a placement that moves keys; ``itemsize``: bytes of a number of q, k and v.

    A step's work is taken to be in proportion to its rows; each step's rows travel while the step before computes.
    """
    size, volume = relation.problem, placement.volume(relation, shards, documents)
    moved, pairs = traffic(placement, relation, shards, itemsize, documents), pairs_by_rank(relation, shards)
    wire = device.wire(shards.ranks)
    forward, backward = _compute(size, int(pairs.max()), device, itemsize)
    row = moved.received.max() / max(1, moved.rows_received.max())
    most = np.maximum(volume.received, volume.sent).max(1)
    travel = [float(row * rows / wire + device.latency) if rows else 0.0 for rows in most] + [0.0]
    rows_of_step = volume.received.max(1) + np.append(held(size.kv_heads, shards).max(), np.zeros(moved.steps - 1))
    work = forward * rows_of_step / max(1, rows_of_step.sum())
    back = max(int(moved.received_backward.max()), int(moved.sent_backward.max())) / wire
    return Estimate(
        method=method,
        order=shards.order,
        steps=moved.steps,
        rows_received=int(moved.rows_received.max()),
        rows_sent=int(moved.rows_sent.max()),
        received=int(moved.received.max()),
        sent=int(moved.sent.max()),
        received_backward=int(moved.received_backward.max()),
        sent_backward=int(moved.sent_backward.max()),
        extra=int(moved.extra.max()),
        imbalance=imbalance(pairs),
        compute=forward,
        wire=sum(travel),
        seconds=sum(max(float(computed), after) for computed, after in zip(work, travel[1:], strict=True)),
        backward=max(backward, back) + (device.latency * moved.steps if back else 0.0),
    )


def ulysses_refuses(relation: Relation, shards: Shards) -> str | None:
    """Why heads can't be dealt to the ranks, or None."""
    heads = relation.problem.heads
    if shards.order != "contiguous":
        return f"ulysses puts runs of the sequence together, which {shards.order} shards are not"
    return f"{heads} query heads can't be dealt to {shards.ranks} ranks" if heads % shards.ranks else None


@lru_cache(maxsize=256)
def estimate_ulysses(relation: Relation, shards: Shards, device: Device, itemsize: int) -> Estimate:
    """Of heads for positions and back (arXiv 2309.14509): q, k, v before, the output behind; nothing is hidden.

    Key heads are repeated where ranks would else have no whole ones.
    """
    size, ranks = relation.problem, shards.ranks
    kv_heads = size.kv_heads * (size.group // gcd(size.group, size.heads // ranks))
    numbers = size.heads * (size.head_dim + size.v_dim) + kv_heads * (size.head_dim + size.v_dim)
    rows = shards.places * (ranks - 1) // ranks
    moved = size.batch * rows * numbers * itemsize
    pairs = relation.pairs_by_head().reshape(ranks, -1).sum(1)
    wire = device.wire(ranks)
    forward, backward = _compute(size, int(pairs.max()), device, itemsize)
    travel = moved / wire + 2 * device.latency if ranks > 1 else 0.0
    return Estimate(
        method="ulysses",
        order=shards.order,
        steps=1,
        rows_received=rows * kv_heads,
        rows_sent=rows * kv_heads,
        received=moved,
        sent=moved,
        # Gradients of the output come in the operands' dtype, those of q, k and v go back in it.
        received_backward=moved,
        sent_backward=moved,
        extra=moved,
        imbalance=imbalance(pairs),
        compute=forward,
        wire=travel,
        seconds=forward + travel,
        backward=backward + travel,
    )


def _compute(size: Problem, pairs: int, device: Device, itemsize: int) -> tuple[float, float]:
    """Seconds of so many pairs, forward and backward; see ``Relation.flops``."""
    rate = device.flops * 2 / max(2, itemsize)
    forward, backward = 2 * (size.head_dim + size.v_dim), 2 * (3 * size.head_dim + 2 * size.v_dim)
    return size.batch * pairs * forward / rate, size.batch * pairs * backward / rate
