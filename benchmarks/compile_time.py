"""Compile time that dilcompile adds to Inductor alone, on a 12-layer GPT-2-like model; finding time per site.

    OMP_NUM_THREADS=2 python benchmarks/compile_time.py --repeats 3 --save benchmarks/results/compile_time.json

Both backends compile the same model in turn in one process, each time with empty caches; medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

import dilcompile.pipeline as pipeline
from dilcompile.bench import machine


def model(layers: int, implementation: str) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=layers, n_embd=256, n_head=8, vocab_size=512, n_positions=1024, use_cache=False)
    torch.manual_seed(0)
    return GPT2Model._from_config(config, attn_implementation=implementation).eval()


def compile_once(net: torch.nn.Module, ids: torch.Tensor, how: dict[str, Any]) -> float:
    """Seconds from an uncompiled model with empty caches to its first result."""
    torch._dynamo.reset()
    with fresh_cache(), torch.no_grad():
        start = time.perf_counter()
        torch.compile(net, **how)(input_ids=ids)
        return time.perf_counter() - start


def steps(net: torch.nn.Module, ids: torch.Tensor) -> tuple[dict[str, float], int]:
    """Seconds of each step of the pipeline in a warm process, and the number of sites."""
    held: list[Any] = []
    original = pipeline.rewrite_normal

    def recording(*args: Any, **kwargs: Any) -> Any:
        held.append(original(*args, **kwargs))
        return held[-1]

    pipeline.rewrite_normal = recording
    try:
        for _ in range(2):
            torch._dynamo.reset()
            with torch.no_grad():
                torch.compile(net, backend="dilated", options={"policy": "exact", "inner": "eager"})(input_ids=ids)
    finally:
        pipeline.rewrite_normal = original
    report = held[-1].report
    return dict(report.seconds), len(report.verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--implementation", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--save", type=Path, help="write the result as JSON")
    asked = parser.parse_args()
    net = model(asked.layers, asked.implementation)
    ids = torch.randint(0, 512, (1, asked.length))
    ours = {"backend": "dilated", "options": {"policy": "exact"}}
    seconds: dict[str, list[float]] = {"inductor": [], "dilated": []}
    compile_once(model(1, asked.implementation), ids, {"backend": "inductor"})  # imports, worker processes
    for _ in range(asked.repeats):
        seconds["inductor"].append(compile_once(net, ids, {"backend": "inductor"}))
        seconds["dilated"].append(compile_once(net, ids, ours))
        print({name: round(held[-1], 2) for name, held in seconds.items()}, flush=True)
    parts, sites = steps(net, ids)
    medians = {name: statistics.median(held) for name, held in seconds.items()}
    result = {
        "model": f"GPT-2-like, {asked.layers} layers, {asked.implementation}, {asked.length} tokens",
        "seconds": medians,
        "ratio": medians["dilated"] / medians["inductor"],
        "pipeline_seconds": parts,
        "sites": sites,
        "find_ms_per_site": 1e3 * parts["find"] / sites,
    }
    print(result)
    if asked.save is not None:
        command = f"python benchmarks/compile_time.py --layers {asked.layers} --length {asked.length} --repeats {asked.repeats}"
        asked.save.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
