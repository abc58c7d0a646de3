"""CPU forms beside dense SDPA and compiled FlexAttention with the same mask, in one process, taken in turns; medians.

    OMP_NUM_THREADS=2 python benchmarks/forms.py --lengths 4096 16384 --dtypes float32 bfloat16

``ideal`` is the time that the form's pairs take at the rate of dense SDPA in the same turns, under the same causal mask.
FlexAttention gets the BlockMask of the same pairs and has no backward on CPUs; it is compiled before anything is timed. The pairs
that are computed are those of the listed blocks, whole (``executed``); extra memory is the peak of the process during a forward
beyond inputs and outputs, also for each listed block of one head. Writes benchmarks/results/cpu_forms.json, or what ``--results``
names, after each row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dilcompile.bench import extra_memory, machine
from dilcompile.forms import BlockSparse, Dense, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.generators import Blocks
from dilcompile.relation import Problem, Relation

HEADS, HEAD_DIM, BLOCK, WINDOW = 8, 64, 64, 512
RESULTS = Path(__file__).parent / "results" / "cpu_forms.json"
LOCAL = BlockSparse(BLOCK, {"local": {"before": WINDOW // BLOCK}})


def main() -> None:
    """Print one line per case and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for length in asked.lengths:
        for name in asked.dtypes:
            for case in _cases(length):
                rows.append(_row(*case, getattr(torch, name), asked.repeats))
                print(json.dumps(rows[-1]), flush=True)
                command = " ".join(["python benchmarks/forms.py", *sys.argv[1:]])
                held = {"command": command, "machine": machine(), "rows": rows}
                asked.results.write_text(json.dumps(held, indent=1) + "\n")


def _cases(length: int) -> Iterator[tuple[str, Form, Problem, BlockSparse | None, Problem]]:
    """Name, form, its site, and the blocks that hold the same pairs with the site that these stand in."""
    columns = length // BLOCK
    some = tuple(range(1, columns, max(1, columns // 5)))
    bigbird = BlockSparse(BLOCK, {"bigbird": {"random": max(1, columns // 10 - 4)}})
    slash = BlockSparse(BLOCK, {"vertical_slash": {"verticals": some, "slashes": (0, *some)}})
    both = Problem(1, HEADS, HEADS, length, length, HEAD_DIM, HEAD_DIM)
    causal = replace(both, is_causal=True)
    yield "dense", Dense(), both, None, both
    yield "dense, causal", Dense(), causal, None, causal
    yield f"window {WINDOW}, causal", SlidingWindow(WINDOW), causal, LOCAL, replace(causal, window_left=WINDOW - 1)
    yield f"local {WINDOW}, causal", LOCAL, causal, LOCAL, causal
    yield "bigbird", bigbird, both, bigbird, both
    yield "vertical_slash, causal", slash, causal, slash, causal


def _row(
    name: str, form: Form, site: Problem, blocks: BlockSparse | None, inside: Problem, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, site.q_len, HEADS, HEAD_DIM).to(dtype).transpose(1, 2) for _ in range(3))
    relation = form.relation(site)
    share = relation.pairs() / (HEADS * (site.q_len * (site.q_len + 1) // 2 if site.is_causal else site.q_len**2))

    def forward() -> object:
        return attention(q, k, v, form, is_causal=site.is_causal)

    def dense() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=site.is_causal)

    runs: list[Callable[[], object]] = [forward, dense]
    if blocks is not None:
        runs.append(_flex(q, k, v, blocks.block_mask(inside)))
        found, peer = runs[0](), runs[2]()
        assert isinstance(found, Tensor)
        assert isinstance(peer, Tensor)
        _assert_right({"the form": found, "FlexAttention": peer}, (q, k, v), blocks.block_mask(inside))
    seconds, dense_seconds, *flex_seconds = _in_turns(runs, repeats)
    both, dense_both = _in_turns([_training(forward, q, k, v), _training(dense, q, k, v)], max(3, repeats // 2))
    row: dict[str, Any] = {
        "form": name, "length": site.q_len, "dtype": str(dtype).removeprefix("torch."), "density": share,
        "forward_s": seconds, "dense_over_forward": dense_seconds / seconds,
        "forward_over_ideal": seconds / (share * dense_seconds),
        "dense_over_both": dense_both / both, "both_over_ideal": both / (share * dense_both),
    }  # fmt: skip
    row |= _executed(relation if blocks is None else blocks.relation(inside))
    row |= _memory(forward, row)
    if flex_seconds:
        row["flex_over_forward"] = flex_seconds[0] / seconds
    return row


def _assert_right(found: dict[str, Tensor], operands: tuple[Tensor, Tensor, Tensor], mask: BlockMask) -> None:
    """Are the largest errors, ours and FlexAttention's, at most twice dense SDPA's? Against float64, in rows spread over all."""
    q, k, v = operands
    rows = torch.arange(0, q.shape[2], max(1, q.shape[2] // 64))
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), rows[:, None], torch.arange(k.shape[2]))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = sdpa(*(x.double() for x in (q[:, :, rows], k, v)), attn_mask=seen)
    allowed = 2 * (sdpa(q[:, :, rows], k, v, attn_mask=seen) - exact).abs().max().item()
    for name, out in found.items():
        error = (out[:, :, rows] - exact).abs().max().item()
        if not error <= allowed:
            raise AssertionError(f"the largest error of {name} is {error:.3g}, twice that of dense SDPA {allowed:.3g}")


def _executed(relation: Relation) -> dict[str, Any]:
    """The listed blocks of one head, and the share of all pairs that lies in them."""
    size, generator = relation.problem, relation.terms[0].generator
    if not isinstance(generator, Blocks):
        return {}
    lists = generator.lists(0, generator.grid)
    queries, keys = (
        np.minimum((number + 1) * BLOCK, length) - number * BLOCK
        for number, length in ((lists.owners(), size.q_len), (lists.blocks, size.k_len))
    )
    return {"blocks": len(lists), "executed": int((queries * keys).sum()) / (size.q_len * size.k_len)}


def _memory(forward: Callable[[], object], row: dict[str, Any]) -> dict[str, Any]:
    """Extra memory of a forward, and of one listed block's share; Linux only."""

    def kept() -> list[Tensor]:
        out = forward()
        assert isinstance(out, Tensor)
        return [out]

    found = extra_memory(kept)
    if found and "blocks" in row:
        found["extra_bytes_per_block"] = found["extra_peak_bytes"] / row["blocks"]
    return found


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], object]:
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def _training(forward: Callable[[], object], *operands: Tensor) -> Callable[[], object]:
    """The forward and the gradients of all operands."""
    grad = torch.ones_like(operands[0])

    def both() -> object:
        for x in operands:
            x.requires_grad_()
        out = forward()
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out, operands, grad)
        for x in operands:
            x.requires_grad_(False)
        return grads

    return both


def _in_turns(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, after one run of each."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn > 0:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
