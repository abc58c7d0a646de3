"""How long `import dilcompile` takes beyond `import torch`: fresh processes, alternating, medians.

python benchmarks/import_time.py [--runs 9] [--limit-ms 50]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

MEASURE = """
import time
import torch
start = time.perf_counter()
{statement}
print((time.perf_counter() - start) * 1e3)
"""


def milliseconds(statement: str) -> float:
    """Time of one statement in a fresh process, after `import torch`."""
    done = subprocess.run([sys.executable, "-c", MEASURE.format(statement=statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--limit-ms", type=float, default=50.0)
    options = parser.parse_args()
    milliseconds("import dilcompile")  # fills the file cache and the .pyc files
    times = [milliseconds("import dilcompile") for _ in range(options.runs)]
    middle = statistics.median(times)
    verdict = "ok" if middle < options.limit_ms else "too slow"
    print(
        f"import dilcompile beyond import torch: median {middle:.1f} ms, min {min(times):.1f}, max {max(times):.1f} "
        f"({options.runs} fresh processes, limit {options.limit_ms:.0f} ms: {verdict})"
    )
    return 0 if middle < options.limit_ms else 1


if __name__ == "__main__":
    sys.exit(main())
