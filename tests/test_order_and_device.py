"""Orders that are found before the batch is cut, and devices that are measured, on real ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SdpaAttention
from policy_sites import site
from ranks import over_ranks

import dilcompile
from dilcompile import distributed
from dilcompile.decision import Decision, Rejection
from dilcompile.distributed import Device
from dilcompile.errors import DilcompileError, PlacementError
from dilcompile.placements import Shards, device
from dilcompile.placements.device import DEVICES
from dilcompile.policy import Policy, resolve
from dilcompile.site import MaskSpec

LENGTH = 24


def policy(ranks: int = 2, **shard: Any) -> dict[str, Any]:
    return {
        "mesh": {"cp": {"size": ranks, "layout": "auto"}},
        "rules": [{"apply": {"form": "keep"}, "shard": {"mesh": "cp", **shard}}],
    }


def both(rank: int, folder: str) -> dict[str, Any]:
    """One model: not yet cut, cut by the order that was found, cut otherwise; then a measured device."""
    torch.manual_seed(0)
    model, x, found = SdpaAttention().double(), torch.randn(2, LENGTH, 32, dtype=torch.float64), {}
    compiled = torch.compile(model, backend="dilated", options={"policy": policy(method="ring"), "inner": "eager"})
    with pytest.raises(PlacementError) as not_found:
        distributed.shard_inputs({"inputs_embeds": x}, order="auto")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as not_cut:
        compiled(x[:, :12])
    found["not found"], found["not cut"] = str(not_found.value), str(not_cut.value.inner_exception)
    # Long enough for computing to count.
    choice = distributed.best_order(model, x, policy=policy(method="ring"), length=1 << 16)
    found["choice"] = str(choice)
    shard = distributed.shard_inputs({"inputs_embeds": x}, order="auto")["inputs_embeds"]
    out = compiled(shard)
    runs = Shards(LENGTH, 2, choice.order).runs(rank)
    own = torch.cat([torch.tensor(run.positions.positions()) for run in runs])
    found["gap"] = (out - model(x)[:, own]).abs().max().item()
    found["device"] = asdict(distributed.calibrate(message=1 << 16, rows=64))
    # So slow that only the work counts.
    distributed.use_device(replace(DEVICES["cpu"], flops=1.0))
    for order in ("contiguous", "zigzag"):
        held = distributed.shard_inputs({"inputs_embeds": x}, order=order)["inputs_embeds"]  # type: ignore[arg-type]
        report = dilcompile.explain(model, held, policy=policy(method="ring"))
        found[order] = [note for note in report.notes if "predicted" in note]
    return found


def test_the_order_of_the_batch_is_taken_and_a_faster_one_is_told_of(tmp_path: Path) -> None:
    one, other = over_ranks({"cp": 2}, both, str(tmp_path), patience=400.0)
    for found in (one, other):
        assert "order 'auto' is the one that dilcompile.distributed.best_order has found" in found["not found"]
        assert "no batch was cut over mesh axis 'cp' yet; cut it with dilcompile.distributed.shard_inputs" in found["not cut"]
        assert found["choice"].startswith("zigzag: ")
        assert "against contiguous" in found["choice"]
        assert found["gap"] < 1e-12
        (note,) = found["contiguous"]
        assert "the tokens of the batch are held contiguous" in note
        assert "cut it with shard_inputs(order='zigzag')" in note
        assert found["zigzag"] == []
    # The slowest rank counts: all have the same numbers.
    assert one["device"] == other["device"]
    measured = Device(**one["device"])
    assert min(measured.flops, measured.bandwidth, measured.latency, measured.memory) > 0
    assert (measured.node, measured.network) == (2, measured.bandwidth)
    assert "measured over mesh axis cp (gloo, 2 ranks)" in measured.source


def test_a_device_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    DEVICES["h100"].save(path)
    assert Device.load(path) == DEVICES["h100"]
    for wrong, said in (
        ({"flops": 1}, "a device has exactly the keys flops, bandwidth"),
        ({**asdict(DEVICES["cpu"]), "latency": 0}, "latency must be a number above 0, got 0"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DilcompileError, match=said):
            Device.load(path)
    with pytest.raises(DilcompileError, match="no device can be read"):
        Device.load(tmp_path / "none.json")


def test_auto_goes_by_the_device_of_the_mesh_axis() -> None:
    made = policy(8, order="zigzag")
    methods = []
    try:
        for latency in (1e-9, 1.0):
            device.use(replace(DEVICES["cpu"], latency=latency, flops=1e15, bandwidth=1e9, network=1e9), "cp")
            (found,) = resolve(Policy.load(made), [site(mask=MaskSpec(causal=True), heads=9, kv_heads=3)], enforce=False)
            assert isinstance(found, Decision)
            assert found.placement is not None
            methods.append(found.placement.method)
    finally:
        device.forget()
    # One exchange where each costs a second.
    assert methods[1] in ("all_gather", "gather_needed")


def test_an_order_that_nothing_tells_is_refused() -> None:
    (found,) = resolve(Policy.load(policy()), [site()], enforce=False)
    assert isinstance(found, Rejection)
    assert "the order of its tokens is auto, and no batch was cut over mesh axis 'cp' yet" in found.reason
    assert "dilcompile.distributed.best_order" in found.cure
