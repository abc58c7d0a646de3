"""Tiles found by the clock: of the table's tile for a pass and its neighbours, the fastest on this device. No Triton.

Done only where ``DILCOMPILE_TILES`` asks for it (``disk`` or ``memory``; without it, ``off``: the table alone). Once for each
pass, device, head size, dtype and kind of masks, on the first call with rows and keys enough to tell; lengths are no part of it.
A tile that the compiler refuses is left out; the fastest is taken only after its numbers were checked as those of a kernel are.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dilcompile.errors import DilcompileWarning
from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Kernel
from dilcompile.lowering.choice import contest, probing, records, trust
from dilcompile.lowering.triton.config import Masks, Pass, Tile

log = logging.getLogger(__name__)

OPTION = "DILCOMPILE_TILES"
# With fewer, a launch is over before its tiles matter.
LEAST_ROWS = 1024
_SMALLEST, _LARGEST, _MOST_STAGES = 16, 256, 5


@dataclass(frozen=True)
class Kind:
    """What a tile is chosen for; ``head``: the larger head size, a power of two; ``listed``: it walks lists of blocks; ``part``:
    its rows are a part of their sequence."""

    step: Pass
    device: torch.device
    head: int
    dtype: torch.dtype
    masks: Masks
    listed: bool = False
    part: bool = False


_chosen: dict[Kind, Tile] = {}
_lock = threading.RLock()
# The pass and the tile that are being tried.
_trial: ContextVar[tuple[Pass, Tile] | None] = ContextVar("_trial", default=None)


def tile(kind: Kind, table: Tile) -> Tile:
    """The tile of a pass: the one that is being tried, or was found, or the table's."""
    trial = _trial.get()
    if trial is not None:
        return trial[1] if trial[0] == kind.step else table
    return _chosen.get(kind, table) if _chosen and not is_off() else table


def is_off() -> bool:
    """Nothing is timed, and nothing that was found before counts."""
    return probing.mode_of(OPTION, "off") == "off" or torch.are_deterministic_algorithms_enabled()


def tune(kernel: Kernel, call: Call, backward: bool, tables: Mapping[Kind, Tile], made_from: str) -> None:
    """Find the tiles of the passes in ``tables``, where that is asked for, not done yet, and can be done with this call.

    Args:
        kernel: computes the call by tiles that it asks ``tile`` for.
        tables: the kinds of tiles that the pass takes, with those of the table.
        made_from: what else the times depend on: sources, versions, the device's architecture.

    Warns:
        DilcompileWarning: for a tile that is the fastest and gives wrong numbers.
    """
    for kind, table in tables.items():
        if kind not in _chosen:
            with _lock:
                _settle(kernel, call, backward, kind, table, made_from)


def forget() -> None:
    """Drop the tiles in memory."""
    with _lock:
        _chosen.clear()


def folder() -> Path:
    """Where the files lie."""
    return records.folder("tiles")


def neighbours(kind: Kind, table: Tile, shared: int | None, describes: bool = False) -> dict[str, Tile]:
    """The table's tile first, and those that differ from it in one number and may fit a program's shared memory, in bytes.

    Args:
        describes: the device loads whole rows by their descriptors.
    """
    changes = [
        *({"own": own} for own in (table.own // 2, table.own * 2)),
        *({"other": other} for other in (table.other // 2, table.other * 2)),
        {"warps": 4 if table.warps == 8 else 8},
        *({"stages": stages} for stages in (table.stages - 1, table.stages + 1)),
    ]
    if describes and kind.step in ("forward", "queries") and not (kind.listed or kind.part) and "counted" not in kind.masks:
        changes += [{"described": True}, {"described": True, "stages": table.stages + 1}]
    made = [table, *(replace(table, **change) for change in changes)]  # type: ignore[arg-type]
    fitting = [one for one in made if one == table or (_sound(one) and (shared is None or _shared(kind, one) <= shared))]
    return {_name(one): one for one in fitting}


def _name(one: Tile) -> str:
    return f"{one.own}x{one.other}, {one.warps} warps, {one.stages} stages{', by descriptors' if one.described else ''}"


def _sound(one: Tile) -> bool:
    sides = all(_SMALLEST <= side <= _LARGEST for side in (one.own, one.other))
    return sides and 1 <= one.stages <= _MOST_STAGES


def _shared(kind: Kind, one: Tile) -> int:
    """Bytes of shared memory that a program takes at least: two blocks of the other side for each stage that is loaded ahead.

    Pieces of small blocks in a list are not loaded ahead.
    """
    ahead = 1 if kind.listed else max(1, one.stages - 1)
    return kind.head * kind.dtype.itemsize * 2 * one.other * ahead


def _settle(kernel: Kernel, call: Call, backward: bool, kind: Kind, table: Tile, made_from: str) -> None:
    mode, size = probing.mode_of(OPTION, "off"), call.problem
    if kind in _chosen or is_off():
        return
    tried = neighbours(kind, table, _shared_of(kind.device), _describes(kind))
    about = _about(kind, tried, made_from)
    times = contest.read(folder(), about) if mode == "disk" else None
    if times is None or not set(times) <= set(tried):
        few = min(size.q_len, size.k_len) < LEAST_ROWS
        if few or probing.without_data(call.q) or probing.captured(kind.device):
            return
        times = _timed(kernel, call, backward, kind.step, tried)
        log.info("timed tiles of %s: %s", about["class"], times)
        if mode == "disk" and times:
            contest.write(folder, about, times)
    _chosen[kind] = tried[min(times, key=lambda name: times[name])] if times else table


def _timed(kernel: Kernel, call: Call, backward: bool, step: Pass, tried: Mapping[str, Tile]) -> contest.Times:
    """Seconds of the pass with each tile, the fastest of them checked; none is left out that may be the fastest."""

    def by(one: Tile, run: Callable[[], object]) -> Callable[[], object]:
        def tried_run() -> object:
            with _trying(step, one):
                return run()

        return tried_run

    def tell(name: str, error: Exception) -> None:
        log.info("tile %s is left out: %s", name, probing.first_line(error))

    with probing.undisturbed(call.q.device):
        run_of = contest.runs_of(call, backward)
        if run_of is None:
            return {}
        run = run_of(kernel)
        times = contest.timed({name: by(one, run) for name, one in tried.items()}, call.q.device, tell)
    for name in sorted(times, key=lambda name: times[name]):
        with _trying(step, tried[name]):
            verdict = trust.check(kernel, call, backward)
        if verdict.passes:
            break
        del times[name]
        warnings.warn(f"tile {name} is not used: its numbers are wrong ({verdict})", DilcompileWarning, stacklevel=2)
    return times


@contextlib.contextmanager
def _trying(step: Pass, one: Tile) -> Iterator[None]:
    token = _trial.set((step, one))
    try:
        yield
    finally:
        _trial.reset(token)


def _shared_of(device: torch.device) -> int | None:
    """Bytes of shared memory that a program can have; None where nothing limits it."""
    if device.type != "cuda":
        return None
    held: int | None = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return held


def _describes(kind: Kind) -> bool:
    """Whether rows of this dtype can be loaded by descriptors: from compute capability 9.0 on, two bytes a number."""
    if kind.device.type != "cuda" or torch.version.hip is not None or kind.dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(kind.device) >= (9, 0)


def _about(kind: Kind, tried: Mapping[str, Tile], made_from: str) -> dict[str, str]:
    """All that the times depend on, as text."""
    walk = "lists of blocks" if kind.listed else "terms of a part" if kind.part else "terms"
    return {
        "class": f"{kind.step}, head size {kind.head}, {kind.dtype}, masks {kind.masks}, {walk}",
        "tiles": "; ".join(tried),
        "made from": f"{made_from}, torch {torch.__version__}",
        "device": probing.device_name(kind.device),
        "timed by": digest.of_files("choice/contest.py"),
    }
