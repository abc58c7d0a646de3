"""Patterns and BlockMasks: the tables that torch makes of the same pairs, the attention that FlexAttention computes, and back again."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Setting, counts
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

import dilcompile.functional
from dilcompile.blocks import block_mask
from dilcompile.errors import FormError
from dilcompile.forms import BlockSparse, parse_form
from dilcompile.relation import Problem

PATTERNS: dict[str, Any] = {
    "local": {"local": {"before": 1, "behind": 1}},
    "global": {"global": {"columns": 1, "rows": 1}},
    "strided": {"strided": {"stride": 3}},
    "dilated_sliding": {"dilated_sliding": {"dilation": 2, "blocks": 1}},
    "fixed": {"fixed": {"stride": 3, "offset": 1}},
    "vertical_slash": {"vertical_slash": {"verticals": [0, 2], "slashes": [0, 3]}},
    "hierarchical": {"hierarchical": {"spans": [1, 3], "heads": [1]}},
    "random": {"random": {"blocks": 2, "seed": 3}},
    "random_by_head": {"random": {"blocks": 2, "by_head": True}},
    "explicit": {"explicit": {"starts": [0, 1, 3, 4], "columns": [0, 0, 2, 1]}},
    "document": {"document": {"lengths": [20, 33, 12]}},
    "bigbird": {"bigbird": {"random": 1}},
    "longformer": {"longformer": {}},
    "any": {"any": [{"local": {}}, {"random": {"blocks": 1, "by_head": True}}]},
    "all": {"all": [{"strided": {"stride": 2}}, {"local": {"before": 2}}]},
}
HEADS = 2
PROBLEM = Problem(1, HEADS, HEADS, 90, 90, 8, 8)
PROBLEMS = {
    "ragged": PROBLEM,
    "causal": replace(PROBLEM, is_causal=True),
    "causal_whole": replace(PROBLEM, q_len=96, k_len=96, is_causal=True),
    "window": replace(PROBLEM, is_causal=True, window_left=20),
    "both_sides": replace(PROBLEM, window_left=9, window_right=30),
    "more_keys": replace(PROBLEM, q_len=40, k_len=90, q_offset=32, is_causal=True),
    "more_queries": replace(PROBLEM, q_len=90, k_len=50),
}
BLOCKS: list[Any] = [16, (32, 16), (16, 48)]


def by_turns(of_each: int) -> list[tuple[str, str]]:
    """(pattern, problem): each pattern meets so many problems, and each problem a share of the patterns."""
    names = list(PROBLEMS)
    return [(pattern, names[(n + 3 * i) % len(names)]) for n, pattern in enumerate(PATTERNS) for i in range(of_each)]


def pairs(form: BlockSparse, at: Problem) -> Tensor:
    """The pairs [heads, queries, keys] by the definitions."""
    setting = Setting(at.heads, at.kv_heads, at.q_len, at.k_len, at.q_offset, at.is_causal, at.window_left, at.window_right)
    return torch.from_numpy(counts(form, setting)).bool()


def by_pair(seen: Tensor) -> Any:
    return lambda b, h, q, k: seen[h, q, k]


def listed(num: Tensor | None, indices: Tensor | None) -> list[list[int]]:
    assert num is not None
    assert indices is not None
    lines = indices.flatten(0, -2)
    return [line[:count].tolist() for line, count in zip(lines, num.flatten().tolist(), strict=True)]


def tables(mask: BlockMask) -> list[list[list[int]]]:
    return [
        listed(mask.kv_num_blocks, mask.kv_indices),
        listed(mask.full_kv_num_blocks, mask.full_kv_indices),
        listed(mask.q_num_blocks, mask.q_indices),
        listed(mask.full_q_num_blocks, mask.full_q_indices),
    ]


def assert_torchs_own(form: BlockSparse, at: Problem) -> BlockMask:
    """The tables and pairs are those that torch makes of the dense mask."""
    found, seen = form.block_mask(at), pairs(form, at)
    heads = found.kv_indices.shape[1]
    assert heads == (at.heads if form.relation(at).terms[0].generator.pattern.by_head else 1)  # type: ignore[union-attr]
    theirs = create_block_mask(by_pair(seen), 1, heads, at.q_len, at.k_len, "cpu", form.sizes)
    assert tables(found) == tables(theirs)
    assert (found.seq_lengths, found.BLOCK_SIZE) == (theirs.seq_lengths, theirs.BLOCK_SIZE)
    assert torch.equal(found.to_dense(), theirs.to_dense())
    h, q, k = torch.meshgrid(*(torch.arange(n) for n in seen.shape), indexing="ij")
    assert torch.equal(found.mask_mod(torch.tensor(0), h, q, k), seen)
    return found


@pytest.mark.parametrize("at", PROBLEMS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_block_mask_has_the_tables_that_torch_makes_of_the_pairs(pattern: str, at: str) -> None:
    """Blocks by turns: each size meets each pattern and each problem."""
    block = BLOCKS[(list(PATTERNS).index(pattern) + list(PROBLEMS).index(at)) % len(BLOCKS)]
    assert_torchs_own(BlockSparse(block, PATTERNS[pattern], "zero"), PROBLEMS[at])


def qkv(size: Problem) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, 8, dtype=torch.float64) for n in (size.q_len, size.k_len, size.k_len)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("pattern", "at"), by_turns(2))
def test_flex_attention_with_the_block_mask_is_attention_over_the_pairs(pattern: str, at: str) -> None:
    """FlexAttention reads the tables, which are torch's own for all patterns and problems (above)."""
    form, size = BlockSparse((16, 32), PATTERNS[pattern], "zero"), PROBLEMS[at]
    q, k, v = qkv(size)
    scores = (q @ k.mT / 8**0.5).masked_fill(~pairs(form, size), -torch.inf)
    # float64 throughout: roundings of sums over 96 keys. Rows without keys are 0.
    dense = scores.softmax(-1).nan_to_num(0) @ v
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=form.block_mask(size)), dense, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("pattern", "at"), [(pattern, ("ragged", "causal", "more_keys")[n % 3]) for n, pattern in enumerate(PATTERNS)]
)
def test_flex_attention_with_the_block_mask_is_the_reference_kernel(pattern: str, at: str) -> None:
    form, size = BlockSparse((16, 32), PATTERNS[pattern], "zero"), PROBLEMS[at]
    q, k, v = qkv(size)
    mine = dilcompile.functional.attention(
        q, k, v, form, is_causal=size.is_causal, q_offset=size.q_offset, kernel="reference"
    )  # fmt: skip
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=form.block_mask(size)), mine, rtol=0, atol=1e-13)


@pytest.mark.parametrize("at", PROBLEMS)
@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name not in ("random_by_head", "any")])
def test_a_block_mask_comes_back_as_the_same_pairs(pattern: str, at: str) -> None:
    form, size = BlockSparse((32, 16), PATTERNS[pattern], "zero"), PROBLEMS[at]
    own = {key: getattr(size, key) for key in ("q_offset", "is_causal", "window_left", "window_right")}
    back = BlockSparse.from_block_mask(form.block_mask(size), **own)
    assert back.sizes == form.sizes
    assert torch.equal(pairs(back, size), pairs(form, size))
    assert tables(back.block_mask(size)) == tables(form.block_mask(size))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_blocks_of_any_mask_mod_come_back(data: st.DataObject) -> None:
    q_block, k_block = data.draw(st.sampled_from([16, 24, 32])), data.draw(st.sampled_from([16, 40]))
    q_len, k_len = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
    held = torch.tensor(data.draw(st.lists(st.booleans(), min_size=49, max_size=49))).view(7, 7)
    causal = data.draw(st.booleans())

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return held[q // q_block, k // k_block] & ((k <= q) | (not causal))

    heads, separate = data.draw(st.sampled_from([None, 2])), data.draw(st.booleans())
    mask = create_block_mask(mask_mod, None, heads, q_len, k_len, "cpu", (q_block, k_block), separate_full_blocks=separate)
    form = BlockSparse.from_block_mask(mask, is_causal=causal)
    at = Problem(1, 1, 1, q_len, k_len, 8, 8, is_causal=causal)
    q, k = torch.meshgrid(torch.arange(q_len), torch.arange(k_len), indexing="ij")
    assert torch.equal(pairs(form, at)[0], mask_mod(q, q, q, k))


def of_mod(mask_mod: Any, batch: int | None = None, heads: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, batch, heads, 64, 64, "cpu", 16)


def full_beside_causal() -> BlockMask:
    return of_mod(lambda b, h, q, k: q // 16 >= k // 16)


NOT_PATTERNS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a window inside blocks": (
        of_mod(lambda b, h, q, k: (k <= q) & (q - k < 20)), {"is_causal": True},
        "block (row 1, column 0) of the BlockMask: its mask_mod hides the pair of query 20 and key 0, the site's own mask does not",
    ),
    "a causal mask at a site without": (
        of_mod(lambda b, h, q, k: k <= q), {},
        "block (row 0, column 0) of the BlockMask: its mask_mod hides the pair of query 0 and key 1",
    ),
    "more than the site's window": (
        of_mod(lambda b, h, q, k: (k <= q) & (q - k <= 20)), {"is_causal": True, "window_left": 19},
        "its mask_mod shows the pair of query 20 and key 0",
    ),
    "full blocks that the site cuts": (
        full_beside_causal(), {"is_causal": True}, "block (row 0, column 0) of the BlockMask is full, but the site's own mask hides",
    ),
    "batch rows that differ": (
        of_mod(lambda b, h, q, k: (q // 16 == k // 16) | (b == 0), batch=2), {},
        "a BlockMask of shape (2, 1, 64, 64) has other blocks in another batch row",
    ),
    "heads that differ inside a block": (
        of_mod(lambda b, h, q, k: (q // 16 == k // 16) & ((k <= q) | ((h == 1) & (k < q + 2))), heads=2), {"is_causal": True},
        "its mask_mod shows the pair of query 0 and key 1",
    ),
    "small blocks": (create_block_mask(lambda b, h, q, k: k <= q, 1, 1, 64, 64, "cpu", 8), {"is_causal": True}, "at least 16"),
    "an offset inside a block": (full_beside_causal(), {"q_offset": 8}, "q_offset 8 is no multiple of the 16 queries of a block"),
}  # fmt: skip


def test_heads_that_differ_come_and_go() -> None:
    mask = of_mod(lambda b, h, q, k: ((q // 16 == k // 16) | ((h == 1) & (k < 16)) | ((h == 2) & (q < 16))) & (k <= q), heads=3)
    form = BlockSparse.from_block_mask(mask, is_causal=True)
    assert [next(iter(part)) for part in form.plain()["pattern"]["heads"]] == ["explicit"] * 3
    assert parse_form(str(form)) == form
    at = Problem(1, 3, 3, 64, 64, 8, 8, is_causal=True)
    back = form.block_mask(at)
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert torch.equal(create_mask(back.mask_mod, 1, 3, 64, 64, "cpu"), create_mask(mask.mask_mod, 1, 3, 64, 64, "cpu"))
    shared = of_mod(lambda b, h, q, k: k <= q, heads=3)
    assert list(BlockSparse.from_block_mask(shared, is_causal=True).plain()["pattern"]) == ["explicit"]
    with pytest.raises(FormError, match="`heads` has 3 patterns, one for each query head, but there are 4 query heads; `groups`"):
        form.relation(replace(at, heads=4, kv_heads=4))


@pytest.mark.parametrize("name", NOT_PATTERNS)
def test_a_mask_that_is_no_pattern_of_blocks_is_refused_with_the_place(name: str) -> None:
    mask, own, why = NOT_PATTERNS[name]
    with pytest.raises(FormError, match=re.escape(why)):
        BlockSparse.from_block_mask(mask, **own)


@pytest.mark.parametrize(("offset", "why"), [(8, "q_offset 8 is no multiple of the 16"), (-16, "stands at position -16")])
def test_queries_that_begin_inside_a_block_have_no_block_mask(offset: int, why: str) -> None:
    with pytest.raises(FormError, match=why):
        BlockSparse(16, {"local": {}}).block_mask(replace(PROBLEM, q_offset=offset))


def test_a_block_mask_takes_the_memory_of_its_tables() -> None:
    size, block = 1 << 17, 128
    form = BlockSparse(block, {"any": [{"local": {"before": 4}}, {"global": {"columns": 1}}]})
    tracemalloc.start()
    form.block_mask(Problem(1, 8, 8, size, size, 8, 8, is_causal=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Four int32 tables and one of bytes of 1024 x 1024 blocks; torch.from_numpy copies none, stacking copies each once.
    assert peak < 2 * 17 * (size // block) ** 2 + 4e6


def _never_full(*args: Any, **named: Any) -> Any:
    return np.zeros_like(_inside(*args, **named))


def _all_inside(*args: Any, **named: Any) -> Any:
    return np.ones_like(_inside(*args, **named))


def _without_limits(held: Tensor, grid: Any) -> Any:
    return _mask_mod(held, replace(grid, left=None, right=None))


_inside, _mask_mod = block_mask._inside, block_mask._mask_mod


@pytest.mark.parametrize(
    ("name", "wrong"), [("_inside", _never_full), ("_inside", _all_inside), ("_mask_mod", _without_limits)],
    ids=["never full", "full at a ragged end", "no limits"],
)  # fmt: skip
def test_a_wrong_block_mask_is_seen(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mask, name, wrong)
    with pytest.raises(AssertionError):
        assert_torchs_own(BlockSparse(16, PATTERNS["local"]), PROBLEMS["causal"])
