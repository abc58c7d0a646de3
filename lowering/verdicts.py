"""Verdicts about kernels as files in torch's cache folder: one a class of calls, written whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dilcompile.lowering import digest

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
    """Where the files lie: beside what torch compiles, so that ``TORCHINDUCTOR_CACHE_DIR`` moves them too.

    Raises:
        OSError: if torch's folder is not there and can't be made.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "dilcompile" / "trust"


def read(about: dict[str, str]) -> Verdict | None:
    """The verdict about exactly this, or None if there is no file of that content."""
    try:
        held = json.loads(_path(about).read_text())
        if not isinstance(held, dict) or held.get("about") != about:
            return None
        found = held["verdict"]
        verdict = Verdict(str(found["of"]), float(found["error"]), float(found["bound"]))
    except (OSError, ValueError, TypeError, KeyError):
        # A file cut short or of another origin says nothing: the check is made again, and its file replaces this one.
        return None
    return None if math.isnan(verdict.error) or not math.isfinite(verdict.bound) else verdict


def write(about: dict[str, str], verdict: Verdict) -> None:
    """Keep a verdict for other processes; a folder that can't be written is no error."""
    held = asdict(verdict)
    del held["failure"]
    try:
        path = _path(about)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"about": about, "verdict": held}, file, indent=1)
            # Processes that write at once each replace the whole file.
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        log.info("the verdict about kernel %s could not be kept: %s", about.get("kernel"), error)


def _path(about: dict[str, str]) -> Path:
    return folder() / f"{digest.of_text(json.dumps(about, sort_keys=True))}.json"
