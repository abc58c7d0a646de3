"""Every rule that keeps the mask reader honest, taken away: a test must turn red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
from finding import double  # noqa: F401  (the fixture works by being here)
from test_find_mutations import case, spelt

from dilcompile.passes import read_operands
from dilcompile.passes.masks import arithmetic, documents, emptiness, factors, hiding, reader, terms
from dilcompile.passes.masks.rules import indexing, values


def _negated_by_one_too_few(truth: Any) -> Any:
    if isinstance(truth, terms.Ge0):
        return terms.Ge0(sympy.expand(-truth.expr))
    return _NEGATION(truth)


_NEGATION = terms.negation
_AND = reader.READ["bitwise_and"]

# name, where, attribute, what it becomes, the test that must turn red.
MUTATIONS: list[tuple[str, Any, str, Any, Callable[[], None]]] = [
    ("documents may come back", documents, "_runs", lambda *_: True, case("numbers that may come back")),
    ("indices count from the front", indexing, "place", lambda reader, index, size: index, case("indexed from the back")),
    ("bytes do not wrap", values, "exact_arithmetic", lambda node: None, case("bytes that wrap around")),
    ("every fill absorbs", emptiness, "absorbs", lambda *_: True, case("a small number that hides a batch row")),
    ("fractions are 0 or 1", hiding, "absorbs", lambda *_: True, case("fractions", gradients=False)),
    ("masks are never learned", reader.MaskReader, "learned", lambda *_: False, case("learned fractions and the least number")),
    ("no row is ever empty", factors, "_always_sees", lambda *_: True, case("strictly earlier")),
    ("empty rows are uniform", read_operands, "emptiness_of", lambda *_, **__: emptiness.Emptiness("uniform"), case("causal and padding by two fills")),
    ("or is and", reader, "READ", {**reader.READ, "bitwise_or": _AND, "__or__": _AND}, case("a prefix")),
    ("not is off by one", values, "negation", _negated_by_one_too_few, spelt(maker="reverse", hide="where")),
    ("not is off by one, at the end", read_operands, "negation", _negated_by_one_too_few, case("top left")),
    ("every zero is one", arithmetic, "nonzero", lambda value: True, spelt(mask="padding")),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(
    mutation: tuple[str, Any, str, Any, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where, attribute, wrong, test = mutation
    test()
    monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises(AssertionError):
        test()
