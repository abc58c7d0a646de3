"""Planned buffers of a GPT-2-like model: what the plan needs, what an allocator would, and what it costs in time.

The graphs are traced once with a symbolic length; the plan is then made for a length of 32k without running anything. Time and
measured bytes are those of a length that runs here.

OMP_NUM_THREADS=2 python benchmarks/memory.py --length 32768 --run 1024 --pictures docs/memory
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dilcompile.memory import BufferPlan, plan_buffers
from dilcompile.memory.measure import measured
from dilcompile.memory.replay import reserved_by_caching
from dilcompile.memory.timeline import svg, table
from dilcompile.planned import PlannedCall

POLICY = {
    "version": 1,
    "rules": [
        {
            "apply": {"form": "dilated", "segments": [256, 1024, 4096], "rates": [1, 4, 16], "offset": "own"},
        }
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=32768, help="the plan's")
    parser.add_argument("--run", type=int, default=1024, help="of the runs that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="folder to draw the plans in")
    args = parser.parse_args()
    config = GPT2Config(n_embd=args.width, n_layer=args.layers, n_head=args.width // 64, n_positions=args.length, vocab_size=512)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    calls = _traced(model, args.run)
    for name, call in zip(("forward", "backward"), calls, strict=True):
        _report(name, call, args)
    _measured(model, args)
    _timed(model, args)


def _traced(model: torch.nn.Module, length: int) -> list[PlannedCall]:
    """The planned forward and backward, with the length as a symbol."""
    found: list[PlannedCall] = []
    begin = PlannedCall.__init__

    def kept(self: PlannedCall, *given: object) -> None:
        begin(self, *given)  # type: ignore[arg-type]
        found.append(self)

    PlannedCall.__init__ = kept  # type: ignore[method-assign]
    try:
        _step(_compiled(model, dynamic=True), model, length)
    finally:
        PlannedCall.__init__ = begin  # type: ignore[method-assign]
    return found


def _compiled(model: torch.nn.Module, dynamic: bool = False, plan: bool = True, pool: str = "private"):
    memory = {"memory": {"pool": pool, "reuse": "across_layers"}} if plan else {}
    policy = {**POLICY, "rules": [{"apply": POLICY["rules"][0]["apply"], **memory}]}
    return torch.compile(model, backend="dilated", options={"policy": policy, "inner": "aot_eager"}, dynamic=dynamic)


def _step(compiled, model: torch.nn.Module, length: int) -> None:
    model.zero_grad()
    _forward(compiled, length).backward()


def _forward(compiled, length: int) -> torch.Tensor:
    return compiled(input_ids=torch.arange(length)[None] % 512, use_cache=False)[0].square().mean()


def _report(name: str, call: PlannedCall, args: argparse.Namespace) -> None:
    symbols = [symbol for _, symbol in call.planned.symbols]
    there = call.planned.plan.at(dict.fromkeys(symbols, args.length))
    buffers = [buffer for arena in there.arenas for buffer in arena.buffers]
    start = time.perf_counter()
    plan = plan_buffers(buffers)
    seconds = time.perf_counter() - start
    row = {
        "graph": name,
        "length": args.length,
        "buffers": len(buffers),
        "planning_s": seconds,
        "planned_bytes": plan.peak,
        "stacked_bytes": there.peak,
        "most_live_bytes": plan.most_live,
        "without_reuse_bytes": plan.without_reuse,
        "caching_allocator_bytes": reserved_by_caching(buffers),
        "elsewhere": len(call.planned.elsewhere),
    }
    print(json.dumps(row), flush=True)
    print(table(plan))
    if args.pictures is not None:
        _draw(plan, name, args)


def _draw(plan: BufferPlan, name: str, args: argparse.Namespace) -> None:
    args.pictures.mkdir(parents=True, exist_ok=True)
    title = f"GPT-2-like, {args.layers} layers of width {args.width}, {args.length:,} tokens: {name}"
    (args.pictures / f"{name}.svg").write_text(svg(plan.arenas[0], title, name, alone=True) + "\n")


def _measured(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """The most bytes that torch's allocator has given out in a training step, and what is held between its passes.

    The native kernel's own scratch memory is in the planned figure, where it is part of the arenas, and not in the other one.
    """
    row: dict[str, float] = {"length": args.run}
    for name, plan in (("unplanned", False), ("planned", True)):
        compiled = _compiled(model, plan=plan, pool="default")
        _step(compiled, model, args.run)
        model.zero_grad()
        found = measured(lambda compiled=compiled: _forward(compiled, args.run))
        row[f"{name}_held_bytes"] = found[1].left
        del found
        _, whole = measured(lambda compiled=compiled: _step(compiled, model, args.run))
        row[f"{name}_peak_bytes"] = whole.peak
    row["peak_planned_over_unplanned"] = row["planned_peak_bytes"] / row["unplanned_peak_bytes"]
    print(json.dumps(row), flush=True)


def _timed(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Planned and unplanned steps in turns."""
    runs = {"unplanned": _compiled(model, plan=False), "planned": _compiled(model)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats + 1):
        for name, compiled in runs.items():
            start = time.perf_counter()
            _step(compiled, model, args.run)
            if turn:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    print(json.dumps({"length": args.run, **seconds, "planned_over_unplanned": seconds["planned"] / seconds["unplanned"]}))


if __name__ == "__main__":
    main()
