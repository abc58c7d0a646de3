"""The main job on a real model: SmolLM2-135M, its own weights, a novel's opening, and one policy file.

python examples/demo.py [--tokens 4096] [--policy FILE|PRESET] [--runs 3] [--seconds 220] [--inner INNER] [--report FILE]

Both models are compiled by the same inner compiler; the only difference is backend="dilated". Perplexity is computed from the
same tokens, times are medians of interleaved runs after a warm-up. What the policy approximates is said, not hidden.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import smollm2
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import dilcompile
from dilcompile.decision import Decision

HERE = Path(__file__).parent


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).exp().item()


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def alone(decision: Decision, lengths: list[int]) -> list[tuple[int, float, float, float]]:
    """Milliseconds of one attention of the decided site: (length, SDPA with a mask tensor, SDPA told it is causal, as decided).

    The compiled model calls the first: keys and values expanded to all heads and a boolean mask of all pairs.
    """
    site, rows = decision.site, []
    for length in lengths:
        q = torch.randn(1, site.heads, length, site.head_dim)
        k, v = (torch.randn(1, site.kv_heads, length, site.head_dim) for _ in range(2))
        k_full, v_full = (x.repeat_interleave(site.group, dim=1) for x in (k, v))
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        ways = (
            partial(F.scaled_dot_product_attention, q, k_full, v_full, attn_mask=mask),
            partial(F.scaled_dot_product_attention, q, k_full, v_full, is_causal=True),
            partial(dilcompile.functional.attention, q, k, v, decision.form, is_causal=True),
        )
        times = [[timed(way)[0] * 1e3 for way in ways] for _ in range(4)][1:]
        masked, causal, decided = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append((length, masked, causal, decided))
    return rows


def crossover(rows: list[tuple[int, float, float, float]]) -> str:
    """Where the decided form starts to win over the best dense call, in words."""
    slower = [length for length, _, causal, decided in rows if decided >= causal]
    if not slower:
        return f"It is faster than causal SDPA at every length tried, from {rows[0][0]} on."
    if len(slower) == len(rows):
        return f"It is slower than causal SDPA at every length tried, up to {rows[-1][0]}."
    return (
        f"It is slower than causal SDPA at {', '.join(map(str, slower))}: there the form holds most of the pairs anyway, and "
        "planning, splitting and merging are not paid back."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--policy", default=str(HERE / "demo_policy.yaml"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=220, help="no further round of runs when it would end later than this")
    parser.add_argument("--inner", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--report", default="report/demo.html")
    options = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    torch.manual_seed(0)
    Path(options.report).parent.mkdir(parents=True, exist_ok=True)

    def step(text: str, work: Callable[[], Any]) -> Any:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
            progress.add_task(text)
            return work()

    console.rule("dilcompile on SmolLM2-135M-Instruct (weights read from 4-bit GGUF, computed in float32)")
    model, tokenizer = step("reading the weights", smollm2.load)
    ids = smollm2.text_tokens(tokenizer, options.tokens)
    console.print(
        f"text: {smollm2.TEXT.name}, {ids.shape[1]} tokens; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    def call(compiled: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return compiled(input_ids=ids, use_cache=False).logits

        return run

    explain = lambda: dilcompile.explain(model, input_ids=ids, use_cache=False, policy=options.policy)  # noqa: E731
    report = step("finding and deciding every attention", explain)
    console.print(report)

    asked = {"the policy": {"policy": options.policy, "inner": options.inner, "report": options.report}}
    if options.policy != "exact":
        asked = {"exact": {"policy": "exact", "inner": options.inner}, **asked}
    variants = {"dense": call(torch.compile(model, backend=options.inner, dynamic=False))}
    for name, held in asked.items():
        variants[name] = call(torch.compile(model, backend="dilated", dynamic=False, options=held))
    first, perplexities = {}, {}
    for name, run in variants.items():
        first[name], logits = step(f"{name}: compiling with {options.inner}, first run", partial(timed, run))
        perplexities[name] = perplexity(logits, ids)
        del logits
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.runs):
        spent = time.perf_counter() - started
        if number and spent + sum(held[-1] for held in times.values()) > options.seconds:
            console.print(f"{number} of {options.runs} rounds: another would take longer than --seconds {options.seconds}")
            break
        for name, run in variants.items():
            times[name].append(step(f"{name}: run {number + 1} of {options.runs}", partial(timed, run))[0])
    medians = {name: statistics.median(held) for name, held in times.items()}

    rounds = len(times["dense"])
    table = Table(title=f"{options.tokens} tokens, {rounds} interleaved runs")
    for heading in ("", "perplexity", "change", "median s", "of dense", "fastest s", "first run with compiling, s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in perplexities.items():
        change = "" if name == "dense" else f"{value / perplexities['dense'] - 1:+.1%}"
        part = f"{medians[name] / medians['dense']:.2f}"
        table.add_row(name, f"{value:.2f}", change, f"{medians[name]:.2f}", part, f"{min(times[name]):.2f}", f"{first[name]:.1f}")
    console.print(table)

    approximate = [decision for decision in report.decisions if decision.fidelity == "approximate"]
    reach = ": they attend to fewer keys than the model was trained with" if approximate else ""
    console.print(
        "dense: torch.compile as it is. exact: backend=dilated, the same pairs as before, without the mask tensor. "
        f"the policy: {Path(options.policy).name}.\n"
        f"{len(report.decisions)} of {len(report.sites)} sites were rewritten by the policy, "
        f"{len(approximate)} of them approximately{reach}."
    )
    if any(max(held) > 1.3 * min(held) for held in times.values()):
        console.print("The runs of one row differ by more than 30 %: something else uses this machine, and the times say little.")
    elif medians["the policy"] >= medians["dense"]:
        console.print("The rewritten model is slower here: at this length it saves too few pairs to pay for its pieces.")
    if approximate:
        lengths = [length for length in (512, 1024, 2048, 4096, 8192) if length <= 2 * options.tokens]
        rows = step("timing one attention alone", lambda: alone(approximate[0], lengths))
        table = Table(title=f"one attention alone ({approximate[0].form}), milliseconds")
        for heading in ("length", "SDPA, mask tensor (the compiled model)", "SDPA, causal", "as decided"):
            table.add_column(heading, justify="right")
        for length, *milliseconds in rows:
            table.add_row(str(length), *(f"{value:.1f}" for value in milliseconds))
        console.print(table, crossover(rows), sep="\n")
    console.print(f"report: {options.report}   total: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
