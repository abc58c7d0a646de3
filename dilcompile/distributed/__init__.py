"""Sequences that several ranks hold: attention over them, and what it moves. Start the ranks with ``torchrun``."""

from __future__ import annotations

from dilcompile.distributed.attention import attention
from dilcompile.distributed.calibrate import calibrate, use_device
from dilcompile.distributed.compression import TopKCompression
from dilcompile.distributed.gather import unshard
from dilcompile.distributed.inputs import shard_inputs
from dilcompile.distributed.loss import count_tokens, sharded_loss
from dilcompile.distributed.order import best_order
from dilcompile.distributed.positions import local_positions
from dilcompile.distributed.simulation import Simulation, simulate
from dilcompile.lowering.distributed.meshes import set_mesh
from dilcompile.lowering.distributed.traffic import Moved, Traffic, traffic
from dilcompile.placements.choose import OrderChoice
from dilcompile.placements.device import Device

__all__ = [
    "Device",
    "Moved",
    "OrderChoice",
    "Simulation",
    "TopKCompression",
    "Traffic",
    "attention",
    "best_order",
    "calibrate",
    "count_tokens",
    "local_positions",
    "set_mesh",
    "shard_inputs",
    "sharded_loss",
    "simulate",
    "traffic",
    "unshard",
    "use_device",
]
