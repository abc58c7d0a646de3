"""What the finder's tests share: float64 on one thread, functions as modules, and what was found in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from spellings import Found, agree
from torch import Tensor, nn

# name, function, its inputs, what is found (see ``said``).
Case = tuple[str, Callable[..., Any], Callable[[], tuple[Any, ...]], str]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """float64 by default, one thread, a fixed seed, for every test of a module that imports it."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Call(nn.Module):
    """A function as a module, with buffers."""

    def __init__(self, function: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def said(found: Found) -> str:
    """What was found, in a line: the mask of a rewritten site, why one was kept, or why none was found."""
    lines = [f"miss: {miss.reason}" for miss in found.misses]
    for outcome in found.outcomes:
        for verdict in outcome.report.verdicts:
            site = verdict.site
            text = str(site.mask) + (" + bias" if site.bias else "") + f" ({site.mask.empty_rows})"
            lines.append(text if hasattr(verdict, "form") else f"kept: {text}")
    return "; ".join(lines) or "nothing"


def check(case: Case, **options: Any) -> Found:
    """The case is exact under ``exact``, forward and in every gradient, and found as its golden says."""
    name, function, inputs, golden = case
    found = agree(function if isinstance(function, nn.Module) else Call(function), *inputs(), **options)
    assert said(found) == golden, name
    return found


# name, module or class, its attribute, what stands there instead, the test that must notice.
Mutation = tuple[str, Any, str, Any, Callable[[], None]]


def must_be_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation's test passes without it and fails with it."""
    _, where, attribute, wrong, test = mutation
    test()
    monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises(AssertionError):
        test()
