"""``coverage: require``: the first query that the blocks leave without keys is named, and no other pattern is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import COMPOSED, grids, visible

import dilcompile
from dilcompile.blocks.composed import AllOf
from dilcompile.blocks.coverage import first_without_keys
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.heads import alike_in_heads
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import Explicit, Fixed, Pattern, Random
from dilcompile.errors import FormError
from dilcompile.forms import BlockSparse
from dilcompile.relation import Problem, grid_of

Find = Callable[[BlockLists, Grid], int | None]


def first_by_pair(lists: BlockLists, grid: Grid) -> int | None:
    """The same, by looking at each pair."""
    pairs = visible(grid)
    held = torch.zeros_like(pairs)
    for row, column in zip(lists.owners(), lists.blocks, strict=True):
        queries = slice(max(0, row * grid.q_block - grid.q_start), max(0, (row + 1) * grid.q_block - grid.q_start))
        held[queries, column * grid.k_block : (column + 1) * grid.k_block] = True
    lost = (pairs.any(1) & ~(pairs & held).any(1)).nonzero()
    return grid.q_start + int(lost[0]) if len(lost) else None


def assert_found(find: Find, pattern: Pattern, grid: Grid) -> None:
    lists = lists_of(pattern.codes(0, grid.rows, grid), grid)
    assert find(lists, grid) == first_by_pair(lists, grid)


@settings(max_examples=400, deadline=None)
@given(COMPOSED, grids())
def test_the_first_query_without_keys_is_found(pattern: Pattern, grid: Grid) -> None:
    assert_found(first_without_keys, pattern, grid)


GAPS = {
    "inside": (Grid(16, 4, 0, 16, 40, left=0, right=0), Explicit((0, 3), (0, 2, 3)), 4),
    "at the start": (Grid(16, 4, 0, 16, 40, left=2, right=0), Explicit((0, 3), (1, 2, 3)), 0),
    "at the end": (Grid(16, 4, 0, 16, 40, left=2, right=0), Explicit((0, 3), (0, 1, 2)), 14),
    "a row": (Grid(16, 16, 0, 64, 64, right=0), Explicit((0, 1, 2, 2, 3), (0, 0, 0)), 32),
    "none": (Grid(16, 16, 0, 64, 64, right=0), Explicit((0, 1, 2, 3, 4), (0, 0, 0, 0)), None),
    "hidden by the limits alone": (Grid(16, 16, 0, 64, 16, left=3, right=0), Explicit((0, 1, 2), (0, 0)), None),
}


@pytest.mark.parametrize("name", GAPS)
def test_gaps(name: str) -> None:
    grid, pattern, expected = GAPS[name]
    lists = lists_of(pattern.codes(0, grid.rows, grid), grid)
    assert first_without_keys(lists, grid) == expected == first_by_pair(lists, grid)


def _rows_only(lists: BlockLists, grid: Grid) -> int | None:
    """Rows without blocks, and no queries inside of others."""
    empty = np.flatnonzero(np.diff(lists.starts) == 0)
    return max(grid.q_start, int(lists.lines[empty[0]]) * grid.q_block) if len(empty) else None


def test_looking_at_rows_alone_is_seen_to_be_wrong() -> None:
    grid, pattern, _ = GAPS["inside"]
    with pytest.raises(AssertionError):
        assert_found(_rows_only, pattern, grid)


WITHOUT: dict[str, tuple[Any, str]] = {
    "no row": ({"fixed": {"stride": 4, "offset": 1}}, "query at position 0 (block row 0) without any key, at 100 queries and 100 keys"),
    "later": ({"explicit": {"starts": [0, 1, 2], "columns": [0, 0]}}, "query at position 32 (block row 2) without"),
    "by head": (
        {"all": [{"random": {"blocks": 1, "by_head": True}}, {"strided": {"stride": 1}}, {"fixed": {"stride": 2}}]},
        ", head 0) without any key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_a_pattern_that_leaves_a_query_without_keys_is_refused_with_the_cure(name: str) -> None:
    pattern, said = WITHOUT[name]
    at = Problem(1, 4, 4, 100, 100, 8, 8, is_causal=True)
    with pytest.raises(FormError) as caught:
        BlockSparse(16, pattern).relation(at)
    assert said in str(caught.value)
    assert f"pattern {pattern!r} leaves" in str(caught.value)
    assert "add {local: {}} under `any`" in str(caught.value)
    # Both cures cure.
    assert BlockSparse(16, pattern, coverage="zero").relation(at).pairs() > 0
    assert BlockSparse(16, {"any": [pattern, {"local": {}}]}).relation(at).pairs() > 0


def test_the_call_is_refused_and_gives_zeros_where_they_are_accepted() -> None:
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    pattern = {"fixed": {"stride": 2, "offset": 1}}
    with pytest.raises(FormError, match="leaves the query at position 0"):
        dilcompile.functional.attention(q, k, v, BlockSparse(16, pattern), is_causal=True)
    out = dilcompile.functional.attention(q, k, v, BlockSparse(16, pattern, coverage="zero"), is_causal=True)
    assert not isinstance(out, tuple)
    assert torch.equal(out[:, :, :16], torch.zeros(1, 2, 16, 8))
    assert (out[:, :, 16:] != 0).any(-1).all()


@settings(max_examples=200, deadline=None)
@given(COMPOSED, grids(), st.integers(0, 3))
def test_what_heads_share_is_in_each(pattern: Pattern, grid: Grid, head: int) -> None:
    shared = alike_in_heads(pattern)
    assert not shared.by_head
    assert np.isin(shared.codes(0, grid.rows, grid), pattern.codes(head, grid.rows, grid)).all()


def test_heads_of_which_one_alone_has_gaps_are_asked_one_by_one() -> None:
    at = Problem(1, 8, 8, 64, 64, 8, 8)
    drawn = {"all": [{"random": {"blocks": 3, "by_head": True}}, {"fixed": {"stride": 4}}]}
    grid = grid_of(at, 16, 16)
    pattern = AllOf((Random(3, by_head=True), Fixed(4)))
    gaps = [first_by_pair(lists_of(pattern.codes(h, grid.rows, grid), grid), grid) for h in range(8)]
    head = next(h for h, gap in enumerate(gaps) if gap is not None)
    with pytest.raises(FormError, match=re.escape(f"position {gaps[head]} (block row {gaps[head] // 16}, head {head})")):
        BlockSparse(16, drawn).relation(at)
    BlockSparse(16, {"any": [drawn, {"local": {}}]}).relation(at)


def test_a_query_decoded_alone_is_asked_alone() -> None:
    form = BlockSparse(16, {"explicit": {"starts": [0, 0, 1], "columns": [0]}})
    assert form.relation(Problem(1, 1, 1, 1, 20, 8, 8, q_offset=19, is_causal=True)).pairs() == 16
    with pytest.raises(FormError, match="position 9 "):
        form.relation(Problem(1, 1, 1, 1, 10, 8, 8, q_offset=9, is_causal=True))
