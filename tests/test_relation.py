"""Relations against loops over all pairs: multiplicities, exact counts, pieces and needed keys."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Setting, counts

from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.generators import Segment, Sinks, Window
from dilcompile.lowering.view_path import pieces
from dilcompile.lowering.view_path.pieces import plan
from dilcompile.progression import Progression, RowKeys, union_count
from dilcompile.relation import Problem, Relation, Term


def problem_of(at: Setting) -> Problem:
    return Problem(1, at.heads, at.kv_heads, at.q_len, at.k_len, 8, 8, at.q_offset, at.causal, at.left, at.right)


def multiplicity(relation: Relation) -> torch.Tensor:
    size = relation.problem
    t = torch.arange(size.q_len)[:, None] + size.q_offset
    return relation.multiplicity(torch.arange(size.heads)[:, None, None], t, torch.arange(size.k_len))


@st.composite
def settings_of(draw: st.DrawFn) -> Setting:
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    k_len, q_len = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return Setting(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        q_offset=draw(st.sampled_from([0, k_len - q_len, 3, -2])),
        causal=draw(st.booleans()),
        left=draw(st.sampled_from([None, None, 0, 5])),
        right=draw(st.sampled_from([None, None, -1, 4])),
    )


@st.composite
def forms(draw: st.DrawFn) -> Form:
    kind = draw(st.sampled_from(["dense", "window", "dilated"]))
    if kind == "dense":
        return Dense()
    if kind == "window":
        return SlidingWindow(draw(st.integers(1, 9)), draw(st.integers(0, 2)), draw(st.integers(1, 3)))
    rates = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3))
    return Dilated(
        segments=[rate * draw(st.integers(1, 5)) for rate in rates],
        rates=rates,
        offset=draw(st.sampled_from(["head_mod", "head_block", "branch", "zero", "own"])),
        union=draw(st.sampled_from(["multiset", "set"])),
        sinks=draw(st.integers(0, 2)),
        local=draw(st.integers(0, 3)),
        coverage="zero",
    )


@given(forms(), settings_of())
@settings(max_examples=80, deadline=None)
def test_a_relation_is_what_the_definition_says(form: Form, at: Setting) -> None:
    relation = form.relation(problem_of(at))
    expected = counts(form, at)
    assert np.array_equal(multiplicity(relation).numpy(), expected)
    assert relation.pairs() == expected.sum()


@given(forms(), settings_of())
@settings(max_examples=80, deadline=None)
def test_pieces_hold_each_pair_as_often_as_the_relation(form: Form, at: Setting) -> None:
    relation = form.relation(problem_of(at))
    assert torch.equal(expand(relation), multiplicity(relation))


def expand(relation: Relation) -> torch.Tensor:
    """The multiplicities that a plan's pieces add up to; every index must lie inside, fresh rows must be new."""
    size = relation.problem
    total = torch.zeros(size.heads, size.q_len, size.k_len, dtype=torch.int64)
    seen: set[tuple[int, int]] = set()
    for piece in plan(relation, 0, size.kv_heads).pieces:
        for numbers in itertools.product(*(range(axis.size) for axis in piece.axes)):
            steps = list(zip(numbers, piece.axes, strict=True))
            head = piece.head + sum(n * axis.head for n, axis in steps)
            h = head * size.group + piece.group + sum(n * axis.group for n, axis in steps)
            shift = sum(n * axis.position for n, axis in steps)
            for j, i in itertools.product(range(piece.rows), range(piece.keys)):
                row, key = piece.row + shift + j * piece.step, piece.key + shift + i * piece.step
                assert 0 <= row < size.q_len
                assert 0 <= key < size.k_len
                if piece.low is not None and i < j + piece.low:
                    continue
                if piece.high is not None and i > j + piece.high:
                    continue
                places = (torch.tensor(x) for x in (h, row + size.q_offset, key))
                before = relation.terms[: piece.term] if piece.exclusive else ()
                h_t, t_t, k_t = places
                total[h, row, key] += not any(bool(term.generator.contains(h_t, t_t, k_t)) for term in before)
            rows = {(h, piece.row + shift + j * piece.step) for j in range(piece.rows)}
            assert not piece.fresh or not rows & seen
            seen |= rows
    return total


@given(forms(), settings_of(), st.integers(0, 20), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_keys_needed_hold_every_key_that_is_read(form: Form, at: Setting, row: int, rows: int) -> None:
    relation = form.relation(problem_of(at))
    start = row % at.q_len + at.q_offset
    span = Progression(start, min(start + rows, at.q_offset + at.q_len))
    found = multiplicity(relation)
    group = at.heads // at.kv_heads
    for kv_head in range(at.kv_heads):
        needed = {k for keys in relation.keys_needed(span, kv_head) for k in keys.positions()}
        read = found[kv_head * group : (kv_head + 1) * group, span.start - at.q_offset : span.stop - at.q_offset]
        assert set(read.sum((0, 1)).nonzero().flatten().tolist()) <= needed


def test_a_decode_step_needs_a_bounded_number_of_keys() -> None:
    relation = Dilated([8, 16, 32], [1, 2, 4], sinks=1).relation(Problem(1, 8, 8, 1000, 1000, 8, 8, 0, True))
    sizes = [
        len({k for keys in relation.keys_needed(Progression(t, t + 1), head) for k in keys.positions()})
        for t in range(500, 600)
        for head in range(8)
    ]
    assert max(sizes) <= 3 * 8 + 1


def test_geometric_branches_cost_what_the_formula_says() -> None:
    length = 1 << 20
    problem = Problem(1, 32, 8, length, length, 128, 128, 0, False)
    relation = Dilated().relation(problem)
    expected = sum((length // w) * (w // r) ** 2 for w, r in Dilated().branches(length))
    assert relation.pairs() == 32 * expected
    assert relation.flops() == 4 * 128 * 32 * expected
    assert relation.flops(backward=True) == 10 * 128 * 32 * expected


def test_a_union_as_a_set_is_never_larger() -> None:
    problem = Problem(1, 4, 4, 64, 64, 8, 8, 0, True)
    several, once = (Dilated([8, 32], [1, 2], union=union).relation(problem) for union in ("multiset", "set"))
    assert once.pairs() < several.pairs()
    assert int(multiplicity(once).max()) == 1
    assert int(multiplicity(several).max()) == 2


def test_union_count_matches_sets() -> None:
    parts = [
        RowKeys(np.array([0, 3]), np.array([20, 30]), 2),
        RowKeys(np.array([1, 5]), np.array([25, 9]), 3),
        RowKeys(np.array([4, 0]), np.array([8, 0]), 1),
    ]
    expected = [len(set().union(*(range(int(p.first[row]), int(p.stop[row]), p.step) for p in parts))) for row in (0, 1)]
    assert union_count(parts).tolist() == expected


@pytest.mark.parametrize(
    ("relation", "text"),
    [
        (Dense().relation(Problem(1, 1, 1, 4, 4, 8, 8, 0, True)), "everything & causal"),
        (
            SlidingWindow(4, sinks=2).relation(Problem(1, 1, 1, 8, 8, 8, 8, 0, True)),
            "window(3, 0) | sinks(2) & causal",
        ),
        (
            Dilated([8, 16], [1, 2]).relation(Problem(1, 2, 2, 16, 16, 8, 8)),
            "segment(8, rate 1, residue 0) + segment(16, rate 2, residue 0/1)",
        ),
    ],
)
def test_text(relation: Relation, text: str) -> None:
    assert str(relation) == text


def test_a_relation_survives_pickling() -> None:
    relation = Relation(
        Problem(1, 2, 2, 8, 8, 4, 4),
        (Term(Segment(4, 2, (0, 1))), Term(Window(2, None, 2), True), Term(Sinks(1), True)),
    )
    assert pickle.loads(pickle.dumps(relation)) == relation


def test_shifted_copies_are_one_piece() -> None:
    relation = Dilated([8, 32], [1, 4]).relation(Problem(1, 8, 8, 64, 64, 8, 8, 0, True))
    first, second = plan(relation, 0, 8).pieces
    assert (first.copies, first.rows, second.copies, second.rows) == (64, 8, 16, 8)
    assert pieces.Axis(4, head=1, position=1) in second.axes
