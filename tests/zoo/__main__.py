"""Measure the whole zoo and write its table.

    PYTHONPATH=tests python -m zoo                                  # everything; hours on one core
    PYTHONPATH=tests python -m zoo --models bert,llama --regimes inference
    PYTHONPATH=tests python -m zoo --table-only                     # docs/zoo.md and the JSON from the rows that are there

Rows are kept in build/zoo.jsonl. A run that was stopped goes on from there; rows measured with other code are measured anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from zoo import ZOO
from zoo.measure import Row
from zoo.record import ROOT, Key, append, read
from zoo.regimes import REGIMES
from zoo.table import save, table

BATCH, MOST_SECONDS = 24, 1800.0


def main() -> None:
    options = _options()
    wanted = list(_keys(options.models, options.regimes))
    if not options.table_only:
        _measure(wanted, options)
    rows = [row for key, row in read(options.rows, options.any_code).items() if key in set(wanted)]
    missing = len(wanted) - len(rows)
    if missing:
        print(f"{missing} of {len(wanted)} rows are not measured yet", file=sys.stderr)
    save(options.json, rows)
    options.table.write_text(table(options.json))
    print(f"{options.table}: {len(rows)} rows")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=names, default=list(ZOO))
    parser.add_argument("--regimes", type=names, default=list(REGIMES))
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "zoo.jsonl")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "zoo.md")
    parser.add_argument("--any-code", action="store_true", help="keep rows that were measured with other code")
    parser.add_argument("--no-inductor", action="store_true", help="don't count Inductor's own fusions: half the time")
    parser.add_argument("--table-only", action="store_true")
    return parser.parse_args()


def _keys(models: list[str], regimes: list[str]) -> Iterable[Key]:
    for regime in regimes:
        for name in models:
            if REGIMES[regime].takes(ZOO[name]):
                for implementation in ZOO[name].implementations:
                    yield (name, implementation, regime)


def _measure(wanted: list[Key], options: argparse.Namespace) -> None:
    path, any_code = options.rows, options.any_code
    arguments = [str(path), *(["--no-inductor"] if options.no_inductor else [])]
    done = read(path, any_code)
    pending = [key for key in wanted if key not in done]
    while pending:
        batch = pending[:BATCH]
        ended = _in_a_process(batch, arguments)
        done = read(path, any_code)
        left = [key for key in batch if key not in done]
        if len(left) == len(batch) or (left and ended):
            # The process died over the first one that is left.
            name, implementation, regime = left[0]
            append(path, Row(name, ZOO[name].family, implementation, regime, error=f"the process ended: {ended}"))
        done = read(path, any_code)
        pending = [key for key in pending if key not in done]


def _in_a_process(batch: list[Key], arguments: list[str]) -> str:
    """Why the process ended before its time; empty if it did not."""
    lines = "\n".join(" ".join(key) for key in batch)
    try:
        command = [sys.executable, "-m", "zoo.worker", *arguments]
        code = subprocess.run(command, input=lines, text=True, timeout=MOST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return f"longer than {MOST_SECONDS:.0f} s"
    return f"exit code {code}" if code else ""


main()
