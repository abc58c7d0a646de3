"""What was measured, as JSON and as markdown tables; both are written again with every row, so that nothing is lost."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Cells = Callable[[dict[str, Any]], dict[str, object]]


@dataclass
class Record:
    """The rows of each table, in the order in which they came.

    Args:
        path: of the JSON; the tables lie beside it, as ``.md``.
        tables: by name, what a line of the table shows of a row.
        missing: cases that raised, and what; cases that time left out.
    """

    path: Path
    tables: dict[str, Cells]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, table: str, row: dict[str, Any]) -> str:
        """Take a row and write everything; the line that it makes."""
        self.rows.setdefault(table, []).append(row)
        self.save()
        return "  ".join(f"{title}: {_text(value)}" for title, value in self.tables[table](row).items() if value is not None)

    def save(self) -> None:
        """Write both files."""
        held = {"command": "python benchmarks/gpu", "machine": machine(), **self.rows, "missing": self.missing}
        self.path.write_text(json.dumps(held, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        """The machine, a table of each kind, and what is missing."""
        parts = ["# " + ", ".join(f"{name} {value}" for name, value in machine().items())]
        for table, rows in self.rows.items():
            parts.append(f"## {table}\n\n" + _table([self.tables[table](row) for row in rows]))
        if self.missing:
            parts.append("## Not measured\n\n" + "\n".join(f"- {case}: {why}" for case, why in self.missing.items()))
        return "\n\n".join(parts) + "\n"


def path_in(folder: Path) -> Path:
    """``<device>-<date>.json`` there."""
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return folder / f"{device}-{datetime.date.today().isoformat()}.json"


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def _table(lines: list[dict[str, object]]) -> str:
    titles = list(dict.fromkeys(title for line in lines for title in line))
    made = [titles, ["---"] * len(titles), *([_text(line.get(title)) for title in titles] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in made)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
