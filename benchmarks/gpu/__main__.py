"""Attention on a CUDA device: the union kernel against the best dense flash and compiled FlexAttention, a million keys, decoding,
blocks, and every kernel beside the others.

    PYTHONPATH=. python benchmarks/gpu

The first table is what matters most; the others follow as time allows. In one process and in turns; medians of times between
device events. Writes benchmarks/results/<device>-<date>.json and .md with every row, and prints the rows. ``make gpu`` runs it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import blocks
import longest
import record
import routes
import steps
import torch
import union

TABLES: dict[str, record.Cells] = {
    "union": union.cells,
    "longest": longest.cells,
    "decode": steps.cells,
    "blocks": blocks.cells,
    "routes": routes.cells,
}


class Case(NamedTuple):
    """A row to be measured."""

    table: str
    what: str
    measure: Callable[[], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--longest", type=int, default=1 << 20, help="keys of the one long run; 0: none")
    parser.add_argument("--caches", type=int, nargs="*", default=[32768, 131072], help="keys that a decode step has")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="of a decode step")
    parser.add_argument(
        "--until", type=float, help="seconds since 1970 (date +%%s) after which no row is begun; default: all rows"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent.parent / "results")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    held, raised = record.Record(record.path_in(asked.results), TABLES), False
    for case in cases(asked):
        if asked.until is not None and time.time() > asked.until:
            held.missing[case.what] = "no time was left"
            continue
        try:
            print(f"{case.what}:  {held.add(case.table, case.measure())}", flush=True)
        except Exception as error:
            # One that fails costs no other its row.
            traceback.print_exc()
            held.missing[case.what], raised = f"{type(error).__name__}: {error}", True
        # What the last one compiled and allocated.
        torch.compiler.reset()
        torch.cuda.empty_cache()
    held.save()
    print(held.path, held.path.with_suffix(".md"))
    return int(raised)


def cases(asked: argparse.Namespace) -> Iterator[Case]:
    """The most important first; causal before all keys."""
    sizes = list(product(asked.lengths, asked.head_dims))
    for causal, (length, head_dim) in product((True, False), sizes):
        what = f"union, S {length}, D {head_dim}, {'causal' if causal else 'all keys'}"
        yield Case("union", what, partial(union.measure, length, head_dim, causal, asked.repeats))
    if asked.longest:
        yield Case("longest", f"S {asked.longest}", partial(longest.measure, asked.longest))
    for length, batch in product(asked.caches, asked.batches):
        yield Case("decode", f"decode, {length} keys, batch {batch}", partial(steps.measure, length, batch, asked.repeats))
    for causal, (length, head_dim) in product((True, False), sizes):
        what = f"blocks, S {length}, D {head_dim}, {'causal' if causal else 'all keys'}"
        yield Case("blocks", what, partial(blocks.measure, length, head_dim, causal, asked.repeats))
    for relation, (length, head_dim) in product(routes.RELATIONS, sizes):
        what = f"routes, {relation}, S {length}, D {head_dim}"
        yield Case("routes", what, partial(routes.measure, relation, length, head_dim, asked.repeats))


if __name__ == "__main__":
    sys.exit(main())
