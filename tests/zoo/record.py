"""Rows on disk: one JSON line a row, written as soon as it is known, so that a run that was cut short goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zoo.measure import Row

Key = tuple[str, str, str]
ROOT = Path(__file__).resolve().parents[2]
_EMPTY: dict[str, Any] = {
    "refused": {},
    "missed": {},
    "masks": {},
    "notes": {},
    "cause": "",
    "error": "",
    "code": "",
    "after": None,
}


@cache
def code() -> str:
    """A short hash of everything that decides what a row says: a row of other code is measured anew."""
    digest = hashlib.sha256()
    for folder in ("dilcompile", "passes", "lowering", "tests/zoo"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not (
                folder == "dilcompile" and file.relative_to(ROOT / folder).parts[0] in ("passes", "lowering", "cli", "report")
            ):
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


@cache
def models() -> str:
    """A short hash of the models alone, which decide what Inductor fuses of them."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted((ROOT / "tests/zoo").glob("*.py")):
        if file.stem not in ("__main__", "causes", "measure", "record", "table", "truth", "worker"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def fusions(path: Path) -> dict[Key, int]:
    """What Inductor fuses, as counted before with these models."""
    found: dict[Key, int] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        held = json.loads(line)
        if held["models"] == models() and held["fused"] is not None:
            found[held["model"], held["implementation"], held["regime"]] = held["fused"]
    return found


def key(row: Row) -> Key:
    return (row.model, row.implementation, row.regime)


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: value for name, value in row.to_dict().items() if _EMPTY.get(name, ...) != value}
    with path.open("a") as file:
        file.write(json.dumps({"code": code(), "models": models(), **held}) + "\n")


def read(path: Path, any_code: bool = False) -> dict[Key, Row]:
    """The last row of each model, implementation and regime; those of this code only, unless ``any_code``."""
    return {key(row): row for row in _rows(path, any_code)}


def _rows(path: Path, any_code: bool) -> Iterator[Row]:
    names = {field.name for field in fields(Row)}  # of which ``append`` adds the code
    for line in path.read_text().splitlines() if path.exists() else ():
        held = json.loads(line)
        if any_code or held["code"] == code():
            yield Row(**{name: value for name, value in held.items() if name in names})
