"""Every rule that keeps the finder honest, taken away: a test must turn red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_find_anchors as anchors
import test_find_flash as flashes
import test_find_flex as flexes
import test_find_sinks as sinks
import test_masks_sound as sound
import torch
from finding import Call, Mutation, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from spellings import Spelling, Written, agree, inputs_of

from dilcompile.passes.axes import axes
from dilcompile.passes.finding import facts, match, roles, score_path, score_steps, value_path
from dilcompile.passes.finding.spellings import exp_over_sum, flash, flex, own_sum, renormalised
from dilcompile.passes.graph import mutations
from dilcompile.passes.rewriting import rewrite


def case(name: str, **options: Any) -> Callable[[], None]:
    """One case of the table of careful masks, by name."""
    tables = (sound.WRITTEN, sound.SCORES, sound.MASKS, sound.ADDED, sound.DOCUMENTS, sound.SDPA)
    (found,) = [entry for table in tables for entry in table if entry[0] == name]
    return lambda: check(found, **options)


def spelt(**how: Any) -> Callable[[], None]:
    """A spelling that must be exact and rewritten."""

    def run() -> None:
        spelling = Spelling(**how)
        found = agree(Written(spelling).eval(), *inputs_of(spelling))
        assert (found.misses, found.refusals) == ([], [])

    return run


def sunk(name: str) -> Callable[[], None]:
    """A case of the table of columns beside the keys."""
    (found,) = [entry for entry in sinks.CASES if entry[0] == name]
    return lambda: sinks.test_columns_beside_the_keys(found)


def anchored(name: str) -> Callable[[], None]:
    """A case of a spelling rule."""
    (found,) = [entry for cases in anchors.CASES.values() for entry in cases if entry[0] == name]
    return lambda: anchors.test_spellings(found)


def _one_document(emit: Any, starts: Any, k_len: Any) -> Any:
    return emit(torch.ops.aten.zeros.default, [1, k_len], dtype=torch.int64)


def _values_in_their_own_order(columns: Any, dims: Any, product: Any) -> Any:
    return tuple(atom for _, theirs in dims for atom in theirs)


def _tiled(tracked: Any, node: Any) -> Any:
    before = list(tracked[node.args[0]])
    before[node.args[2]] = tracked.fresh(node.args[1], broadcast=True) + before[node.args[2]]
    return tuple(before)


def _crossed() -> None:
    """Keys and values cut into parts that stand in different orders."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.einsum("bqd,bkd->bqk", q, k).softmax(-1).view(2, 9, 3, 3)
        return torch.einsum("bwcd,bqcw->bqd", v, weights)

    agree(Call(call), torch.randn(2, 9, 4), torch.randn(2, 9, 4), torch.randn(2, 3, 3, 4))


def _without_more(*given: Any) -> Any:
    return ((quotient, own_sum.Sum(total.dim), division) for quotient, total, division in own_sum.divisions(*given))


def _undivided(product: Any, weights: Any, division: Any, facts: Any) -> Any:
    return division.at


# name, where, attribute, what it becomes, the test that must turn red.
MUTATIONS: list[Mutation] = [
    ("writes are forgotten: scores", mutations.Mutations, "writes", lambda *_: [], case("scores, by setitem")),
    ("writes are forgotten: views", mutations.Mutations, "writes", lambda *_: [], case("scores, through a view")),
    ("writes are forgotten: masks", mutations.Mutations, "writes", lambda *_: [], case("an additive mask, by setitem")),
    ("writes are forgotten: queries", mutations.Mutations, "writes", lambda *_: [], case("queries, through a view")),
    ("masks are read too late", rewrite, "place_of", lambda mask, output, mutations: output, case("padding, after it was used")),
    ("biases may be made of scores", score_path, "independent", lambda *_: None, case("residual talking heads")),
    ("any maximum cancels", score_steps, "is_row_number", lambda *_: True, case("less the column's maximum")),
    ("the soft cap is no border", score_steps, "uncapped", lambda *_: None, case("shifted before the cap")),
    ("casts keep everything", score_steps, "uncast", lambda node: node.args[0], case("cast to integers")),
    ("any fill hides", score_steps, "_HIDES", 1e30, case("a fill made small again")),
    ("sinks take nothing", rewrite, "_past_sinks", lambda emit, out, *_: out, lambda: sinks.test_learned_sinks(None, False, 1)),
    ("sinks are data", match, "_sinks", lambda *_: "none", sinks.test_a_sink_of_data_beside_rows_without_keys_is_kept),
    ("any slice drops the sinks", value_path, "keeps_all", lambda node: True, sunk("the wrong column dropped")),
    ("any sum will do", own_sum, "reduced_dim", lambda *_: 3, anchored("not found: over another's sum")),
    ("a number in the sum is lost", renormalised, "divisions", _without_more, anchored("not found: a number in the sum")),
    ("any mask holds 0 and 1", facts.Facts, "zeros_and_ones", lambda *_: "surely", anchored("not found: a mask of other numbers")),
    ("any row's sum will do", value_path, "_divided", _undivided, anchored("not found: divided after the values, heads by others' sums")),
    ("values may be changed before they are divided", value_path, "_moves", lambda user: True, anchored("not found: divided after the values, changed before")),
    ("twice the sum is the sum", own_sum, "_MOVES", own_sum._MOVES | {"mul"}, anchored("not found: divided after the values, by twice the sum")),
    ("values may be written before they are divided", mutations.Mutations, "writes", lambda *_: [], lambda: anchors.test_what_is_divided_later_must_still_hold_what_it_held()),
    ("reciprocals may be written", mutations.Mutations, "writes", lambda *_: [], anchored("not found: by its own reciprocal, written")),
    ("sums may lose their fractions", own_sum, "is_float", lambda _: True, anchored("not found: divided after the values, fractions cut off")),
    ("a clamp never acts", exp_over_sum, "_check", lambda *_: None, anchored("not found: clamped")),
    ("a finite number keeps its weight", exp_over_sum, "_NOTHING", 1e300, lambda: anchors.test_rows_without_keys_under_infinity()),
    ("what score_mod hides is seen", flex, "_modified", lambda _: flex._Modified(), lambda: flexes.test_score_mods(flexes.SCORE_MODS[0])),
    ("packed sequences see each other", rewrite, "_documents", _one_document, lambda: flashes.test_varlen(flashes.PACKED[0])),
    ("flash is aligned top left", flash, "Q", flash.Q + 3, lambda: flashes.test_flash(flashes.DENSE[3])),
    ("values stand in their own order", roles, "_in_order", _values_in_their_own_order, _crossed),
    ("keys are tiled, not repeated", axes, "RULES", {**axes.RULES, "repeat_interleave": _tiled}, spelt(share="interleave")),
    ("repeated keys never vary", axes.Axes, "_varying", lambda self, node, layout: layout, lambda: _repeated_then_changed()),
    ("heads and rows are swapped", axes, "RULES", {**axes.RULES, "transpose": lambda tracked, node: tracked[node.args[0]]}, spelt()),
]  # fmt: skip


def _repeated_then_changed() -> None:
    """Keys that were spread over the heads and then made different."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.expand(2, 4, 7, 6).masked_fill(torch.arange(4)[:, None, None] == 2, 0.0)
        return sound.attend(q @ k.mT, v.expand(2, 4, 7, 6))

    agree(Call(call), torch.randn(2, 4, 7, 6), torch.randn(2, 1, 7, 6), torch.randn(2, 1, 7, 6))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)
