"""What `min_seq: auto` compares: seconds a call costs by itself and FLOP/s, of dense SDPA and of each CPU kernel.

    OMP_NUM_THREADS=1 python benchmarks/rates.py

Each is timed at three lengths in turns, in processor time of one thread; the smallest of its times counts, since only
disturbances add to it. The shortest call
gives the overhead, the longest the rate, the one between how far off the two are. Writes benchmarks/results/rates-cpu.json;
DILCOMPILE_RATES may name such a file, and lowering/choice/rates-cpu.json is the copy of it that is used without.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilcompile.bench import machine
from dilcompile.forms import Dense, Dilated, Form
from dilcompile.functional import attention
from dilcompile.relation import Problem

HEADS, HEAD_DIM = 4, 64
LENGTHS = (16, 512, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = ("dense", "native", "sdpa", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", type=Path, default=Path(__file__).parent / "results" / "rates-cpu.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, Any] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        rates[name] = {
            kernel: {"forward": forward, "train": train}
            for kernel, forward, train in zip(
                KERNELS, measured(dtype, False, asked.repeats), measured(dtype, True, asked.repeats), strict=True
            )
        }
        print(name, json.dumps(rates[name]), flush=True)
    held = {"command": "OMP_NUM_THREADS=1 python benchmarks/rates.py", "machine": machine(), "device": "cpu", "rates": rates}
    asked.save.write_text(json.dumps(held, indent=1) + "\n")


def measured(dtype: torch.dtype, train: bool, repeats: int) -> list[dict[str, float]]:
    """Overhead and rate of each kernel."""
    points: dict[str, list[tuple[float, float]]] = {kernel: [] for kernel in KERNELS}
    for length in LENGTHS:
        calls = {kernel: _call(kernel, length, dtype, train) for kernel in KERNELS}
        times = {kernel: float("inf") for kernel in KERNELS}
        for turn in range(repeats + 1):
            for kernel, (call, _) in calls.items():
                start = time.process_time()
                call()
                if turn:
                    times[kernel] = min(times[kernel], time.process_time() - start)
        for kernel, (_, flops) in calls.items():
            points[kernel].append((flops, times[kernel]))
    return [_rated(points[kernel]) for kernel in KERNELS]


def _call(kernel: str, length: int, dtype: torch.dtype, train: bool) -> tuple[Callable[[], object], float]:
    form: Form = Dense() if kernel in ("dense", "sdpa") else Dilated((length // 4, length), (1, 4), offset="own")
    flops = _flops(form, length, train)
    shape = (1, length, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_(train) for _ in range(3))
    grad = torch.randn_like(q)

    def attend() -> Tensor:
        if kernel == "dense":
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out = attention(q, k, v, form, kernel=kernel)
        assert isinstance(out, Tensor)
        return out

    return (lambda: torch.autograd.grad(attend(), (q, k, v), grad)) if train else attend, flops


def _flops(form: Form, length: int, train: bool) -> float:
    relation = form.relation(Problem(1, HEADS, HEADS, length, length, HEAD_DIM, HEAD_DIM))
    return relation.flops() + (relation.flops(backward=True) if train else 0)


def _rated(points: list[tuple[float, float]]) -> dict[str, float]:
    """The time of the shortest call, the rate of the longest, and how far off they are in between."""
    (_, overhead), *between, (most, longest) = points
    rate = most / (longest - overhead)
    off = max(abs((overhead + flops / rate) / seconds - 1) for flops, seconds in between)
    return {"overhead_s": overhead, "flops_per_s": rate, "largest_relative_error_between": off}


if __name__ == "__main__":
    main()
