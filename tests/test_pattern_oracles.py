"""Oracles of every pattern in the registry, by itself: sites and options are drawn, blocks are held to the pairs one by one.

A pattern that is added to ``KINDS`` is drawn from its options as it declares them. Those whose options depend on each other have a
strategy of their own in ``DEPENDENT``. Patterns that the data of a call decides are in test_adaptive, those of a grid of tokens in
test_token_orders, and patterns by head in test_union.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import scripts
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import Setting
from test_kernels import run
from torch import Tensor

from dilcompile.blocks import spec as specs
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists
from dilcompile.blocks.patterns import Pattern
from dilcompile.blocks.spec import KINDS, SETS, problems_of
from dilcompile.forms import BlockSparse
from dilcompile.generators import Blocks
from dilcompile.progression import Positions
from dilcompile.relation import Problem

# Blocks that sizes alone decide, of any sequence.
PLAIN = [name for name, kind in KINDS.items() if not kind.on_grid and name not in ("topk", "mass", "given")]
NAMES = [*PLAIN, *(name for name in SETS if name not in ("heads", "groups"))]
SIZES = [16, 17, 32, 48, 64, 100, 128, 256]


def hierarchical() -> st.SearchStrategy[dict[str, Any]]:
    spans = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(lambda steps: np.cumprod(steps).tolist())
    return spans.flatmap(lambda s: st.lists(st.integers(0, 2), max_size=len(s)).map(lambda heads: {"spans": s, "heads": heads}))


def explicit() -> st.SearchStrategy[dict[str, Any]]:
    rows = st.lists(st.lists(st.integers(0, 12), max_size=4), max_size=8)
    return rows.map(lambda held: {"starts": np.cumsum([0, *map(len, held)]).tolist(), "columns": [*chain.from_iterable(held)]})


DEPENDENT: dict[str, Callable[[], st.SearchStrategy[dict[str, Any]]]] = {"hierarchical": hierarchical, "explicit": explicit}


def value(wanted: Any) -> st.SearchStrategy[Any]:
    """What an option may be that is declared like this."""
    if wanted is bool:
        return st.booleans()
    if isinstance(wanted, list):
        return st.lists(st.integers(wanted[0], wanted[0] + 7), max_size=4)
    return st.integers(wanted, wanted + 4)


def options(name: str) -> st.SearchStrategy[dict[str, Any]]:
    if name in DEPENDENT:
        return DEPENDENT[name]()
    kind = KINDS[name]
    needed = {key: value(wanted) for key, wanted in kind.options.items() if key in kind.required}
    others = {key: value(wanted) for key, wanted in kind.options.items() if key not in kind.required}
    return st.fixed_dictionaries(needed, optional=others).filter(lambda made: not problems_of({name: made}, ()))


def patterns(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """A pattern as users write it."""
    if name in SETS:
        part = st.sampled_from(PLAIN).flatmap(patterns)
        return st.lists(part, min_size=1, max_size=3).map(lambda parts: {name: parts})
    return options(name).map(lambda made: {name: made})


@st.composite
def problems(draw: st.DrawFn, longest: int = 400) -> Problem:
    """Few queries or all of them, before, at or behind the keys' end; heads that share keys or don't; every mask of a site."""
    kv_heads = draw(st.integers(1, 2))
    limit = st.one_of(st.none(), st.integers(0, 150))
    q_len, k_len = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    if draw(st.booleans()):
        k_len = q_len
    return Problem(
        1, kv_heads * draw(st.integers(1, 2)), kv_heads, q_len, k_len, 8, 8, draw(st.sampled_from([0, 0, 16, 37])),
        draw(st.booleans()), draw(limit), draw(limit),
    )  # fmt: skip


def forms(name: str) -> st.SearchStrategy[BlockSparse]:
    size = st.sampled_from(SIZES)
    return st.builds(lambda q, k, pattern: BlockSparse((q, k), pattern, coverage="zero"), size, size, patterns(name))


def blocks_of(form: BlockSparse, site: Problem) -> Blocks:
    (term,) = form.relation(site).terms
    assert isinstance(term.generator, Blocks)
    return term.generator


def limits(site: Problem) -> Tensor:
    """The pairs [queries, keys] that the site's own mask lets through, one by one."""
    ahead = torch.arange(site.k_len) - torch.arange(site.q_offset, site.q_offset + site.q_len)[:, None]
    found = torch.ones_like(ahead, dtype=torch.bool)
    if site.is_causal:
        found &= ahead <= 0
    if site.window_left is not None:
        found &= ahead >= -site.window_left
    if site.window_right is not None:
        found &= ahead <= site.window_right
    return found


def asked(form: BlockSparse, site: Problem, head: int) -> Tensor:
    """The pairs [queries, keys] of the blocks that the pattern says it contains, block by block."""
    held, (q_block, k_block) = blocks_of(form, site), form.sizes
    rows = torch.arange(site.q_offset, site.q_offset + site.q_len) // q_block
    columns = torch.arange(site.k_len) // k_block
    number = torch.arange(int(rows[-1]) + 1)[:, None]
    found = held.pattern.contains(torch.tensor(head), number, torch.arange(int(columns[-1]) + 1), held.grid)
    return found[rows][:, columns]


@dataclass
class Listed:
    """The pairs [queries, keys] of listed blocks, and of those called full."""

    some: Tensor
    full: Tensor


def listed(lists: BlockLists, form: BlockSparse, site: Problem, turned: bool = False) -> Listed:
    found = Listed(*(torch.zeros(site.q_len, site.k_len, dtype=torch.bool) for _ in range(2)))
    q_block, k_block = form.sizes
    for owner, other, full in zip(lists.owners().tolist(), lists.blocks.tolist(), lists.full.tolist(), strict=True):
        row, column = (other, owner) if turned else (owner, other)
        first, stop = (max(0, n * q_block - site.q_offset) for n in (row, row + 1))
        block = np.s_[first:stop, column * k_block : (column + 1) * k_block]
        assert limits(site)[block].numel(), "a block outside of the sequences"
        assert not found.some[block].any(), "a block listed twice"
        found.some[block] = True
        found.full[block] = full
        assert full == bool(limits(site)[block].all()), "full blocks, and no others, are hidden nothing of"
    return found


def check(form: BlockSparse, site: Problem) -> None:
    """What is listed are the pairs; both directions say the same; what is counted is there; every time the same."""
    held = blocks_of(form, site)
    total = 0
    for head in range(site.heads):
        wanted = asked(form, site, head) & limits(site)
        lists = held.lists(head, held.grid)
        rows = listed(lists, form, site)
        assert torch.equal(rows.some & limits(site), wanted)
        turned = lists.transposed(np.arange(held.grid.columns, dtype=np.int64))
        columns = listed(turned, form, site, turned=True)
        assert torch.equal(columns.some, rows.some)
        assert torch.equal(columns.full, rows.full)
        again = blocks_of(BlockSparse(form.block, form.pattern, coverage="zero"), site).lists(head, held.grid)
        assert np.array_equal(again.blocks, lists.blocks)
        assert np.array_equal(again.starts, lists.starts)
        # A row has the blocks that it has among others: a decode step, a rank's part.
        last = replace(site, q_offset=site.q_offset + site.q_len - 1, q_len=1)
        assert torch.equal(listed(blocks_of(form, last).lists(head, blocks_of(form, last).grid), form, last).some & limits(last), wanted[-1:])
        if not held.pattern.by_head:
            assert torch.equal(asked(form, site, head), asked(form, site, 0))
        total += int(wanted.sum())
    relation = form.relation(site)
    assert relation.pairs() == total
    assert relation.density() == pytest.approx(total / (site.heads * site.q_len * site.k_len))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_the_pairs(name: str) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
    @given(forms(name), problems())
    def drawn(form: BlockSparse, site: Problem) -> None:
        check(form, site)

    drawn()


@pytest.mark.parametrize("name", NAMES)
def test_values_of_one_give_one(name: str) -> None:
    """0 where a query sees no key: also behind lists, heads that share keys, and the site's own mask."""

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
    @given(forms(name), problems(150))
    def drawn(form: BlockSparse, site: Problem) -> None:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, site.heads, site.q_len, 8, generator=generator)
        k = torch.randn(1, site.kv_heads, site.k_len, 8, generator=generator)
        mask = (site.q_offset, site.is_causal, site.window_left, site.window_right)
        out, lse = run(q, k, torch.ones_like(k), form, None, Setting(site.heads, site.kv_heads, site.q_len, site.k_len, *mask))
        seen = torch.stack([(asked(form, site, head) & limits(site)).any(-1) for head in range(site.heads)])
        # float32: one rounding for each of up to 150 weights, and of their sum.
        torch.testing.assert_close(out, seen[None, ..., None].float().expand_as(out), rtol=0, atol=150 * torch.finfo(torch.float32).eps)
        assert torch.equal(lse.isfinite(), seen[None])

    drawn()


EXAMPLES: dict[str, dict[str, Any]] = {
    "hierarchical": {"spans": [2, 4], "heads": [1]},
    "explicit": {"starts": [0, 1, 3], "columns": [0, 0, 1]},
}


def example(wanted: Any) -> Any:
    """A value of an option that is declared like this."""
    return True if wanted is bool else [wanted[0] + 1, wanted[0] + 3] if isinstance(wanted, list) else wanted + 1


def digest() -> str:
    """Of the blocks of every pattern at some options, random ones among them."""
    whole = hashlib.sha256()
    grid = Grid(32, 16, 0, 700, 700, right=0)
    for name, kind in ((name, KINDS[name]) for name in PLAIN):
        asked = EXAMPLES.get(name, {key: example(wanted) for key, wanted in kind.options.items()})
        pattern = specs.pattern_of(specs.frozen({name: asked}))  # type: ignore[arg-type]
        for head in range(2):
            whole.update(pattern.codes(head, grid.rows, grid).tobytes())
    return whole.hexdigest()


def test_another_process_has_the_same_blocks() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); import test_pattern_oracles; print(test_pattern_oracles.digest())"
    found = scripts.run(code)
    assert found.stdout.strip() == digest()


# Mutations. Each is applied to every pattern where it belongs to a pattern.


@dataclass(frozen=True)
class Mutated:
    """A pattern whose lists are not what it says that it contains."""

    whole: Pattern
    change: Callable[[Positions, Grid], Positions]

    @property
    def by_head(self) -> bool:
        return self.whole.by_head

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return self.whole.contains(h, i, j, grid)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        codes = self.change(self.whole.codes(h, rows, grid), grid)
        return codes[np.isin(codes // max(1, grid.columns), rows)]


def one_column_on(codes: Positions, grid: Grid) -> Positions:
    rows, columns = np.divmod(codes, max(1, grid.columns))
    inside = columns + 1 < grid.columns
    return rows[inside] * grid.columns + columns[inside] + 1


def without_the_last(codes: Positions, grid: Grid) -> Positions:
    return codes[:-1]


def swapped(codes: Positions, grid: Grid) -> Positions:
    rows, columns = np.divmod(codes, max(1, grid.columns))
    inside = rows < grid.columns
    return np.unique(columns[inside] * grid.columns + rows[inside])


def assert_noticed(name: str) -> None:
    """The same oracles fail within some draws, always the same ones."""

    @settings(max_examples=80, deadline=None, derandomize=True, phases=[Phase.generate], database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(forms(name), problems(200))
    def drawn(form: BlockSparse, site: Problem) -> None:
        check(form, site)

    with pytest.raises((AssertionError, IndexError)):
        drawn()


@pytest.mark.parametrize("change", [one_column_on, without_the_last, swapped])
@pytest.mark.parametrize("name", PLAIN)
def test_wrong_lists_of_every_pattern_are_noticed(name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[name]
    monkeypatch.setitem(KINDS, name, replace(kind, build=lambda **given: Mutated(kind.build(**given), change)))
    assert_noticed(name)


def _no_causality(patch: pytest.MonkeyPatch) -> None:
    reach = Grid.reach
    patch.setattr(Grid, "reach", lambda self, rows: reach(replace(self, right=None), rows))
    patch.setattr(Grid, "full", lambda self, rows, columns: np.ones(rows.shape, dtype=np.bool_))


def _one_key_too_far(patch: pytest.MonkeyPatch) -> None:
    full = Grid.full
    patch.setattr(Grid, "full", lambda self, rows, columns: full(replace(self, right=None if self.right is None else self.right + 1), rows, columns))


def _no_left_limit(patch: pytest.MonkeyPatch) -> None:
    pairs = Grid.pairs
    patch.setattr(Grid, "pairs", lambda self, rows, columns: pairs(replace(self, left=None), rows, columns))


def _rows_and_columns_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockLists, "transposed", lambda self, lines: self)


def _no_ragged_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Grid, "columns", property(lambda self: max(1, self.k_len // self.k_block)))


def _drawn_anew_each_time(patch: pytest.MonkeyPatch) -> None:
    count = iter(range(1 << 30))
    patch.setattr(specs.Random, "_keys", lambda self, h, i: np.asarray(i) + next(count))


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("local", _no_causality),
        ("local", _one_key_too_far),
        ("global", _no_left_limit),
        ("vertical_slash", _rows_and_columns_swapped),
        ("global", _no_ragged_end),
        ("random", _drawn_anew_each_time),
    ],
)
def test_wrong_grids_lists_and_draws_are_noticed(name: str, mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        mutation(patch)
        assert_noticed(name)
