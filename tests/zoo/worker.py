"""Measures rows in a process of its own, until all are done or its memory is full; run by ``python -m zoo``."""

from __future__ import annotations

import gc
import logging
import resource
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from zoo import ZOO
from zoo.measure import Row, compiles, measure
from zoo.record import Key, append, fusions
from zoo.regimes import REGIMES

MOST_MEMORY = 4 * 1024**2  # KiB, as getrusage counts


def work(keys: list[Key], path: Path, inductor: bool) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    counted = fusions(path)
    for name, implementation, regime in keys:
        fused = counted.get((name, implementation, regime))
        start = time.perf_counter()
        try:
            row = measure(ZOO[name], implementation, REGIMES[regime], inductor=inductor and fused is None)
            row = row if fused is None else replace(row, fused=fused)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error).strip()[:400]} ({Path(where.filename).name}:{where.lineno})"
            if not compiles(ZOO[name], implementation, REGIMES[regime]):
                reason = f"torch.compile without any rewriting fails alike: {reason}"
            row = Row(name, ZOO[name].family, implementation, regime, error=reason)
        append(path, row)
        print(f"{time.perf_counter() - start:6.1f} s  {regime:10} {name} {implementation}  {summary(row)}", flush=True)
        gc.collect()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MOST_MEMORY:
            return


def summary(row: Row) -> str:
    if row.error:
        return f"ERROR {row.error.splitlines()[0][:150]}"
    numbers = " ".join(f"{held:.0e}" for held in (row.forward, row.gradient) if held is not None)
    return f"{row.true} true, {row.listed} listed, {row.rewritten} rewritten; {numbers} {row.cause}"


if __name__ == "__main__":
    work(
        [tuple(line.split()) for line in sys.stdin.read().splitlines()],
        Path(sys.argv[1]),
        inductor="--no-inductor" not in sys.argv,
    )  # type: ignore[misc]
