"""Every rule that keeps the finder honest, taken away: a test must turn red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_masks_sound as sound
import torch
from finding import Call, check, double  # noqa: F401  (the fixture works by being here)
from spellings import Spelling, Written, agree, inputs_of

from dilcompile.passes import axes, match, mutations, roles, score_path, score_steps


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


# name, where, attribute, what it becomes, the test that must turn red.
MUTATIONS: list[tuple[str, Any, str, Any, Callable[[], None]]] = [
    ("writes are forgotten: scores", mutations.Mutations, "writes", lambda *_: [], case("scores, by setitem")),
    ("writes are forgotten: views", mutations.Mutations, "writes", lambda *_: [], case("scores, through a view")),
    ("writes are forgotten: masks", mutations.Mutations, "writes", lambda *_: [], case("an additive mask, by setitem")),
    ("writes are forgotten: queries", mutations.Mutations, "writes", lambda *_: [], case("queries, through a view")),
    ("masks are read too late", match, "_readable_at", lambda *_: None, case("padding, after it was used")),
    ("biases may be made of scores", score_path, "independent", lambda *_: None, case("residual talking heads")),
    ("any maximum cancels", score_steps, "is_row_number", lambda *_: True, case("less the column's maximum")),
    ("the soft cap is no border", score_steps, "uncapped", lambda *_: None, case("shifted before the cap")),
    ("casts keep everything", score_steps, "uncast", lambda node: node.args[0], case("cast to integers")),
    ("any fill hides", score_steps, "_HIDES", 1e30, case("a fill made small again")),
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
def test_a_rule_taken_away_is_noticed(
    mutation: tuple[str, Any, str, Any, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where, attribute, wrong, test = mutation
    test()
    monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises(AssertionError):
        test()
