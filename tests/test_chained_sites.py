"""Attentions that read each other's output directly: each is rewritten, and what was there before is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finding import Call, double  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor

from dilcompile import rewriting
from dilcompile.policy import Policy


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_queries(x: Tensor, k: Tensor, v: Tensor, few: Tensor) -> Tensor:
    return attend(attend(x, k, v), k, v)


def by_values(x: Tensor, k: Tensor, v: Tensor, few: Tensor) -> Tensor:
    """Agent attention: few tokens collect, all tokens read."""
    return attend(x, few, attend(few, k, v))


def by_keys_behind_views(x: Tensor, k: Tensor, v: Tensor, few: Tensor) -> Tensor:
    collected = attend(x, k, v).transpose(1, 2).contiguous().transpose(1, 2)
    return attend(x, collected, v)


def by_bias(x: Tensor, k: Tensor, v: Tensor, few: Tensor) -> Tensor:
    return (x @ k.mT + attend(x, k, v)[..., :1]).softmax(-1) @ v


CALLS = [by_queries, by_values, by_keys_behind_views, by_bias]


def _policy(check: str) -> Policy:
    rule = {"name": "all", "match": {}, "apply": {"form": "dense"}, "numerics": {"check": check}}
    return Policy.load({"version": 1, "rules": [rule]})


def _both_are_rewritten(call: Callable[..., Any], check: str = "off") -> None:
    inputs = (*(torch.randn(2, 3, 7, 4) for _ in range(3)), torch.randn(2, 3, 5, 4))
    found = agree(Call(call), *inputs, policy=_policy(check))
    assert (found.rewritten, found.misses, found.refusals) == (2, [], [])
    (gm,) = found.graphs
    names = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert sum("dilcompile.attention" in name for name in names) == 2
    assert not any("softmax" in name for name in names)


@pytest.mark.parametrize("check", ["off", "first_call", "compile"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_both_are_rewritten(call: Callable[..., Any], check: str) -> None:
    _both_are_rewritten(call, check)


@pytest.mark.parametrize("call", CALLS[:3], ids=lambda call: call.__name__)
def test_a_read_of_what_was_there_before_is_noticed(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "redirect", lambda output, result: None)
    with pytest.raises(AssertionError):
        _both_are_rewritten(call)
