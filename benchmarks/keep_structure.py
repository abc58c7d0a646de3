"""Models that carry sparse attention of their own, exactly: Inductor alone beside preset `exact`, in one process, taken in turns.

    OMP_NUM_THREADS=1 python benchmarks/keep_structure.py

Hugging Face architectures with random weights and a narrow body (4 heads of size 64), local and full layers in turn as the real
configurations have them (Mistral: local ones only). Whole forward passes without a cache are timed; medians. ``error`` is the
norm of the difference to the uncompiled model's hidden states over theirs. Writes benchmarks/results/keep_structure.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dilcompile.bench import machine

RESULTS = Path(__file__).parent / "results" / "keep_structure.json"
BODY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LOCAL_THEN_FULL = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
CHUNKED: dict[str, Any] = {
    "attention_chunk_size": 1024, "layer_types": ["chunked_attention", "full_attention"], "intermediate_size_mlp": 512, **EXPERTS,
}  # fmt: skip
# Name, class, what its configuration says of attention, and in words.
MODELS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("Mistral", "Mistral", {"sliding_window": 512}, "window 512 in both layers"),
    ("Gemma 3", "Gemma3Text", {"sliding_window": 512, "layer_types": LOCAL_THEN_FULL}, "window 512, full"),
    ("gpt-oss", "GptOss", {"sliding_window": 128, "layer_types": LOCAL_THEN_FULL, **EXPERTS}, "window 128, full; sinks"),
    ("Llama 4", "Llama4Text", CHUNKED, "chunks of 1,024, full"),
)


def main() -> None:
    """Print one line per case and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--models", nargs="+", default=[name for name, *_ in MODELS])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for length in asked.lengths:
        for name, kind, options, words in MODELS:
            if name not in asked.models:
                continue
            net = model(kind, options, length)
            rows.append({"model": name, "attention": words, "length": length, **_row(net, length, asked.repeats)})
            print(json.dumps(rows[-1]), flush=True)
            command = " ".join(["python benchmarks/keep_structure.py", *sys.argv[1:]])
            held = {"command": command, "machine": machine(), "rows": rows}
            RESULTS.write_text(json.dumps(held, indent=1) + "\n")


def model(kind: str, options: dict[str, Any], length: int) -> nn.Module:
    """The body of a language model, as its users get it, with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**BODY, max_position_embeddings=length, **options)
    built: nn.Module = getattr(transformers, f"{kind}Model")(config).eval()
    return built


def _row(net: nn.Module, length: int, repeats: int) -> dict[str, Any]:
    ids = torch.randint(3, 256, (1, length))
    torch._dynamo.reset()
    alone = torch.compile(net, dynamic=False)
    exact = torch.compile(net, backend="dilated", options={"policy": "exact"}, dynamic=False)

    def call(run: Callable[..., Any]) -> Tensor:
        found: Tensor = run(input_ids=ids, use_cache=False).last_hidden_state
        return found

    with torch.no_grad():
        expected = call(net)
        errors = [((call(run) - expected).norm() / expected.norm()).item() for run in (alone, exact)]
        alone_s, exact_s = _in_turns([lambda: call(alone), lambda: call(exact)], repeats)
    return {
        "inductor_s": alone_s, "exact_s": exact_s, "inductor_over_exact": alone_s / exact_s,
        "inductor_error": errors[0], "error": errors[1],
    }  # fmt: skip


def _in_turns(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each; all have run before."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
