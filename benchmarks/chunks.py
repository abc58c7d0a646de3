"""Attention in chunks of queries: what a training step of a T5 encoder needs under smaller budgets, and how long it takes.

T5's bias by relative positions is computed for all pairs, so that it and its gradient are most of what a step needs. Each row is
a way of the ladder of budgets: as the model is, the least without chunks, and the least of all. The peak is the most that torch's
allocator has given out in a step (forward and backward), beside what was predicted.

OMP_NUM_THREADS=2 python benchmarks/chunks.py --lengths 2048
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from dilcompile.errors import BudgetError
from dilcompile.memory.budget import Rung
from dilcompile.memory.measure import measured

# T5-small's.
SIZES = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**SIZES, vocab_size=512, dropout_rate=0.0))
    for length in args.lengths:
        _measure(model, length, args.repeats)


def _measure(model: torch.nn.Module, length: int, repeats: int) -> None:
    ladder = _ladder(model, length)
    whole = min((rung for rung in ladder if rung.chunk is None), key=lambda rung: rung.peak)
    ways: dict[str, Rung | None] = {"unplanned": None, "without chunks": whole, "chunks": min(ladder, key=lambda rung: rung.peak)}
    runs = {name: _compiled(model, None if rung is None else rung.peak) for name, rung in ways.items()}
    steps = {name: partial(_step, model, compiled, length) for name, compiled in runs.items()}
    peaks = {name: _peak(model, step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    for name, rung in ways.items():
        told = {} if rung is None else {"rung": rung.name, "predicted_bytes": rung.peak}
        row = {"length": length, "way": name, "peak_bytes": peaks[name], "step_s": statistics.median(times[name]), **told}
        print(json.dumps(row), flush=True)


def _compiled(model: torch.nn.Module, budget: int | None) -> Callable[..., Any]:
    memory = {} if budget is None else {"defaults": {"memory": {"budget": budget}}}
    policy = {"version": 1, **memory, "rules": [{"apply": {"form": "dense"}}]}
    return torch.compile(model, backend="dilated", options={"policy": policy, "inner": "aot_eager"}, dynamic=False)


def _step(model: torch.nn.Module, compiled: Callable[..., Any], length: int) -> None:
    model.zero_grad()
    compiled(input_ids=torch.arange(length)[None] % 512)[0].square().mean().backward()


def _ladder(model: torch.nn.Module, length: int) -> list[Rung]:
    """Every way that is tried for a budget that none keeps."""
    try:
        _step(model, _compiled(model, 1), length)
    except torch._dynamo.exc.BackendCompilerFailed as failed:
        error = failed.inner_exception
        assert isinstance(error, BudgetError), error
        torch._dynamo.reset()
        return list(error.tried)
    raise AssertionError("a step needs more than one byte")


def _peak(model: torch.nn.Module, step: Callable[[], None]) -> int:
    """Of the second step, with no gradients before it."""
    step()
    model.zero_grad()
    return measured(step)[1].peak


if __name__ == "__main__":
    main()
