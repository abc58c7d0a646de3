"""Orders of the tokens of a grid: blocks of a neighbourhood, and what attention over them takes on a CPU beside dense SDPA.

    OMP_NUM_THREADS=1 python benchmarks/orders.py

``blocks``, ``full``: those that hold pairs of tokens at most ``radius`` apart along every axis, and the share of them that hold
nothing else. Times are medians, taken in turns, of attention over all pairs of these blocks (pattern ``near``), tokens moved to
their order and back included. Writes benchmarks/results/orders.json.
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
from torch import Tensor

from dilcompile.bench import machine
from dilcompile.blocks.curve import Curve, OrderName
from dilcompile.blocks.fullness import fullness
from dilcompile.forms import BlockSparse
from dilcompile.functional import attention

HEADS, HEAD_DIM = 8, 64
GRIDS: dict[str, tuple[int, ...]] = {"image": (64, 64), "video": (8, 32, 32)}
ORDERS: tuple[OrderName, ...] = ("row", "morton", "hilbert")
RESULTS = Path(__file__).parent / "results" / "orders.json"


def main() -> None:
    """Print one row of a table per case and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--radii", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="0: count only")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| grid | radius | order | blocks | density | full | forward | forward and backward |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, grid in GRIDS.items():
        found = [_counted(name, grid, radius, asked.block, order) for radius in asked.radii for order in ORDERS]
        if asked.repeats:
            _time(found, grid, getattr(torch, asked.dtype), asked.repeats)
        rows += found
        for row in found:
            print(_line(row), flush=True)
    if asked.repeats:
        command = " ".join(["python benchmarks/orders.py", *sys.argv[1:]])
        held = {"command": command, "machine": machine(), "rows": rows}
        RESULTS.write_text(json.dumps(held, indent=1) + "\n")


def _counted(name: str, grid: tuple[int, ...], radius: int, block: int, order: OrderName) -> dict[str, Any]:
    found = fullness(Curve(order, grid), radius, block)
    return {
        "grid": name, "sizes": list(grid), "radius": radius, "block": block, "order": order, "blocks": found.blocks,
        "full": found.full, "density": found.density, "pairs": found.pairs,
    }  # fmt: skip


def _time(rows: list[dict[str, Any]], grid: tuple[int, ...], dtype: torch.dtype, repeats: int) -> None:
    """Add the times of each row, and of dense SDPA in the same turns."""
    torch.manual_seed(0)
    length = torch.Size(grid).numel()
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM).to(dtype).transpose(1, 2) for _ in range(3))
    grad = torch.ones_like(q)

    def once(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, float]:
        start = time.perf_counter()
        attend(q, k, v)
        middle = time.perf_counter()
        operands = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(attend(*operands), operands, grad)
        return middle - start, time.perf_counter() - middle

    runs = [_attention(row) for row in rows] + [torch.nn.functional.scaled_dot_product_attention]
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            if turn:
                taken.append(once(run))
            else:
                once(run)
    medians = [[statistics.median(part) for part in zip(*taken, strict=True)] for taken in times]
    for row, (forward, both) in zip(rows, medians, strict=False):
        row |= {"forward_s": forward, "both_s": both, "dense_forward_s": medians[-1][0], "dense_both_s": medians[-1][1]}


def _attention(row: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    form = BlockSparse(row["block"], {"near": {"radius": row["radius"]}}, order=row["order"], grid=tuple(row["sizes"]))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, form, kernel="native")
        assert isinstance(out, Tensor)
        return out

    return attend


def _line(row: dict[str, Any]) -> str:
    cells = [
        " x ".join(map(str, row["sizes"])), row["radius"], row["order"], row["blocks"], f"{row['density']:.1%}",
        f"{row['full'] / row['blocks']:.0%}",
    ]  # fmt: skip
    for part in ("forward", "both"):
        if f"{part}_s" in row:
            dense = row[f"dense_{part}_s"]
            cells.append(f"{row[f'{part}_s'] * 1e3:.0f} ms ({dense / row[f'{part}_s']:.1f} x dense)")
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
