"""The rows as a page for people and as JSON."""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from zoo.causes import BOUND
from zoo.measure import Row
from zoo.regimes import REGIMES

_HEAD = """\
# The zoo

Every model of `tests/zoo` (random weights, a few layers, nothing downloaded) in every regime that makes a difference to it, under
the preset `exact`. This page is generated:

```text
PYTHONPATH=tests python -m zoo
```

- `true`: attention sites counted while the model runs eagerly (`tests/zoo/truth.py`), independent of the finder.
- A cell of the table is `true/listed/rewritten`, or one number where the three are the same. *Listed* is every site that the
  report speaks of: rewritten, refused, or a miss with its reason. `-`: the regime makes no difference to the model.
- `in graphs`: those of the true sites that reach a backend: not cut in two by a graph break, and their result is used.
- `Inductor`: what Inductor's own `fuse_attention` takes of the same model in the same regime (`counters["inductor"]`).
- `forward`, `gradient`: the largest difference over all regimes in float64 between the rewritten and the plain model, over
  the size of the tensor where that is above 1. Above {bound:.0e} there is a cause, found by taking things away on both sides
  until the difference is gone (`tests/zoo/causes.py`).
- Regimes: {regimes}.

torch {torch}, transformers {transformers}, {machine}; code (a hash of dilcompile and the zoo) {codes}.
"""

_REGIMES = {
    "inference": "eval mode, a mask padded on the right",
    "training": "train mode with gradients, dropout 0",
    "left": "padded on the left, so that rows without keys appear",
    "ones": "a mask of ones",
    "none": "no mask",
    "cache": "prefill of a key-value cache",
    "bf16": "bfloat16",
    "dynamic": "`dynamic=True`",
}


def save(path: Path, rows: Sequence[Row]) -> None:
    """All rows, one a line, under what they were measured with."""
    kept = [{name: held for name, held in row.to_dict().items() if held not in ({}, "", None)} for row in rows]
    lines = ",\n".join(json.dumps(row) for row in kept)
    head = json.dumps({"torch": torch.__version__, "transformers": _transformers(), "machine": platform.machine()})
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


def load(path: Path) -> tuple[dict[str, str], list[Row]]:
    """What ``save`` wrote: what the rows were measured with, and the rows."""
    held = json.loads(path.read_text())
    return {name: text for name, text in held.items() if name != "rows"}, [Row(**row) for row in held["rows"]]


def table(path: Path) -> str:
    """docs/zoo.md, from what ``save`` wrote."""
    measured_with, rows = load(path)
    codes = ", ".join(f"{code} ({number} rows)" for code, number in Counter(row.code for row in rows).most_common())
    regimes = "; ".join(f"`{name}` {text}" for name, text in _REGIMES.items())
    parts = [
        _HEAD.format(bound=BOUND, regimes=regimes, codes=codes, **measured_with),
        _totals(rows),
        *_families(rows),
        _reasons(rows),
        _out_of_reach(rows),
        _causes(rows),
        _errors(rows),
    ]
    return "\n".join(part for part in parts if part)


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)


def _totals(rows: Sequence[Row]) -> str:
    lines = [
        "## Sums",
        "",
        "| regime | rows | true | in graphs | listed | rewritten | refused | missed | Inductor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in REGIMES:
        held = [row for row in rows if row.regime == name and not row.error]
        if not held:
            continue
        counted = [row for row in held if row.fused is not None]
        refused, missed = (sum(sum(getattr(row, kind).values()) for row in held) for kind in ("refused", "missed"))
        fused = f"{sum(row.fused or 0 for row in counted)} of {sum(row.true for row in counted)}" if counted else "-"
        numbers = (
            len(held),
            sum(r.true for r in held),
            sum(r.reached for r in held),
            sum(r.listed for r in held),
            sum(r.rewritten for r in held),
            refused,
            missed,
        )
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {fused} |")
    return "\n".join([*lines, ""])


def _families(rows: Sequence[Row]) -> Iterable[str]:
    families: dict[str, dict[tuple[str, str], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        families[row.family][row.model, row.implementation][row.regime] = row
    counted = [name for name, regime in REGIMES.items() if regime.fusions]
    for family, models in families.items():
        head = ["model", *REGIMES, f"Inductor ({', '.join(counted)})", "forward", "gradient"]
        lines = [f"## {family}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for (model, implementation), held in models.items():
            name = model if implementation == "native" else f"{model} {implementation}"
            cells = [_cell(held.get(regime)) for regime in REGIMES]
            fused = ", ".join(_number(held[name].fused) if name in held else "-" for name in counted)
            worst = [_worst(held.values(), kind) for kind in ("forward", "gradient")]
            lines.append(f"| {' | '.join([name, *cells, fused, *worst])} |")
        yield "\n".join([*lines, ""])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.error:
        return "error"
    counts = (row.true, row.listed, row.rewritten)
    return str(counts[0]) if len(set(counts)) == 1 else "/".join(map(str, counts))


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _worst(rows: Iterable[Row], kind: str) -> str:
    # Half precision is compared for its counts only.
    values = [getattr(row, kind) for row in rows if getattr(row, kind) is not None and row.regime != "bf16"]
    return f"{max(values):.0e}" if values else "-"


def _reasons(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        for kind in ("refused", "missed"):
            for reason, count in getattr(row, kind).items():
                found.setdefault((kind, reason), Counter())[f"{row.model} {row.implementation}"] += count
    if not found:
        return ""
    lines = ["## What stays as it is, and why", "", "| | reason | sites | models |", "|---|---|---|---|"]
    for (kind, reason), models in sorted(found.items(), key=lambda item: -item[1].total()):
        names = sorted({name.removesuffix(" native") for name in models})
        lines.append(f"| {kind} | {reason.replace('|', chr(92) + '|')} | {models.total()} | {', '.join(names)} |")
    return "\n".join([*lines, ""])


def _out_of_reach(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for row in rows:
        if row.reached < row.true:
            found[f"{row.model} {row.implementation}", row.true, row.reached].append(row.regime)
    if not found:
        return ""
    lines = ["## Sites that are in no graph", "", "| model | true | in graphs | regimes |", "|---|---|---|---|"]
    lines += [f"| {name} | {true} | {reached} | {', '.join(regimes)} |" for (name, true, reached), regimes in found.items()]
    return "\n".join([*lines, ""])


def _causes(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.cause]
    if not found:
        return ""
    lines = [
        f"## Differences above {BOUND:.0e}, and what takes them away",
        "",
        "| cause | model | regime | before | after |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: (row.cause, row.model, row.implementation, row.regime)):
        before = max(row.forward or 0.0, row.gradient or 0.0)
        after = "-" if row.after is None else f"{row.after:.0e}"
        lines.append(f"| {row.cause} | {row.model} {row.implementation} | {row.regime} | {before:.0e} | {after} |")
    return "\n".join([*lines, ""])


def _errors(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.error]
    if not found:
        return ""
    lines = ["## Not measured", ""]
    lines += [f"- {row.model} {row.implementation}, {row.regime}: {' '.join(row.error.split())[:300]}" for row in found]
    return "\n".join([*lines, ""])
