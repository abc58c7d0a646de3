"""Times between device events, taken in turns, and the memory that a call takes beside its results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, between device events, after two calls to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + WARM_UP):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= WARM_UP:
                taken[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def backward_in_turns(outs: Mapping[str, Tensor], inputs: tuple[Tensor, ...], repeats: int) -> dict[str, float]:
    """Median seconds of the gradients of each output by the same inputs."""
    grad = torch.randn_like(next(iter(outs.values())))

    def gradients(out: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return in_turns({name: gradients(out) for name, out in outs.items()}, repeats)


def extra_memory(forward: Callable[[], Tensor]) -> dict[str, Any]:
    """Peak device bytes of a forward beyond what was there and the output and its LSE."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    torch.cuda.synchronize()
    lse_bytes = 4 * out[..., 0].numel()
    return {"extra_peak_bytes": torch.cuda.max_memory_allocated() - before - out.nbytes - lse_bytes, "output_bytes": out.nbytes}


def copy_bytes_per_second(size: int = 1 << 30) -> float:
    """Bytes moved a second by a copy on the device, each read once and written once."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / in_turns({"copy": lambda: target.copy_(source)}, 10)["copy"]
