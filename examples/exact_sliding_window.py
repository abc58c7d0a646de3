"""An exact sliding-window model made faster: Mistral's architecture under preset `exact`, beside Inductor alone.

python examples/exact_sliding_window.py [--seq 4096] [--window 512] [--layers 1] [--inner inductor|aot_eager|eager] [--runs 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MistralConfig, MistralModel

import dilcompile


def mistral(window: int, layers: int, longest: int) -> MistralModel:
    """Random weights; head size and groups as in Mistral 7B, fewer heads."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=longest,
        sliding_window=window,
    )
    return MistralModel(config).eval()


def in_turns(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after a first call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    model = mistral(options.window, options.layers, options.seq)
    ids = torch.randint(256, (1, options.seq))
    print(dilcompile.explain(model, input_ids=ids, use_cache=False, policy="exact"))
    alone = torch.compile(model, backend=options.inner, dynamic=False)
    exact = torch.compile(model, backend="dilated", options={"policy": "exact", "inner": options.inner}, dynamic=False)

    def run(net: Callable[..., object]) -> Tensor:
        return net(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[attr-defined]

    with torch.no_grad():
        times = in_turns({"alone": lambda: run(alone), "exact": lambda: run(exact)}, options.runs)
        change = ((run(exact) - run(alone)).norm() / run(alone).norm()).item()
    print(f"hidden states change by {change:.2e} of their norm")
    print(f"{options.inner} alone {times['alone'] * 1e3:.0f} ms, with preset exact {times['exact'] * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
