"""Which of several kernels is the fastest for a class of calls: each is timed once, on the first call of the class.

A class is what ``trust`` takes for one, with the lengths, the number of heads in all and the density of the relation in powers of
two. The times are kept in memory and in torch's cache folder; ``DILCOMPILE_TUNE`` says otherwise: ``memory`` reads and writes
no files, ``off`` times nothing, so that the first kernel that can computes. Nothing is timed for operands without data, while a
CUDA graph is captured, or under ``torch.use_deterministic_algorithms``, which would then depend on a clock.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

from dilcompile.errors import DilcompileWarning
from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Kernel, empty_output
from dilcompile.lowering.choice import probing, records, trust
from dilcompile.relation import Relation

log = logging.getLogger(__name__)

OPTION = "DILCOMPILE_TUNE"
_RUNS = 5
# A run that takes more times the best is the last of its candidate.
_HOPELESS = 2.0
# Seconds after which what was measured is enough.
_ENOUGH = 0.5

Times = dict[str, float]
# By class of calls: seconds of each candidate, those that raised left out; empty: none could be timed.
_times: dict[tuple[object, ...], Times] = {}
_lock = threading.RLock()


class Timer(Protocol):
    """Measures on one kind of device."""

    def __call__(self, run: Callable[[], object], best: float) -> float:
        """Seconds of a run, after it was warmed up; ``best``: of the candidates before, infinite for the first."""


def fastest(candidates: Sequence[Kernel], call: Call, backward: bool) -> Kernel:
    """The candidate that is the fastest for calls of this class; the first where that is not known and can't be found out.

    Args:
        candidates: able and trusted.

    Warns:
        DilcompileWarning: for a candidate that raises, once a class of calls.
    """
    times = _settle(candidates, call, backward) if len(candidates) > 1 else None
    return candidates[0] if not times else min(candidates, key=lambda kernel: times.get(trust.name_of(kernel), math.inf))


def known(call: Call, backward: bool) -> Times | None:
    """Seconds of each kernel that was timed for calls of this class, fastest first, as far as that is in memory."""
    times = None if _is_off() else _times.get(_key(call, backward))
    return None if not times else dict(sorted(times.items(), key=lambda item: item[1]))


def decides(call: Call) -> bool:
    """Is it the clock that decides here, or the order of the kernels?"""
    return not _is_off() and not probing.captured(call.q.device)


def forget() -> None:
    """Drop the times in memory."""
    with _lock:
        _times.clear()


def num_known() -> int:
    """How many classes were timed; grows with each new one."""
    return len(_times)


def folder() -> Path:
    """Where the files lie."""
    return records.folder("tune")


def timed(runs: Mapping[str, Callable[[], object]], device: torch.device, tell: Callable[[str, Exception], None]) -> Times:
    """Seconds of each run; those that raise are left out and told of."""
    timer, times = timer_of(device), Times()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for name, run in runs.items():
            try:
                times[name] = timer(run, min(times.values(), default=math.inf))
            except Exception as error:
                tell(name, error)
    return times


def timer_of(device: torch.device) -> Timer:
    """Device events where there are any, else the wall clock."""
    return _by_events if device.type == "cuda" else _by_clock


def read(place: Path, about: dict[str, str]) -> Times | None:
    """The times of exactly this on disk, or None if there is no file of that content."""
    try:
        held = records.read(place, about) or {}
        times = {str(name): float(seconds) for name, seconds in held["times"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return times if times and all(seconds > 0 and math.isfinite(seconds) for seconds in times.values()) else None


def write(place: Callable[[], Path], about: dict[str, str], times: Times) -> None:
    """Keep times for other processes; a folder that can't be written is no error."""
    try:
        records.write(place(), about, times=times)
    except OSError as error:
        log.info("the times of %s could not be kept: %s", about["class"], error)


def _is_off() -> bool:
    """Nothing is timed, and nothing that was timed before counts."""
    return probing.mode_of(OPTION, "disk") == "off" or torch.are_deterministic_algorithms_enabled()


def _settle(candidates: Sequence[Kernel], call: Call, backward: bool) -> Times | None:
    """The times of a class, found out if need be; None if they can't be."""
    if _is_off():
        return None
    key = _key(call, backward)
    if key in _times:
        return _times[key]
    with _lock:
        if key in _times:
            return _times[key]
        on_disk = probing.mode_of(OPTION, "disk") == "disk"
        about = _about(candidates, call, backward)
        times = read(folder(), about) if on_disk else None
        if times is None:
            if probing.without_data(call.q) or probing.captured(call.q.device):
                return None
            times = _contest(candidates, call, backward)
            log.info("timed %s: %s", about["class"], times)
            # What raised may not do so again.
            if on_disk and len(times) == len(candidates):
                write(folder, about, times)
        _times[key] = times
        return times


def _contest(candidates: Sequence[Kernel], call: Call, backward: bool) -> Times:
    def tell(name: str, error: Exception) -> None:
        warnings.warn(
            f"kernel {name!r} is left out of the choice by speed: {probing.first_line(error)}", DilcompileWarning, stacklevel=2
        )

    with probing.undisturbed(call.q.device):
        run_of = runs_of(call, backward)
        return {} if run_of is None else timed({trust.name_of(held): run_of(held) for held in candidates}, call.q.device, tell)


def runs_of(call: Call, backward: bool) -> Callable[[Kernel], Callable[[], object]] | None:
    """What is timed of a kernel, on the call's own operands and some output and LSE; None if there is no memory for those."""
    if not backward:
        return lambda kernel: lambda: kernel.forward(call)
    generator = torch.Generator(call.q.device).manual_seed(0)
    try:
        out = empty_output(call.q, call.problem.v_dim).normal_(generator=generator)
        # Such that no weight overflows.
        lse = torch.full(call.q.shape[:3], 50.0, dtype=call.score_dtype, device=call.q.device)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    return lambda kernel: lambda: kernel.backward(call, out, lse, out, None)


def _key(call: Call, backward: bool) -> tuple[object, ...]:
    return backward, *trust.class_of(call), *_sizes(call.relation)


@lru_cache(maxsize=1024)
def _sizes(relation: Relation) -> tuple[int, ...]:
    """Powers of two: queries, keys, heads in all batch rows, and how few of the pairs the relation holds."""
    size, pairs = relation.problem, relation.pairs()
    sparse = round(math.log2(size.heads * size.q_len * size.k_len / pairs)) if pairs else -1
    return size.q_len.bit_length(), size.k_len.bit_length(), (size.batch * size.heads).bit_length(), sparse


def _about(candidates: Sequence[Kernel], call: Call, backward: bool) -> dict[str, str]:
    """All that the times depend on, as text."""
    made_from = {trust.name_of(kernel): kernel.fingerprint(call) for kernel in candidates}
    return {
        "kernels": repr(made_from),
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        "device": probing.device_name(call.q.device),
        "class": f"{'backward' if backward else 'forward'} of {', '.join(str(part) for part in _key(call, backward)[2:])}",
        "timed by": digest.of_files("choice/contest.py"),
    }


def _goes_on(seconds: Sequence[float], best: float) -> bool:
    """Is another run worth its time?"""
    return not seconds or (len(seconds) < _RUNS and sum(seconds) < _ENOUGH and seconds[-1] <= _HOPELESS * best)


def _by_events(run: Callable[[], object], best: float) -> float:
    """The median of some runs between device events, on the current stream."""
    # It compiles.
    run()
    seconds: list[float] = []
    while _goes_on(seconds, best):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def _by_clock(run: Callable[[], object], best: float) -> float:
    """The same by the wall clock."""
    run()
    seconds: list[float] = []
    while _goes_on(seconds, best):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
