"""Tiles of the Triton kernel found by a clock, with the kernel itself in Triton's interpreter. Run by ``test_triton`` in a process of its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock
from test_trust import call_of
from torch._subclasses.fake_tensor import FakeTensorMode

from dilcompile.errors import DilcompileError, DilcompileWarning
from dilcompile.forms import Dilated
from dilcompile.lowering import reference, select, triton
from dilcompile.lowering.call import Call
from dilcompile.lowering.choice import contest, miniature, probing, trust
from dilcompile.lowering.triton import plan, tiles
from dilcompile.lowering.triton.config import INTERPRETED, Tile
from dilcompile.lowering.triton.tiles import Kind

FORM = Dilated([16, 32], [1, 2])
# 16 x 16 has no smaller neighbours, and one stage none with fewer.
TRIED = {
    "16x16, 4 warps, 1 stages": INTERPRETED,
    "32x16, 4 warps, 1 stages": replace(INTERPRETED, own=32),
    "16x32, 4 warps, 1 stages": replace(INTERPRETED, other=32),
    "16x16, 8 warps, 1 stages": replace(INTERPRETED, warps=8),
    "16x16, 4 warps, 2 stages": replace(INTERPRETED, stages=2),
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tiles.OPTION, "memory")
    monkeypatch.setattr(tiles, "LEAST_ROWS", 16)
    # What is checked is interpreted, too.
    monkeypatch.setattr(miniature, "_ROWS", 20)
    monkeypatch.setattr(miniature, "_USUAL", miniature._USUAL._replace(keys=36))
    miniature.kinds.cache_clear()
    tiles.forget()
    plan.plan_of.cache_clear()
    yield
    tiles.forget()


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(tiles.OPTION, "disk")
    monkeypatch.setattr(tiles, "folder", lambda: tmp_path / "tiles")
    return tmp_path / "tiles"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tile]]:
    """The passes that asked for a tile, and what they got."""
    seen: list[tuple[str, Tile]] = []
    right = tiles.tile

    def watched(kind: Kind, table: Tile) -> Tile:
        seen.append((kind.step, right(kind, table)))
        return seen[-1][1]

    monkeypatch.setattr(tiles, "tile", watched)
    return seen


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def of(*seconds: float) -> Clock:
        clock = Clock(*seconds)
        monkeypatch.setattr(contest, "timer_of", lambda device: clock)
        return clock

    return of


def small(length: int = 17, **more: Any) -> Call:
    return call_of(FORM, length, **{"heads": 1, "kv_heads": 1, "dtype": torch.float64, **more})


def assert_right(call: Call, backward: bool) -> None:
    out, lse = reference.forward(call)
    if not backward:
        found: Any = select.select(call, "triton").forward(call)
        wanted: Any = (out, lse)
    else:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found = select.select(call, "triton", backward=True).backward(call, out, lse, grad, None)[:3]
        wanted = reference.backward(call, out, lse, grad, None)[:3]
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("best", range(len(TRIED)))
def test_the_fastest_tile_computes_and_rightly(best: int, clocked: Any, used: list[tuple[str, Tile]]) -> None:
    clock = clocked(*(1.0 if n == best else 2.0 for n in range(len(TRIED))))
    assert_right(small(), False)
    assert clock.runs == len(TRIED)
    assert used[-1] == ("forward", list(TRIED.values())[best])
    # Every tile was tried, and what was the best was checked by itself.
    assert {one for step, one in used if step == "forward"} >= set(TRIED.values())
    for length in (16, 19):
        assert_right(small(length), False)
    assert clock.runs == len(TRIED)


def test_each_pass_of_the_backward_has_its_own(clocked: Any, used: list[tuple[str, Tile]]) -> None:
    clock = clocked(2, 1, 3, 4, 5, 3, 4, 1, 5, 6)
    assert_right(small(), True)
    assert clock.runs == 2 * len(TRIED)
    assert dict(used[-3:]) == {
        "sums": INTERPRETED,
        "queries": TRIED["32x16, 4 warps, 1 stages"],
        "keys": TRIED["16x32, 4 warps, 1 stages"],
    }


def test_without_the_option_the_table_stands(clocked: Any, used: list[tuple[str, Tile]], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked(2, 1, 3, 4, 5)
    monkeypatch.delenv(tiles.OPTION)
    assert_right(small(), False)
    assert clock.runs == 0
    monkeypatch.setenv(tiles.OPTION, "memory")
    assert_right(small(), False)
    assert used[-1][1] == TRIED["32x16, 4 warps, 1 stages"]
    monkeypatch.setenv(tiles.OPTION, "off")
    assert_right(small(), False)
    assert used[-1][1] == INTERPRETED
    monkeypatch.setenv(tiles.OPTION, "on")
    with pytest.raises(DilcompileError, match="DILCOMPILE_TILES takes disk, memory, off, got 'on'"):
        assert_right(small(), False)


def test_few_rows_no_data_a_captured_graph_and_determinism_time_nothing(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked(2, 1, 3, 4, 5)
    assert_right(small(15), False)
    with FakeTensorMode():
        select.select(small(), "triton")
    with monkeypatch.context() as patch:
        patch.setattr(probing, "captured", lambda device: True)
        patch.setenv(trust.OPTION, "off")
        select.select(small(), "triton")
    torch.use_deterministic_algorithms(True)
    try:
        select.select(small(), "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert clock.runs == 0
    assert not tiles._chosen
    select.select(small(), "triton")
    assert clock.runs == len(TRIED)


def test_tiles_are_kept_on_disk(on_disk: Path, clocked: Any, used: list[tuple[str, Tile]]) -> None:
    clocked(2, 3, 1, 4, 5)
    assert_right(small(), False)
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    assert held["times"]["16x32, 4 warps, 1 stages"] == 1
    tiles.forget()
    clock = clocked()
    # Not even rows enough are needed, nor data.
    with FakeTensorMode():
        select.select(small(15), "triton")
    assert_right(small(15), False)
    assert clock.runs == 0
    assert used[-1][1] == TRIED["16x32, 4 warps, 1 stages"]


@pytest.mark.parametrize("text", ["{", "NAMES", "NAN", "made from", "device"])
def test_a_file_of_other_content_is_none(text: str, on_disk: Path, clocked: Any) -> None:
    clocked(2, 3, 1, 4, 5)
    select.select(small(), "triton")
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    changed = {
        "NAMES": held | {"times": {"64x64, 9 warps, 1 stages": 1.0}},
        "NAN": held | {"times": {"16x16, 4 warps, 1 stages": float("nan")}},
        **{part: held | {"about": held["about"] | {part: "another"}} for part in held["about"]},
    }
    file.write_text(json.dumps(changed[text]) if text in changed else text)
    tiles.forget()
    clock = clocked(2, 3, 1, 4, 5)
    select.select(small(), "triton")
    assert clock.runs == len(TRIED)
    assert json.loads(file.read_text()) == held


def test_a_tile_that_raises_is_left_out(clocked: Any, monkeypatch: pytest.MonkeyPatch, used: list[tuple[str, Tile]]) -> None:
    clocked(2, 1, 3, 4)
    right = triton.forward

    def out_of_registers(call: Call) -> Any:
        trial = tiles._trial.get()
        if trial is not None and trial[1].own == 32:
            raise RuntimeError("out of resource: shared memory")
        return right(call)

    monkeypatch.setattr(triton, "forward", out_of_registers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(small(), False)
    assert used[-1][1] == TRIED["16x32, 4 warps, 1 stages"]


def test_if_all_raise_the_table_stands(clocked: Any, monkeypatch: pytest.MonkeyPatch, on_disk: Path) -> None:
    clocked()
    right = triton.forward

    def broken(call: Call) -> Any:
        if tiles._trial.get() is not None:
            raise RuntimeError("no")
        return right(call)

    monkeypatch.setattr(triton, "forward", broken)
    assert_right(small(), False)
    assert list(tiles._chosen.values()) == [INTERPRETED]
    assert not on_disk.exists()


def test_a_fast_tile_with_wrong_numbers_is_not_taken(
    clocked: Any, monkeypatch: pytest.MonkeyPatch, used: list[tuple[str, Tile]], on_disk: Path
) -> None:
    clocked(3, 1, 2, 4, 5)
    right = triton.forward

    def wrong(call: Call) -> Any:
        out, lse = right(call)
        trial = tiles._trial.get()
        return (out * 1.1 if trial is not None and trial[1].own == 32 else out), lse

    monkeypatch.setattr(triton, "forward", wrong)
    with pytest.warns(DilcompileWarning, match="tile 32x16, 4 warps, 1 stages is not used: its numbers are wrong"):
        assert_right(small(), False)
    assert used[-1][1] == TRIED["16x32, 4 warps, 1 stages"]
    (file,) = on_disk.iterdir()
    assert "32x16, 4 warps, 1 stages" not in json.loads(file.read_text())["times"]


def test_other_masks_dtypes_and_head_sizes_are_tuned_by_themselves(clocked: Any) -> None:
    clock = clocked(*([2, 1, 3, 4, 5] * 4))
    for call in (small(), small(softcap=2.0), small(dtype=torch.float32), small(dim=32, v_dim=32)):
        select.select(call, "triton")
    assert clock.runs == 4 * len(TRIED)
    assert len(tiles._chosen) == 4
