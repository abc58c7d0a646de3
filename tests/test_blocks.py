"""Block patterns say the same to the oracle and to the lists; grids count pairs; lists and their transposes hold each block once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilcompile.blocks.composed import AllOf, AnyOf, PerHead
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.heads import from_head, kind_of_head
from dilcompile.blocks.lists import lists_of
from dilcompile.blocks.patterns import (
    Document,
    Explicit,
    Fixed,
    Global,
    Hierarchical,
    Local,
    Pattern,
    Random,
    Strided,
    VerticalSlash,
)
from dilcompile.blocks.shuffle import shuffled, unshuffled

small = st.integers(0, 5)
PATTERNS: st.SearchStrategy[Pattern] = st.one_of(
    st.builds(Local, small, small),
    st.builds(Global, small, small),
    st.builds(Strided, st.integers(1, 5), st.one_of(st.none(), small)),
    st.integers(1, 5).flatmap(lambda stride: st.builds(Fixed, st.just(stride), st.integers(0, stride - 1))),
    st.builds(
        VerticalSlash, st.lists(st.integers(0, 9), max_size=3).map(tuple), st.lists(st.integers(0, 9), max_size=3).map(tuple)
    ),
    st.builds(Hierarchical, st.sampled_from([(2,), (2, 4), (1, 3, 6)]), st.sampled_from([(), (1,), (1, 2)])).filter(
        lambda p: len(p.heads) <= len(p.spans)
    ),
    st.builds(Random, small, st.integers(0, 9), st.booleans()),
    st.builds(Document, st.lists(st.integers(1, 20), max_size=6).map(tuple)),
    st.just(Explicit((0, 2, 2, 5), (0, 3, 1, 2, 7))),
)
COMPOSED: st.SearchStrategy[Pattern] = st.one_of(
    PATTERNS,
    st.lists(PATTERNS, min_size=1, max_size=3).map(lambda parts: AnyOf(tuple(parts))),
    st.lists(PATTERNS, min_size=1, max_size=3).map(lambda parts: AllOf(tuple(parts))),
    st.lists(PATTERNS, min_size=4, max_size=4).map(lambda parts: PerHead(tuple(parts))),
    st.lists(PATTERNS, min_size=2, max_size=2).map(lambda parts: PerHead(tuple(parts), share=2)),
)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    start = draw(st.integers(0, 30))
    limit = st.one_of(st.none(), st.integers(0, 20))
    return Grid(
        draw(st.integers(1, 8)), draw(st.integers(1, 8)), start, start + draw(st.integers(0, 40)), draw(st.integers(1, 50)),
        draw(limit), draw(limit),
    )  # fmt: skip


def visible(grid: Grid) -> torch.Tensor:
    """The pairs [queries, keys] that the limits let through, one by one."""
    t = torch.arange(grid.q_start, grid.q_stop)[:, None]
    k = torch.arange(grid.k_len)
    found = torch.ones(t.shape[0], grid.k_len, dtype=torch.bool)
    if grid.left is not None:
        found &= t - k <= grid.left
    if grid.right is not None:
        found &= k - t <= grid.right
    return found


@settings(max_examples=300, deadline=None)
@given(COMPOSED, grids(), st.integers(0, 3))
def test_lists_hold_what_the_oracle_sees(pattern: Pattern, grid: Grid, head: int) -> None:
    rows = grid.rows
    codes = pattern.codes(head, rows, grid)
    assert np.all(np.diff(codes) > 0)
    h = torch.tensor(head)
    found = pattern.contains(h, torch.from_numpy(rows)[:, None], torch.arange(grid.columns), grid)
    low, high = (torch.from_numpy(x)[:, None] for x in grid.reach(rows))
    reached = (torch.arange(grid.columns) >= low) & (torch.arange(grid.columns) < high)
    lists = lists_of(codes, grid)
    held = torch.zeros_like(found)
    held[torch.from_numpy(lists.owners() - rows[0] if len(rows) else lists.owners()), torch.from_numpy(lists.blocks)] = True
    assert torch.equal(held, found & reached)
    # Every pair that the limits and the pattern let through lies in a listed block, and full ones hold nothing else.
    pairs = visible(grid)
    for row, column, full in zip(lists.owners(), lists.blocks, lists.full, strict=True):
        block = pairs[
            max(0, row * grid.q_block - grid.q_start) : (row + 1) * grid.q_block - grid.q_start,
            column * grid.k_block : (column + 1) * grid.k_block,
        ]
        assert full == bool(block.all())
        assert grid.pairs(np.array([row]), np.array([column]))[0] == int(block.sum())


@settings(max_examples=100, deadline=None)
@given(COMPOSED, grids())
def test_the_transposed_lists_hold_the_same_blocks(pattern: Pattern, grid: Grid) -> None:
    lists = lists_of(pattern.codes(0, grid.rows, grid), grid)
    columns = np.arange(grid.columns, dtype=np.int64)
    turned = lists.transposed(columns)
    one = set(zip(lists.owners().tolist(), lists.blocks.tolist(), lists.full.tolist(), strict=True))
    other = set(zip(turned.blocks.tolist(), turned.owners().tolist(), turned.full.tolist(), strict=True))
    assert one == other
    assert len(turned) == len(lists) == len(one)
    again = turned.transposed(grid.rows)
    assert np.array_equal(again.starts, lists.starts)
    assert np.array_equal(again.blocks, lists.blocks)


@settings(max_examples=100, deadline=None)
@given(COMPOSED, grids(), st.integers(0, 3))
def test_heads_of_one_kind_have_the_same_blocks(pattern: Pattern, grid: Grid, first: int) -> None:
    seen = from_head(pattern, first)
    codes = [seen.codes(head, grid.rows, grid) for head in range(4 - first)]
    kinds = [kind_of_head(seen, head) for head in range(4 - first)]
    for head, kind in enumerate(kinds):
        assert np.array_equal(codes[head], codes[kinds.index(kind)])


def test_heads_are_of_as_many_kinds_as_they_are_given_patterns() -> None:
    one, other = Local(1, 0), AnyOf((Global(1), Random(2, by_head=True)))
    assert [kind_of_head(PerHead((one, other, one)), head) for head in (0, 2)] == [(one, None)] * 2
    assert len({kind_of_head(AnyOf((one, PerHead((one, other), share=2))), head) for head in range(4)}) == 3
    assert kind_of_head(AllOf((one, Global(1))), 5) is None


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1 << 31))
def test_shuffling_is_a_permutation(size: int, key: int) -> None:
    x, sizes, keys = np.arange(size, dtype=np.int64), np.full(size, size), np.full(size, key)
    found = shuffled(x, sizes, keys)
    assert np.array_equal(np.sort(found), x)
    assert np.array_equal(unshuffled(found, sizes, keys), x)


def test_random_blocks_are_spread_evenly_and_differ_by_head_and_seed() -> None:
    grid = Grid(64, 64, 0, 64 * 512, 64 * 512)
    drawn = Random(8, seed=1).codes(0, grid.rows, grid) % grid.columns
    assert len(drawn) == 8 * 512
    counts = np.bincount(drawn, minlength=512)
    # 8 draws a column on average: a chi-squared statistic with 511 degrees of freedom, 5 standard deviations at most.
    statistic = float(((counts - 8) ** 2 / (8 * (1 - 8 / 512))).sum())
    assert abs(statistic - 511) < 5 * (2 * 511) ** 0.5
    by_head = Random(8, seed=1, by_head=True)
    assert not np.array_equal(by_head.codes(0, grid.rows, grid), by_head.codes(1, grid.rows, grid))
    assert not np.array_equal(drawn, Random(8, seed=2).codes(0, grid.rows, grid) % grid.columns)
    assert np.array_equal(Random(8, seed=1).codes(5, grid.rows, grid) % grid.columns, drawn)


@pytest.mark.parametrize("by_head", [False, True])
def test_a_million_tokens_are_planned_in_little_memory(by_head: bool) -> None:
    grid = Grid(64, 64, 0, 1 << 20, 1 << 20, right=0)
    pattern = AnyOf((Local(8, 0), Global(2), Random(2, 0, by_head)) if by_head else (Local(8, 0), Global(2)))
    heads = 32 if pattern.by_head else 1
    tracemalloc.start()
    listed = sum(len(lists_of(pattern.codes(h, grid.rows, grid), grid)) for h in range(heads))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert listed >= heads * (1 << 14) * 10
    assert peak < 100e6
