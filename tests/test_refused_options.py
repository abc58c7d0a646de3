"""Options that a site can't take are known before it runs: explain, compile and export leave it as it is, with the reason."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dilcompile
from dilcompile import DilcompileWarning, RewriteError
from dilcompile.decision import Rejection

GROUPED = {"form": "dilated", "segments": [4] * 5, "rates": [1] * 5, "heads": "grouped"}
DILATED = {"form": "dilated", "segments": [8, 16], "rates": [1, 2]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (GROUPED, "dilated can't be given to it: heads='grouped' gives every branch a group of heads, but there are 5 branches"),
    ({**DILATED, "kernel": "sdpa"}, "kernel sdpa can't compute dilated on it: the relation is"),
    (
        {"form": "dense", "kernel": "flash"},
        "kernel flash can't compute dense on it: the tensors are on cpu, not on a CUDA device",
    ),
]
TAKEN: list[dict[str, Any]] = [
    {**GROUPED, "segments": [4] * 4, "rates": [1] * 4},
    {**DILATED, "kernel": "reference"},
    {"form": "dense", "kernel": "sdpa"},
]


class Attention(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def policy(apply: dict[str, Any], unsupported: str) -> dict[str, Any]:
    return {"rules": [{"name": "r", "apply": apply, "fallback": {"unsupported": unsupported}}]}


def q() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 4, 16, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_compile(apply: dict[str, Any], unsupported: str) -> Tensor:
    options = {"policy": policy(apply, unsupported), "inner": "eager"}
    found: Tensor = torch.compile(Attention(), backend="dilated", options=options)(q())
    return found


def by_export(apply: dict[str, Any], unsupported: str) -> Tensor:
    program = dilcompile.rewrite_exported(torch.export.export(Attention(), (q(),)), policy(apply, unsupported))
    found: Tensor = program.module()(q())
    return found


@pytest.mark.parametrize(("apply", "reason"), REFUSED)
@pytest.mark.parametrize("run", [by_compile, by_export])
def test_the_site_runs_as_the_model_has_it(run: Any, apply: dict[str, Any], reason: str) -> None:
    with pytest.warns(DilcompileWarning, match=re.escape(reason)):
        found = run(apply, "warn")
    assert torch.equal(found, Attention()(q()))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DilcompileWarning)
        assert torch.equal(run(apply, "keep"), Attention()(q()))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape(reason)) as caught:
        run(apply, "error")
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), RewriteError)


@pytest.mark.parametrize(("apply", "reason"), REFUSED)
def test_explain_says_it(apply: dict[str, Any], reason: str) -> None:
    report = dilcompile.explain(Attention(), q(), policy=policy(apply, "error"))
    (verdict,) = report.graphs[0].verdicts
    assert isinstance(verdict, Rejection)
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize("apply", TAKEN)
@pytest.mark.parametrize("run", [by_compile, by_export])
def test_the_same_options_where_they_can_be_had(run: Any, apply: dict[str, Any]) -> None:
    form = {key: value for key, value in apply.items() if key != "kernel"}
    expected = dilcompile.functional.attention(q(), q(), q(), form, is_causal=True, kernel="reference")
    torch.testing.assert_close(run(apply, "error"), expected, rtol=1e-12, atol=1e-12)


def test_a_rejected_rule_of_few_heads_leaves_other_sites_to_it() -> None:
    class Two(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return Attention()(q)[:, :2] + Attention()(q[:, :2])

    grouped = {**GROUPED, "segments": [4] * 3, "rates": [1] * 3}
    report = dilcompile.explain(Two(), q(), policy=policy(grouped, "warn"))
    found = {verdict.site.heads: isinstance(verdict, Rejection) for verdict in report.graphs[0].verdicts}
    assert found == {4: False, 2: True}
