"""A ring of ranks in one process: which rank attends to whose keys in which step, drawn, and the same numbers as on one rank.

    python examples/ring.py
    python examples/ring.py --order zigzag --causal
    python examples/ring.py --window 12 --method gather_needed --causal
"""

from __future__ import annotations

import argparse

import torch

from dilcompile import distributed, functional
from dilcompile.placements import ORDERS, PLACEMENTS, RankSchedule, Shards

LENGTH, HEADS, HEAD_DIM = 64, 4, 16


def drawing(schedules: tuple[RankSchedule, ...], shards: Shards, is_causal: bool) -> str:
    """A line for every ``cell`` query positions, a column for every ``cell`` keys: the step in which they meet."""
    cell = max(1, shards.length // 32)
    steps: dict[tuple[int, int], int] = {}
    for schedule in schedules:
        for number, step in enumerate(schedule.steps):
            keys = {key for rows in step.attended for part in rows.positions for key in part.positions()}
            steps |= {(schedule.rank, key): number for key in keys}
    lines = [f"{'query':>5} {'rank':>4}  step in which it meets the keys 0, {cell}, {2 * cell}, ..."]
    for query in range(0, shards.length, cell):
        rank, _ = shards.owner(query)
        seen = range(query + 1 if is_causal else shards.length)
        met = ["." if key not in seen else str(steps.get((rank, key), "-")) for key in range(0, shards.length, cell)]
        lines.append(f"{query:5} {rank:4}  {' '.join(met)}")
    return "\n".join(lines)


def travels(schedules: tuple[RankSchedule, ...]) -> str:
    """Who sends whom how many rows, step by step."""
    lines = []
    for number in range(len(schedules[0].steps)):
        arrows = [
            f"{schedule.rank}->{each.peer}: {each.count}" for schedule in schedules for each in schedule.steps[number].sends
        ]
        lines.append(f"step {number}  " + (", ".join(arrows) or "own keys, nothing is sent"))
    return "\n".join(lines)


def main() -> None:
    """Draw what the options say."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--method", choices=list(PLACEMENTS), default="ring")
    options.add_argument("--order", choices=ORDERS, default="contiguous")
    options.add_argument("--causal", action="store_true")
    options.add_argument("--window", type=int, help="keys near the query alone")
    said = options.parse_args()
    form = {"form": "dense"} if said.window is None else {"form": "sliding_window", "window": said.window}

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, HEAD_DIM, dtype=torch.float64) for _ in range(3))
    made = distributed.simulate(
        q, k, v, form, ranks=said.ranks, method=said.method, order=said.order, is_causal=said.causal
    )
    shards = Shards(LENGTH, said.ranks, said.order)
    print(drawing(made.schedules, shards, said.causal))
    print()
    print("rows of keys and values (heads x positions) that travel:")
    print(travels(made.schedules))
    alone = functional.attention(q, k, v, form, is_causal=said.causal)
    print()
    print(f"bytes sent by the ranks: {', '.join(map(str, made.sent))}")
    print(f"largest difference from one rank: {(made.out - alone).abs().max():.1e}")


if __name__ == "__main__":
    main()
