"""Pictures of blocks and pairs: each cell shows what is there, at the cost of the blocks that are there."""

from __future__ import annotations

import re
import time
import tracemalloc
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import COMPOSED, grids, visible

from dilcompile.blocks import picture
from dilcompile.blocks.cells import BlockCount, Cells, cells_of, with_pairs
from dilcompile.blocks.composed import AnyOf
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import lists_of
from dilcompile.blocks.patterns import Global, Local, Pattern
from dilcompile.forms import BlockSparse, parse_form
from dilcompile.relation import Problem
from dilcompile.report.pair_cells import pair_cells


def cells(pattern: Pattern, grid: Grid, most: int = 128) -> Cells:
    return cells_of(with_pairs(lists_of(pattern.codes(0, grid.rows, grid), grid), grid), grid, most)


@settings(max_examples=80, deadline=None)
@given(COMPOSED, grids(), st.integers(1, 9))
def test_a_cell_holds_the_share_of_its_blocks(pattern: Pattern, grid: Grid, most: int) -> None:
    drawn, pairs = cells(pattern, grid, most), visible(grid)
    rows, (down, across) = grid.rows.tolist(), drawn.held
    assert drawn.full.shape == (-(-len(rows) // down), -(-grid.columns // across))
    assert max(drawn.full.shape, default=0) <= most
    seen = np.zeros((2, *drawn.full.shape))
    number = np.zeros(drawn.full.shape)
    for n, i in enumerate(rows):
        for j in range(grid.columns):
            queries = slice(max(0, i * grid.q_block - grid.q_start), (i + 1) * grid.q_block - grid.q_start)
            block = pairs[queries, j * grid.k_block : (j + 1) * grid.k_block]
            held = bool(pattern.contains(torch.tensor(0), torch.tensor(i), torch.tensor(j), grid)) and bool(block.any())
            number[n // down, j // across] += 1
            seen[int(not block.all()), n // down, j // across] += held
    assert np.allclose(drawn.full * number, seen[0])
    assert np.allclose(drawn.partial * number, seen[1])


FORMS = [
    ("sliding_window(window=9, sinks=2)", 50, True),
    ("dilated(segments=(8, 32), rates=(1, 4))", 45, True),
    ("dilated(segments=(8, 24), rates=(1, 2), offset='own', union='set', sinks=3, local=4)", 47, False),
    ("dilated(segments=(8, 16), rates=(1, 2), heads='grouped', coverage='zero')", 40, False),
]


@pytest.mark.parametrize(("form", "length", "causal"), FORMS)
@pytest.mark.parametrize("most", [1, 7, 64])
def test_a_cell_holds_the_share_of_its_pairs(form: str, length: int, causal: bool, most: int) -> None:
    for queries in (length, 6):
        relation = parse_form(form).relation(Problem(1, 4, 4, queries, length, 8, 8, length - queries, causal))
        for head in (0, 3):
            drawn = pair_cells(relation, head, most)
            assert drawn is not None
            t = torch.arange(length - queries, length)[:, None]
            counted = relation.multiplicity(torch.tensor(head), t, torch.arange(length)).numpy()
            by_row = np.add.reduceat(counted, drawn.q_edges[:-1] - drawn.q_edges[0], axis=0)
            whole = np.multiply.outer(np.diff(drawn.q_edges), np.diff(drawn.k_edges))
            assert np.allclose(
                np.minimum(1, np.add.reduceat(by_row, drawn.k_edges[:-1], axis=1) / whole), drawn.full + drawn.partial
            )
            assert ((drawn.full == 1) | (drawn.full == 0)).all()


def covered(svg: str, drawn: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Opacity of the partial and of the full colour in each cell, from the shapes themselves."""
    found = np.zeros((2, *drawn.full.shape))
    # Where a line of cells begins and ends; the first and the last may be cut short.
    down, across = ((edges - edges[0]) / max(np.diff(edges)) for edges in (drawn.q_edges, drawn.k_edges))
    group = re.search(r'<g transform=.*?shape-rendering="crispEdges">(.*?)</g>', svg, re.DOTALL)
    assert group is not None
    for kind, faint, shape in re.findall(r'<path class="(\w+)"(?: fill-opacity="([\d.]+)")? d="(.*?)"/>', group[1]):
        for x, y, width, height in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", shape):
            edges = [
                int(np.abs(line - float(at)).argmin())
                for line, at in ((down, y), (down, float(y) + float(height)), (across, x), (across, float(x) + float(width)))
            ]
            assert edges[1] == edges[0] + 1
            assert edges[3] > edges[2]
            found[int(kind == "full"), edges[0], edges[2] : edges[3]] = float(faint or 1)
    return found[0], found[1]


@settings(max_examples=40, deadline=None)
@given(COMPOSED, grids(), st.integers(1, 9))
def test_the_shapes_show_the_cells(pattern: Pattern, grid: Grid, most: int) -> None:
    drawn = cells(pattern, grid, most)
    if not drawn.full.size:
        return
    partial, full = covered(picture.svg(drawn, "t", ("d",), "n"), drawn)
    share = drawn.full + drawn.partial
    # Full lies over partial: what is not transparent is the shade, and how much of that is full is as in the cell.
    shade = 1 - (1 - full) * (1 - partial)
    halvings = np.ceil(-np.log2(np.where(share > 0, share, 1)).round(9)).clip(0, 8)
    # Half of the last digit that opacities are written with.
    assert np.allclose(shade, np.where(share > 0, 1 - 0.1 * halvings, 0), atol=0.005)
    assert ((full > 0) == (drawn.full > 0)).all()
    # Where nothing shows through the full colour there is nothing below it.
    assert ((partial > 0) == (drawn.partial > 0)).all()


def test_an_svg_says_what_it_shows_and_stands_alone_where_asked() -> None:
    grid = Grid(16, 16, 0, 200, 200, right=0)
    for alone in (False, True):
        text = picture.svg(cells(Local(2, 0), grid), "a < b", ("c & d",), "x", alone)
        root = ElementTree.fromstring(text)
        ids = {part.get("id"): part.text for part in root.iter() if part.get("id")}
        assert root.get("role") == "img"
        assert [ids[name] for name in (root.get("aria-labelledby") or "").split()] == [
            "a < b",
            "Queries down, keys across. c & d",
        ]
        assert ("<style>" in text) == alone
        assert "script" not in text
        labels = [part.text for part in root.iter() if part.tag.endswith("text")]
        assert {"a < b", "c & d", "keys →", "← queries", "0", "64", "128", "200", "full blocks", "blocks with a mask inside"} == {
            *labels
        }
        assert not any(re.match("1/", label or "") for label in labels), "no share is cut"


@pytest.mark.parametrize(
    ("grid", "wide", "tall"),
    [
        (Grid(16, 16, 3999, 4000, 4000, right=0), 450, 120),
        (Grid(256, 256, 0, 40, 40), 500, 460),
        (Grid(16, 16, 0, 4000, 20), 440, 460),
    ],
)
def test_a_picture_has_the_size_of_a_picture(grid: Grid, wide: int, tall: int) -> None:
    root = ElementTree.fromstring(picture.svg(cells(Local(1, 0), grid), "t", (), "x"))
    assert 60 < float(root.get("width") or 0) < wide
    assert 60 < float(root.get("height") or 0) < tall


def test_text_pictures() -> None:
    assert picture.text(cells(AnyOf((Local(1, 0), Global(1))), Grid(16, 16, 0, 64, 64, right=0))) == "\n".join(
        ("▓▓······", "██▓▓····", "████▓▓··", "██··██▓▓")
    )
    # 64 blocks in 4 cells: half of the diagonal ones at most, an eighth and more, less, nothing.
    drawn = Cells(
        np.array([0, 1, 2]),
        np.array([0, 1, 2]),
        np.array([[0.25, 0.0], [0.1, 0.0]]),
        np.array([[0.25, 0.125], [0.0, 0.0]]),
        "block",
        (4, 4),
    )
    assert picture.text(drawn) == "▓▓▒▒\n░░··"


def test_counts_in_words() -> None:
    count = BlockCount(16, 32, 10, 5, 2, 7, 3)
    assert (count.all, count.empty) == (100, 90)
    assert str(count) == "7 full, 3 partial and 90 empty of 10 x 5 blocks in 2 heads"


def _plan(length: int) -> int:
    """Pairs, coverage, and the lists in both directions, as a call plans them."""
    form = BlockSparse(64, {"any": [{"local": {"before": 8}}, {"global": {"columns": 2, "rows": 2}}]})
    relation = form.relation(Problem(1, 32, 8, length, length, 64, 64, is_causal=True))
    blocks = relation.terms[0].generator
    lists = blocks.lists(0, blocks.grid)  # type: ignore[union-attr]
    turned = lists.transposed(np.arange(blocks.grid.columns, dtype=np.int64))  # type: ignore[union-attr]
    assert relation.pairs() > 0
    assert len(turned) == len(lists)
    return len(lists)


def _peak(length: int) -> tuple[int, int]:
    tracemalloc.start()
    listed = _plan(length)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return listed, peak


def test_a_million_tokens_and_32_heads_are_planned_in_a_second_and_100_megabytes() -> None:
    million = 1 << 20
    (some, little), (all_of_them, peak) = _peak(million // 4), _peak(million)
    assert peak < 100e6
    # As much as there are blocks: four times the length has four times the blocks, and no more memory for each.
    assert peak / all_of_them < 1.1 * little / some
    # The processor's seconds: others may be at work on the machine.
    taken = []
    for _ in range(2):
        start = time.process_time()
        _plan(million)
        taken.append(time.process_time() - start)
    assert min(taken) < 1


def test_a_picture_of_a_million_tokens_is_small_and_costs_its_blocks() -> None:
    grid = Grid(64, 64, 0, 1 << 20, 1 << 20, right=0)
    tracemalloc.start()
    text = picture.svg(cells(AnyOf((Local(8, 0), Global(2))), grid), "t", (), "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert len(text) < 50_000
    assert "under 1/128" in text
    assert "of a cell" in text
