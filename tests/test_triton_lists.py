"""The lists of blocks as the Triton kernels read them: what they say of each pair, without a kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilcompile.forms import BlockSparse
from dilcompile.generators import Window
from dilcompile.lowering.triton import lists, plan
from dilcompile.relation import Problem, Relation, Term

PATTERNS: list[dict[str, Any]] = [
    {"local": {"before": 1, "behind": 1}},
    {"any": [{"global": {"columns": 1, "rows": 1}}, {"random": {"blocks": 1, "by_head": True}}]},
    {"explicit": {"starts": [0, 2, 2, 3], "columns": [0, 1, 2]}},
]


def drawn_relation(data: st.DataObject) -> Relation:
    block = data.draw(st.tuples(st.integers(16, 40), st.integers(16, 40)))
    q_len, k_len, offset = (data.draw(st.integers(low, 130)) for low in (1, 1, -30))
    left = data.draw(st.none() | st.integers(0, 60))
    problem = Problem(1, 2, 1, q_len, k_len, 8, 8, q_offset=offset, is_causal=data.draw(st.booleans()), window_left=left)
    return BlockSparse(block, data.draw(st.sampled_from(PATTERNS)), "zero").relation(problem)


def walks(made: plan.Plan, transposed: bool, own: int, other: int, end: int) -> list[tuple[int, int, int, bool]]:
    """(head, position of a tile, position that it walks, whether it does so without a mask), as the kernel goes."""
    held, rows = made.lists, made.keys if transposed else made.queries
    assert held is not None
    lines, found = held.lines.tolist(), []
    for head in range(2):
        for first, line in rows.tiles[0].tolist():
            begin, full, total = lines[head if held.line_head else 0][line - held.first_line]
            for n, start in enumerate(held.entries[begin : begin + total].tolist()):
                for x in range(first, min(first + rows.count, (line + 1) * own, end)):
                    found += [(head, x, y, n < full) for y in range(start, start + other)]
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_lists_hold_each_pair_once_and_full_blocks_need_no_mask(data: st.DataObject) -> None:
    relation = drawn_relation(data)
    size, blocks = relation.problem, lists.blocks_of(relation)
    assert blocks is not None
    h, t, k = torch.arange(2)[:, None, None], torch.arange(size.q_len)[:, None] + size.q_offset, torch.arange(size.k_len)
    wanted = {(a, b + size.q_offset, c) for a, b, c in relation.multiplicity(h, t, k).nonzero().tolist()}
    last = size.q_offset + size.q_len
    for transposed in (False, True):
        own, other = (blocks.grid.k_block, blocks.grid.q_block) if transposed else (blocks.grid.q_block, blocks.grid.k_block)
        made = plan.plan_of_blocks(relation, data.draw(st.integers(1, 40)), transposed, False, torch.device("cpu"))
        walked = walks(made, transposed, own, other, size.k_len if transposed else last)
        pairs = [(a, y, x) if transposed else (a, x, y) for a, x, y, _ in walked]
        assert all(count == 1 for count in Counter(pairs).values())
        assert wanted <= set(pairs)
        bare = {pair for pair, (*_, full) in zip(pairs, walked, strict=True) if full}
        assert bare <= wanted


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiles_hold_every_position_once(data: st.DataObject) -> None:
    relation = drawn_relation(data)
    size, blocks = relation.problem, lists.blocks_of(relation)
    assert blocks is not None
    count, by_document = data.draw(st.integers(1, 40)), data.draw(st.booleans())
    for transposed, own, first, end in (
        (False, blocks.grid.q_block, size.q_offset, size.q_offset + size.q_len),
        (True, blocks.grid.k_block, 0, size.k_len),
    ):
        made = plan.plan_of_blocks(relation, count, transposed, by_document, torch.device("cpu"))
        rows = made.keys if transposed else made.queries
        held = [x for t, line in rows.tiles[0].tolist() for x in range(t, min(t + count, (line + 1) * own, end))]
        assert Counter(held) == Counter(range(first, end))


def test_the_longest_walks_go_first() -> None:
    relation = BlockSparse(16, PATTERNS[0]).relation(Problem(1, 1, 1, 80, 80, 8, 8))
    made = plan.plan_of_blocks(relation, 16, False, False, torch.device("cpu"))
    assert made.queries.tiles[0].tolist() == [[16, 1], [32, 2], [48, 3], [0, 0], [64, 4]]


def test_there_are_as_many_numbers_as_blocks() -> None:
    relation = BlockSparse(64, PATTERNS[0]).relation(Problem(1, 32, 8, 1 << 20, 1 << 20, 64, 64, is_causal=True))
    for transposed in (False, True):
        made = plan.plan_of_blocks(relation, 64, transposed, False, torch.device("cpu")).lists
        assert made is not None
        assert made.entries.numel() == 2 * (1 << 14) - 1
        assert made.lines.numel() == 3 * (1 + (1 << 14))
        assert made.entries.dtype == made.lines.dtype == torch.int32


def test_tiles_of_any_size_share_the_lists() -> None:
    """What is as large as there are blocks is on the device once for the forward and the gradient of the queries."""
    relation = BlockSparse(64, PATTERNS[0]).relation(Problem(1, 1, 1, 512, 512, 8, 8))
    one, other = (plan.plan_of_blocks(relation, count, False, False, torch.device("cpu")).lists for count in (64, 32))
    assert one is not None
    assert other is not None
    assert one.entries is other.entries
    assert one.lines is other.lines
    assert one.tiles.shape[0] * 2 == other.tiles.shape[0]


def test_the_map_holds_the_blocks() -> None:
    relation = BlockSparse(16, PATTERNS[2], "zero").relation(Problem(1, 1, 1, 40, 48, 8, 8, q_offset=8))
    held, first = lists.map_on(relation, False, torch.device("cpu"))
    assert (held.tolist(), first) == ([[[1, 1, 0], [0, 0, 0], [0, 0, 1]]], 0)


def test_blocks_beside_other_terms_are_refused() -> None:
    relation = BlockSparse(16, PATTERNS[0]).relation(Problem(1, 1, 1, 40, 40, 8, 8))
    assert plan.unplannable(relation) is None
    beside = Relation(relation.problem, (*relation.terms, Term(Window(3, 3))))
    assert plan.unplannable(beside) == "the blocks of a pattern beside other terms"


@pytest.mark.parametrize(
    ("own", "other", "pack", "found"),
    [(128, 128, 1, (128, 64)), (64, 128, 1, (64, 64)), (48, 48, 1, (64, 16)), (40, 40, 1, (64, 16)), (16, 16, 1, (16, 64)),
     (256, 32, 1, (128, 32)), (20, 20, 1, (32, 64)), (128, 32, 4, (128, 64)), (128, 16, 8, (128, 64))],
)  # fmt: skip
def test_tiles_are_no_larger_than_blocks_and_take_parts_of_one(own: int, other: int, pack: int, found: tuple[int, int]) -> None:
    from dilcompile.lowering.triton.config import Tile

    tile = Tile(128, 64, 8, 3).along(own, other, pack)
    assert (tile.own, tile.other) == found
