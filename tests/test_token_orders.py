"""Orders of token grids are permutations; Hilbert's walks from neighbour to neighbour; what is near is found along each."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilcompile.blocks import block_sets, neighbourhood, row_order
from dilcompile.blocks.curve import ORDER_NAMES, Curve
from dilcompile.blocks.fullness import fullness
from dilcompile.blocks.neighbourhood import near
from dilcompile.blocks.orders import ORDERS, hilbert, morton, row

GRIDS = st.lists(st.integers(1, 7), min_size=2, max_size=3).map(tuple)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    return Curve(draw(st.sampled_from(ORDER_NAMES)), draw(GRIDS), draw(st.integers(0, 3)))


@settings(max_examples=150, deadline=None)
@given(curves())
def test_a_curve_holds_each_token_once_and_its_inverse_finds_it(curve: Curve) -> None:
    assert curve.tokens.dtype == curve.positions.dtype == np.int64
    assert np.array_equal(np.sort(curve.tokens), np.arange(prod(curve.grid) + curve.lead))
    assert np.array_equal(curve.tokens[curve.positions], np.arange(len(curve)))
    assert curve.moves or np.array_equal(curve.tokens, np.arange(len(curve)))


def test_policies_name_every_order() -> None:
    assert set(ORDER_NAMES) == {"none", *ORDERS}


def steps(grid: tuple[int, ...], tokens: np.ndarray) -> np.ndarray:
    """How far each token of the curve is from the one before, along all axes together."""
    return np.abs(np.diff(np.stack(np.unravel_index(tokens, grid)), axis=1)).sum(0)


def test_hilbert_goes_from_neighbour_to_neighbour_on_every_grid() -> None:
    flat = product(range(1, 25), repeat=2)
    deep = product(range(1, 9), repeat=3)
    large = [(13, 45, 80), (31, 33, 35), (97, 101), (2, 3, 501)]
    for grid in (*flat, *deep, *large):
        assert (steps(grid, hilbert.tokens(grid)) == 1).all(), grid
    # The curve that is always cut in the middle does not.
    assert (steps((5, 4), morton.tokens((5, 4))) > 1).any()


@pytest.mark.parametrize("grid", [(64, 64), (8, 32, 32), (16, 16, 16)])
def test_blocks_are_squares_and_cubes_on_powers_of_two(grid: tuple[int, ...]) -> None:
    for order in ("hilbert", "morton"):
        for first in range(0, prod(grid), 64):
            cells = np.stack(np.unravel_index(ORDERS[order](grid)[first : first + 64], grid))
            assert set(cells.max(1) - cells.min(1) + 1) == {8 if len(grid) == 2 else 4}


def test_morton_sorts_by_interleaved_bits() -> None:
    for grid in ((4, 4), (5, 7), (3, 6, 2)):
        cells = list(np.ndindex(grid))
        code = {cell: "".join("".join(bits) for bits in zip(*(f"{place:08b}" for place in cell), strict=True)) for cell in cells}
        expected = [int(np.ravel_multi_index(cell, grid)) for cell in sorted(cells, key=code.__getitem__)]
        assert morton.tokens(grid).tolist() == expected


def test_the_drawings_are_what_is_computed() -> None:
    assert row.tokens((2, 4)).tolist() == list(range(8))
    for order, module in (("hilbert", hilbert), ("morton", morton)):
        drawn = [line.split("    ") for line in (module.tokens.__doc__ or "").splitlines() if line.startswith("        ")][1:]
        columns = [[part.split() for part in line if part.strip()] for line in drawn]
        along = [int(number) for line in columns[:2] for number in line[1]]
        picture = [[int(number) for number in line[-1]] for line in columns]
        assert along == ORDERS[order]((4, 4)).tolist()
        assert picture == Curve(order, (4, 4)).positions.reshape(4, 4).tolist()
    drawn_curve = Curve("hilbert", (2, 2), 1)
    assert drawn_curve.tokens.tolist() == [1, 2, 4, 3, 0]
    assert drawn_curve.positions.tolist() == [4, 0, 1, 3, 2]


def assert_near(curve: Curve, radius: tuple[int, ...], q_block: int, k_block: int) -> None:
    columns = -(-len(curve) // k_block)
    expected = sorted(i * columns + j for i, j in oracles.near_blocks(curve, radius, q_block, k_block))
    assert near(curve, radius, q_block, k_block).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(curves(), st.lists(st.integers(0, 4), min_size=3, max_size=3), st.integers(1, 20), st.integers(1, 20))
def test_near_blocks_hold_a_near_pair_each_and_none_is_missed(curve: Curve, radius: list[int], q_block: int, k_block: int) -> None:
    reach = tuple(radius[: len(curve.grid)])
    assert_near(curve, reach, q_block, k_block)
    found, pairs = fullness(curve, reach, q_block, k_block), oracles.near_pairs(curve, list(reach))
    blocks = [
        pairs[i : i + q_block, j : j + k_block] for i in range(0, len(pairs), q_block) for j in range(0, len(pairs), k_block)
    ]
    touched = [block for block in blocks if block.any()]
    assert (found.blocks, found.full) == (len(touched), sum(bool(block.all()) for block in touched))
    assert found.partial == found.blocks - found.full
    assert found.density == pytest.approx(sum(block.size for block in touched) / pairs.size)
    assert found.pairs == pytest.approx(pairs.mean())


def test_what_is_near_is_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sets, "_TOKENS_AT_ONCE", 60)
    monkeypatch.setattr(block_sets, "_BYTES_AT_ONCE", 1)
    monkeypatch.setattr(block_sets, "_OF_A_RUN", 0)
    monkeypatch.setattr(row_order, "_AT_ONCE", 1)
    for order in ("hilbert", "row", "morton", "none"):
        near.cache_clear()
        assert_near(Curve(order, (9, 5, 7), 2), (2, 1, 3), 15, 2)
    near.cache_clear()


def test_windows_around_blocks_that_are_no_boxes_are_seen_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = Curve("hilbert", (12, 12))
    near.cache_clear()
    assert_near(curve, (3, 3), 16, 18)
    near.cache_clear()
    extents = neighbourhood.extents
    monkeypatch.setattr(neighbourhood, "extents", lambda curve, size: replace(extents(curve, size), filled=True))
    with pytest.raises(AssertionError):
        assert_near(curve, (3, 3), 16, 18)
    near.cache_clear()


@pytest.mark.parametrize(("grid", "radius"), [((64, 64), 8), ((8, 32, 32), 4), ((8, 32, 32), 8)])
def test_curves_have_fewer_blocks_and_more_full_ones_than_rows(grid: tuple[int, ...], radius: int) -> None:
    rows = fullness(Curve("row", grid), radius, 64)
    for order in ("hilbert", "morton"):
        found = fullness(Curve(order, grid), radius, 64)
        assert found.blocks < 0.6 * rows.blocks
        assert rows.full == 0 < found.full
        assert found.pairs == rows.pairs < found.density < rows.density


def test_a_million_tokens_are_planned_in_memory_of_their_blocks() -> None:
    curve = Curve("hilbert", (1024, 1024))
    curve.places, curve.positions  # noqa: B018  made before
    tracemalloc.start()
    found = near.__wrapped__(curve, (8, 8), 64, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == (3 * 128 - 2) ** 2
    # The blocks of all pairs are 2.7e8.
    assert peak < 200e6
