"""Planned buffers of a GPT-2-like model: what the plan needs, what allocators and Inductor would, and what it costs in time.

The plan for ``--length`` is made without computing anything. What is measured is measured at ``--run`` tokens: times, and the
peak of what a step (forward and backward) takes from torch's allocator, as the profiler sees it, with each way to run the same
rewritten graphs.

OMP_NUM_THREADS=2 python benchmarks/memory.py --length 32768 --run 1024 --pictures docs/memory
OMP_NUM_THREADS=2 python benchmarks/memory.py --run 1024 --inductor
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import GPT2Config, GPT2LMHeadModel

from dilcompile.memory import plan_buffers
from dilcompile.memory.account import GraphMemory
from dilcompile.memory.measure import measured
from dilcompile.memory.timeline import svg
from dilcompile.memory.words import text
from dilcompile.memory_plan import memory_plan
from dilcompile.policy import Policy

APPLY = {"form": "dilated", "segments": [256, 1024, 4096], "rates": [1, 4, 16], "offset": "own"}
WAYS = ("unplanned", "planned", "budget")
# An arena, or a pool of Inductor's, in the code that it writes.
_POOL = re.compile(r"^\s*(pool\d+) = empty_strided_\w+\(\((\d+),? ?\), \(1,? ?\), torch\.uint8", re.M)
_EMPTY = re.compile(r"^\s*\w+ = empty_strided_\w+\(", re.M)
_FROM_POOL = re.compile(r"^\s*\w+ = alloc_from_pool\(", re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=32768, help="the plan's")
    parser.add_argument("--run", type=int, default=1024, help="of the runs that are timed and measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.68, help="of the unplanned peak, for the third way to run")
    parser.add_argument("--pictures", type=Path, help="folder to draw the plans in")
    parser.add_argument(
        "--inductor", action="store_true", help="measure peaks beside Inductor's, with and without memory_planning"
    )
    args = parser.parse_args()
    longest = max(args.length, args.run)
    config = GPT2Config(n_embd=args.width, n_layer=args.layers, n_head=args.width // 64, n_positions=longest, vocab_size=512)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    if args.inductor:
        _beside_inductor(model, args.run)
        return
    _planned(model, args)
    _timed(model, args, _measured(model, args))


def _policy(memory: bool, pool: str = "private", budget: int | None = None) -> dict[str, Any]:
    use = {"pool": pool, "reuse": "across_layers", **({} if budget is None else {"budget": budget})} if memory else {}
    return {"version": 1, "defaults": {"memory": use} if use else {}, "rules": [{"apply": APPLY}]}


def _inputs(length: int) -> dict[str, Any]:
    return {"input_ids": torch.arange(length)[None] % 512, "use_cache": False}


def _planned(model: torch.nn.Module, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    found = memory_plan(model, (), _inputs(args.run), Policy.load(_policy(memory=True)), args.length)
    print(json.dumps({"length": args.length, "traced_and_planned_s": time.perf_counter() - start}), flush=True)
    for memory in found.graphs:
        start = time.perf_counter()
        plan_buffers(memory.buffers)
        print(json.dumps({**memory.to_dict(), "planning_s": time.perf_counter() - start}), flush=True)
        if args.pictures is not None:
            _draw(memory, args)
    print(text(found.graphs))


def _draw(memory: GraphMemory, args: argparse.Namespace) -> None:
    args.pictures.mkdir(parents=True, exist_ok=True)
    title = f"GPT-2-like, {args.layers} layers of width {args.width}, {args.length:,} tokens: {memory.direction}"
    (arena, *_), name = memory.plan.arenas, memory.direction
    (args.pictures / f"{name}.svg").write_text(svg(arena, title, name, alone=True) + "\n")


def _compiled(model: torch.nn.Module, inner: str, policy: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend="dilated", options={"policy": policy, "inner": inner}, dynamic=False)


def _step(compiled: Callable[..., Any], model: torch.nn.Module, length: int) -> None:
    model.zero_grad()
    _forward(compiled, length).backward()


def _forward(compiled: Callable[..., Any], length: int) -> torch.Tensor:
    loss: torch.Tensor = compiled(**_inputs(length))[0].square().mean()
    return loss


def _measured(model: torch.nn.Module, args: argparse.Namespace) -> int:
    """The most bytes that torch's allocator has given out in a training step, and what is held between its passes; the budget.

    The native kernel's own scratch memory is in the planned figures, where it is part of the arenas, and not in the other one.
    """
    row: dict[str, float] = {"length": args.run}
    budget = 0
    for name in WAYS:
        torch._dynamo.reset()
        compiled = _compiled(model, "aot_eager", _policy(name != "unplanned", "default", budget if name == "budget" else None))
        _step(compiled, model, args.run)
        model.zero_grad()
        found = measured(partial(_forward, compiled, args.run))
        row[f"{name}_held_bytes"] = found[1].left
        del found
        _, whole = measured(partial(_step, compiled, model, args.run))
        row[f"{name}_peak_bytes"] = whole.peak
        row[f"{name}_peak_over_unplanned"] = whole.peak / row["unplanned_peak_bytes"]
        budget = budget or int(args.budget * whole.peak)
        del compiled
    print(json.dumps(row), flush=True)
    return budget


def _timed(model: torch.nn.Module, args: argparse.Namespace, budget: int) -> None:
    """Steps of each way in turns."""
    torch._dynamo.reset()
    policies = {name: _policy(name != "unplanned", "private", budget if name == "budget" else None) for name in WAYS}
    runs = {name: _compiled(model, "aot_eager", policy) for name, policy in policies.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats + 1):
        for name, compiled in runs.items():
            start = time.perf_counter()
            _step(compiled, model, args.run)
            if turn:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    ratios = {f"{name}_over_unplanned": taken / seconds["unplanned"] for name, taken in seconds.items()}
    print(json.dumps({"length": args.run, **seconds, **ratios}))


def _beside_inductor(model: torch.nn.Module, length: int) -> None:
    """Peaks by the allocator's own account, of a call under no_grad and of a step (Inductor plans pools in the first alone).

    Arenas are given back after each call here, so that they are counted.
    """
    planned = _policy(memory=True, pool="default")
    ways: dict[str, tuple[str, dict[str, Any], bool]] = {
        "aot_eager": ("aot_eager", _policy(memory=False), False),
        "aot_eager, planned": ("aot_eager", planned, False),
        "inductor": ("inductor", _policy(memory=False), False),
        "inductor, memory_planning": ("inductor", _policy(memory=False), True),
    }
    for trains in (False, True):
        for name, (inner, policy, pools) in ways.items():
            torch._dynamo.reset()
            with fresh_cache(), torch._inductor.config.patch(memory_planning=pools):
                call = partial(_step if trains else _inference, _compiled(model, inner, policy), model, length)
                _, codes = run_and_get_code(call)
                # Else the measured step gives back these gradients while it makes its own, or is not seen to.
                model.zero_grad()
                row = {
                    "way": name,
                    "call": "step" if trains else "no_grad",
                    "length": length,
                    "peak_bytes": measured(call)[1].peak,
                }
                if inner == "inductor":
                    row["graphs"] = [_counted(code) for code in codes]
                print(json.dumps(row), flush=True)


def _inference(compiled: Callable[..., Any], model: torch.nn.Module, length: int) -> None:
    with torch.no_grad():
        compiled(**_inputs(length))


def _counted(code: str) -> dict[str, int]:
    """What one graph's code takes: pools and the buffers in them, buffers by themselves, calls that make what they return."""
    pools = _POOL.findall(code)
    return {
        "pool_bytes": sum(int(size) for _, size in pools),
        "in_pools": len(_FROM_POOL.findall(code)),
        "by_themselves": len(_EMPTY.findall(code)) - len(pools),
        "made_by_our_operators": len(re.findall(r"= torch\.ops\.dilcompile\.", code)),
    }


if __name__ == "__main__":
    main()
