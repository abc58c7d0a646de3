"""Form block_sparse as users meet it: an unmodified model against attention under an explicit mask of its blocks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CausalAttention, Stack
from policy_sites import site
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

import dilcompile
from dilcompile.blocks.spec import KINDS, SETS
from dilcompile.forms import BlockSparse
from dilcompile.relation import Problem
from dilcompile.site import MaskSpec

PATTERN = {"any": [{"local": {"before": 1}}, {"global": {"columns": 1}}, {"fixed": {"stride": 3, "offset": 2}}]}


def policy(pattern: Any = PATTERN, block: Any = 16) -> dict[str, Any]:
    return {"version": 1, "rules": [{"name": "b", "apply": {"form": "block_sparse", "block": block, "pattern": pattern}}]}


def mask(length: int, block: int = 16) -> Tensor:
    """What ``PATTERN`` lets through, pair by pair."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        for k in range(t + 1):
            i, j = t // block, k // block
            seen[t, k] = i - 1 <= j <= i or j == 0 or j % 3 == 2
    return seen


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


class Plain(nn.Module):
    def __init__(self, seen: Tensor | None = None) -> None:
        super().__init__()
        self.project, self.seen = nn.Linear(32, 96, dtype=torch.float64), seen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if self.seen is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        return scaled_dot_product_attention(q, k, v, attn_mask=self.seen[: x.shape[1], : x.shape[1]])


def test_a_compiled_model_is_the_model_under_the_mask_of_the_blocks() -> None:
    model = Plain()
    masked = Plain(mask(150))
    masked.load_state_dict(model.state_dict())
    run = torch.compile(model, backend="dilated", options={"policy": policy(), "inner": "eager"}, dynamic=True)
    for length in (150, 97, 16, 3):
        x = torch.randn(2, length, 32, dtype=torch.float64)
        found, expected = run(x), masked(x)
        # float64 throughout: roundings of sums over 150 keys, and over 2 x 150 rows for the weight.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        weight = torch.randn_like(expected)
        mine, theirs = (
            torch.autograd.grad((out * weight).sum(), module.project.weight)[0]
            for out, module in ((found, model), (expected, masked))
        )
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_report_names_the_form_and_calls_it_approximate() -> None:
    model = Stack(CausalAttention).double()
    report = dilcompile.explain(model, torch.randn(1, 64, 32, dtype=torch.float64), policy=policy())
    assert "block_sparse" in str(report)
    assert "approximate" in str(report)


def test_the_density_reported_is_the_density_of_the_mask() -> None:
    relation = BlockSparse(16, PATTERN).relation(Problem(1, 4, 2, 150, 150, 8, 8, is_causal=True))
    assert relation.pairs() == 4 * int(mask(150).sum())
    assert relation.density() == pytest.approx(mask(150).double().mean().item())


def test_the_docs_list_every_pattern_with_its_options() -> None:
    page = (Path(__file__).parents[1] / "docs" / "block_sparse.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.MULTILINE))
    assert set(rows) == {*SETS, *KINDS}
    for name, kind in KINDS.items():
        assert re.findall(r"`(\w+)`", rows[name]) == list(kind.options), name


LENGTHS = {"document": {"lengths": [20, 30, 5]}}


def test_documents_of_a_pattern_share_the_blocks_where_they_meet() -> None:
    q, k, v = (torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(3))
    found = dilcompile.functional.attention(q, k, v, BlockSparse(16, LENGTHS))
    # Blocks 0 to 4 hold documents 0, 0-1, 1, 1-3 and 3, number 3 being what lies behind the last length.
    held = [range(2), range(4), range(1, 4), range(1, 5), range(3, 5)]
    seen = torch.tensor([[key // 16 in held[query // 16] for key in range(70)] for query in range(70)])
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, seen), rtol=0, atol=1e-13)


def test_documents_of_the_site_hold_every_block_of_their_own_exactly() -> None:
    q, k, v = (torch.randn(1, 2, 70, 8, dtype=torch.float64) for _ in range(3))
    starts = torch.tensor([0, 20, 50, 55, 70])
    found = dilcompile.functional.attention(q, k, v, BlockSparse(16, {"document": {}}), cu_seqlens=starts)
    of = torch.bucketize(torch.arange(70), starts, right=True)
    seen = of[:, None] == of
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, seen), rtol=0, atol=1e-13)


@pytest.mark.parametrize("pattern", [LENGTHS, {"any": [{"local": {}}, {"all": [LENGTHS]}]}], ids=str)
def test_lengths_beside_the_documents_of_the_site_are_refused(pattern: Any) -> None:
    form, packed = BlockSparse(16, pattern), replace(site(), mask=MaskSpec(documents=True))
    assert "packed documents" in (form.reject(packed) or "")
    assert form.reject(site()) is None
    assert BlockSparse(16, {"any": [{"document": {}}, {"local": {}}]}).reject(packed) is None
