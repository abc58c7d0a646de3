"""Verdicts about kernels, and as files in torch's cache folder: one a class of calls."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from dilcompile.lowering.choice import records

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What a check of a kernel found.

    Args:
        of: the result whose error is the largest of its bound.
        error: that error, infinite where a result is not finite but should be.
        bound: the largest that is trusted.
        failure: what the kernel raised; None if it computed. Never written to a file: it may not come again.
    """

    of: str = "out"
    error: float = 0.0
    bound: float = 0.0
    failure: str | None = None

    @property
    def passes(self) -> bool:
        """May the kernel be used?"""
        return self.failure is None and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """The error over its bound."""
        return self.error / self.bound if self.bound else math.inf if self.error else 0.0


def folder() -> Path:
    """Where the files lie."""
    return records.folder("trust")


def read(about: dict[str, str]) -> Verdict | None:
    """The verdict about exactly this, or None if there is no file of that content."""
    try:
        held = records.read(folder(), about) or {}
        found = held["verdict"]
        verdict = Verdict(str(found["of"]), float(found["error"]), float(found["bound"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return None if math.isnan(verdict.error) or not math.isfinite(verdict.bound) else verdict


def write(about: dict[str, str], verdict: Verdict) -> None:
    """Keep a verdict for other processes; a folder that can't be written is no error."""
    held = asdict(verdict)
    del held["failure"]
    try:
        records.write(folder(), about, verdict=held)
    except OSError as error:
        log.info("the verdict about kernel %s could not be kept: %s", about.get("kernel"), error)
