"""Lanes: tests marked ``slow`` run only with ``--slow``; with ``--gpu`` those marked ``gpu`` run, and no others.

No width from the terminal. Where several workers run: one thread each, what takes longest first, and the native kernel's dtypes shared out.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

# What a test finds about a kernel that it changed must not outlive it.
os.environ["DILCOMPILE_TRUST"] = "memory"
os.environ["DILCOMPILE_TUNE"] = "memory"
# Else Inductor starts processes to compile in, which import torch for the few kernels of a test: here, and in every script that a test runs.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.leave_out_what_changes_nothing()
    interpreter.round_products_once()


@pytest.fixture(autouse=True)
def _plain_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every planned graph that is made."""
    from dilcompile.planned import PlannedCall

    found: list[Any] = []
    begin = PlannedCall.__init__

    def spied(self: Any, *args: Any) -> None:
        begin(self, *args)
        found.append(self)

    monkeypatch.setattr(PlannedCall, "__init__", spied)
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and no others")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu"):
        _need_a_device()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu, slow = config.getoption("--gpu"), config.getoption("--slow")
    left_out = [
        item for item in items if bool(item.get_closest_marker("gpu")) != gpu or (item.get_closest_marker("slow") and not slow)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # No worker is left with one of them when the others have nothing to do.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Tests and modules stay: a tenth of the time would go into looking whether they are garbage, with each graph that is compiled.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    _share_out_the_native_kernel(session)


def pytest_unconfigure() -> None:
    gc.unfreeze()


def _share_out_the_native_kernel(session: pytest.Session) -> None:
    """Workers compile it for a dtype each, else all wait for the one that needs it first."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or not any(item.path.name == "test_native.py" for item in session.items):
        return
    from dilcompile.lowering.native import build

    own = int(worker["workerid"].removeprefix("gw"))
    for dtype in list(build.ELEMENTS)[own :: worker["workercount"]]:
        build.library(dtype)


def _need_a_device() -> None:
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("--gpu: torch finds no CUDA device here")
