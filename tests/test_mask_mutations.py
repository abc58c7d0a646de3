"""Every rule that keeps the mask reader honest, taken away: a test must turn red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import test_mask_kinds as kinds
import torch
from finding import Call, Mutation, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from spellings import agree
from test_find_mutations import case, spelt

from dilcompile.lowering import ops
from dilcompile.passes.finding import read_operands
from dilcompile.passes.masks import arithmetic, documents, emptiness, factors, hiding, interval, reader, separable, symbols, terms
from dilcompile.passes.masks.rules import indexing, values
from dilcompile.passes.rewriting import biases, empty_rows, rewrite


def _negated_by_one_too_few(truth: Any) -> Any:
    if isinstance(truth, terms.Ge0):
        return terms.Ge0(sympy.expand(-truth.expr))
    return _NEGATION(truth)


_NEGATION = terms.negation
_AND = reader.READ["bitwise_and"]


def kind(name: str) -> Callable[[], None]:
    """One case of the table of mask kinds, by name."""
    tables = (kinds.KINDS, kinds.FILLS, kinds.TENSORS)
    (found,) = [entry for table in tables for entry in table if entry[0] == name]
    return lambda: check(found)  # type: ignore[func-returns-value]


def _as_on_a_gpu() -> None:
    """A float mask where no kernel's caller looks for swallowed rows (on the CPU the gradients are right either way)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_swallows", lambda call, lse: False)
        kind("a float mask")()


def _fractions() -> None:
    """A small fill times numbers that are nearly 1."""
    with torch.no_grad():
        mask = 1 - torch.rand(2, 7) * 1e-4
        call = Call(lambda q, k, v, m: kinds.attend(q @ k.mT + (1 - m[:, None, None]) * -1e4, v))
        agree(call, *(torch.randn(2, 3, 7, 4) for _ in range(3)), mask, gradients=False)


_PAIR = separable.Separated._pair


def _without_row(self: Any, kind: str, row: Any, key: Any) -> Any:
    return _PAIR(self, kind, sympy.Integer(0), key)


def _by_place_anyway(factors: Any, documents: Any, reader: Any) -> Any:
    """Any integer of the key is taken for its place."""

    def placed(expr: Any) -> Any:
        for element in expr.atoms(terms.IntegerElement):
            expr = expr.subs(element, symbols.K if symbols.K in element.free_symbols else symbols.Q)
        return expr

    return [terms.mapped(factor, placed) for factor in factors]


# name, where, attribute, what it becomes, the test that must turn red.
MUTATIONS: list[Mutation] = [
    ("documents may come back", documents, "_runs", lambda *_: True, case("numbers that may come back")),
    ("indices count from the front", indexing, "place", lambda reader, index, size: index, case("indexed from the back")),
    ("bytes do not wrap", values, "exact_arithmetic", lambda node: None, case("bytes that wrap around")),
    ("every fill absorbs", emptiness, "absorbs", lambda *_: True, case("a small number that hides a batch row")),
    ("fractions are 0 or 1", hiding, "absorbs", lambda *_: True, _fractions),
    ("masks are never learned", reader.MaskReader, "learned", lambda *_: False, case("learned fractions and the least number")),
    ("no row is ever empty", factors, "_always_sees", lambda *_: True, case("strictly earlier")),
    ("empty rows are uniform", read_operands, "emptiness_of", lambda *_, **__: emptiness.Emptiness("uniform"), case("causal and padding by two fills")),
    ("or is and", reader, "READ", {**reader.READ, "bitwise_or": _AND, "__or__": _AND}, case("a prefix")),
    ("not is off by one", values, "negation", _negated_by_one_too_few, spelt(maker="reverse", hide="where")),
    ("not is off by one, at the end", read_operands, "negation", _negated_by_one_too_few, case("top left")),
    ("runs end one later", interval, "_floored", lambda expr, by: sympy.floor((expr + 1) / by), kind("a prefix")),
    ("chunks begin at the first key", interval, "_chunk", lambda expr: interval.Interval(sympy.Integer(0), None), kind("chunks after padding")),
    ("rows that don't count do", interval, "NOTHING", interval.EVERYTHING, kind("queries that don't count")),
    ("numbers of the row are forgotten", separable.Separated, "_pair", _without_row, kind("labels that come back")),
    ("positions count anywhere", factors, "counted_inside", _by_place_anyway, kind("positions that are not counted")),
    ("cut-off keys come back", emptiness, "_not_just", lambda *_: True, kind("one fill, then the same added")),
    ("what shares a softmax has one each", empty_rows, "_joined", lambda emit, calls: calls[0], kind("fills of two sizes")),
    ("gradients flow through fills", empty_rows, "_kept", lambda emit, inputs, instead: inputs, kind("fills of two sizes")),
    ("nothing swallows", biases, "swallows", lambda dtype: float("-inf"), _as_on_a_gpu),
    ("masks are read at the end", rewrite, "place_of", lambda mask, output, mutations: output, case("padding, after it was used")),
    ("remainders are not taken apart", separable, "_apart", lambda truth: sympy.expand(truth.expr), kind("each third key")),
    ("the lesser of two is the greater", reader, "READ", {**reader.READ, "min": reader.READ["max"]}, kind("the lesser of two masks")),
    ("eye is all ones", reader, "READ", {**reader.READ, "eye": reader.READ["ones"]}, kind("not the own key, by eye")),
    ("what is hidden may be a bias", terms, "_where_true", lambda number, known: number, case("turned round and filled")),
    ("every zero is one", arithmetic, "nonzero", lambda value: True, spelt(mask="padding")),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)
