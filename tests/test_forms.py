"""Options of forms: text, validation messages, fidelity, rejection, notes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from dilcompile.errors import FormError
from dilcompile.forms import FORMS, BlockSparse, Dense, Dilated, Form, SlidingWindow, make_form, parse_form
from dilcompile.relation import Problem
from dilcompile.site import AttentionSite, MaskSpec

ALL = [
    Dense(),
    SlidingWindow(512),
    SlidingWindow(16, sinks=4, step=2),
    Dilated(),
    Dilated([2048, "seq"], [1, 4]),
    Dilated([8, 16], [1, 2], offset="own", union="set", heads="grouped", output_scale="1/k", sinks=1, local=2),
    Dilated([8], [2], coverage="zero", merge_grad="detach", output_scale=0.5),
    BlockSparse(64, {"any": [{"local": {"before": 2}}, {"random": {"blocks": 1, "by_head": True}}]}),
    BlockSparse(16, {"global": {"rows": 1}}, coverage="zero"),
    BlockSparse(16, {"document": {"lengths": [20, 30]}}),
    BlockSparse([16, 32], {"all": [{"bigbird": {}}, {"explicit": {"starts": [0, 1], "columns": [0]}}]}),
]


@pytest.mark.parametrize("form", ALL, ids=str)
def test_text_pickle_and_copy_round_trip(form: Form) -> None:
    assert parse_form(str(form)) == form
    assert pickle.loads(pickle.dumps(form)) == form
    assert copy.deepcopy(form) == form
    assert hash(form) == hash(parse_form(str(form)))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("dense", Dense()),
        ("sliding_window(window=8)", SlidingWindow(8)),
        ("dilated(segments=[4, 8], rates=[1, 2])", Dilated((4, 8), (1, 2))),
    ],
)
def test_parse(text: str, form: Form) -> None:
    assert parse_form(text) == form


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("dilated", {"segments": [], "rates": []}, "segments and rates are empty"),
    ("dilated", {"segments": [8], "rates": [1, 2]}, "segments has 1 entries but rates has 2; give one rate a segment"),
    ("dilated", {"segments": [0], "rates": [1]}, "segments[0] must be a whole number of at least 1, not 0"),
    ("dilated", {"segments": [True], "rates": [1]}, "segments[0] must be a whole number of at least 1, not True"),
    ("dilated", {"segments": [8.0], "rates": [1]}, "segments[0] must be a whole number of at least 1, not 8.0"),
    ("dilated", {"segments": [float("nan")], "rates": [1]}, "not nan"),
    ("dilated", {"segments": ["all"], "rates": [1]}, "segments[0] must be a whole number or 'seq', not 'all'"),
    ("dilated", {"segments": [8], "rates": [-1]}, "rates[0] must be a whole number of at least 1, not -1"),
    ("dilated", {"segments": [9], "rates": [2]}, "segments[0]=9 is not a multiple of rates[0]=2; use 8"),
    ("dilated", {"segments": "auto", "rates": [1]}, "segments is 'auto' but the other is a list"),
    ("dilated", {"segments": "full", "rates": "auto"}, "segments must be one of auto, not 'full'"),
    ("dilated", {"segments": 8, "rates": 1}, "must be lists of whole numbers or 'auto', not 8"),
    ("dilated", {"segments": [8], "rates": [1], "offset": "row"}, "offset must be one of head_mod"),
    ("dilated", {"segments": [8], "rates": [1], "union": "bag"}, "union must be one of multiset, set, not 'bag'"),
    ("dilated", {"segments": [8], "rates": [1], "heads": "some"}, "heads must be one of all, grouped"),
    ("dilated", {"segments": [8], "rates": [1], "coverage": "one"}, "coverage must be one of require, zero"),
    ("dilated", {"segments": [8], "rates": [1], "merge_grad": "no"}, "merge_grad must be one of exact, detach"),
    ("dilated", {"segments": [8], "rates": [1], "sinks": -1}, "sinks must be a whole number of at least 0, not -1"),
    ("dilated", {"segments": [8], "rates": [1], "local": 1.5}, "local must be a whole number of at least 0"),
    ("dilated", {"segments": [8], "rates": [1], "output_scale": 0}, "output_scale must be a finite number"),
    ("dilated", {"segments": [8], "rates": [1], "output_scale": float("inf")}, "not inf"),
    ("dilated", {"segments": [8], "rates": [1], "output_scale": "half"}, "not 'half'"),
    ("dilated", {"segments": [8], "rates": [2]}, "leave queries without any key"),
    ("dilated", {"segments": [8, 8], "rates": [1, 2], "heads": "grouped"}, "leave queries without any key"),
    ("dilated", {"segment": [8]}, "unknown option 'segment' (did you mean 'segments'?); the options are segments, rates, offset"),
    ("sliding_window", {"window": 4, "sink": 3}, "unknown option 'sink' (did you mean 'sinks'?); the options are window, sinks"),
    ("dense", {"window": 4}, "form dense: unknown option 'window'; it has no options"),
    ("sliding_window", {}, "form sliding_window: the option 'window' is missing; give it, as in sliding_window(window=...)"),
    ("dens", {}, "form 'dens' is unknown (did you mean 'dense'?); the forms are dense, sliding_window, dilated, block_sparse"),
    ("block_sparse", {"block": 64}, "the option 'pattern' is missing"),
    ("block_sparse", {"block": 64, "pattern": {"local": {}}, "coverage": "one"}, "coverage must be one of require, zero"),
    ("block_sparse", {"block": 8, "pattern": {"local": {}}}, "block must be a whole number of at least 16, not 8"),
    ("block_sparse", {"block": 512, "pattern": {"local": {}}}, "block must be at most 256, not 512"),
    ("block_sparse", {"block": [16, 16, 16], "pattern": {"local": {}}}, "block must be one number or two (queries, keys), not"),
    ("block_sparse", {"block": 64, "pattern": "local"}, "pattern must be one pattern by name, such as {local: {before: 2}}"),
    (
        "block_sparse",
        {"block": 64, "pattern": {"locl": {}}},
        "pattern 'locl' is unknown (did you mean 'local'?); the patterns are",
    ),
    ("block_sparse", {"block": 64, "pattern": {"any": []}}, "pattern.any must be a list of patterns, not []"),
    (
        "block_sparse",
        {"block": 64, "pattern": {"any": [{"local": {"befor": 1}}]}},
        "pattern.any[0].local unknown option 'befor' (did",
    ),
    (
        "block_sparse",
        {"block": 64, "pattern": {"document": {"lengths": [3, 0]}}},
        "document.lengths[1] must be a whole number of at",
    ),
    ("block_sparse", {"block": 64, "pattern": {"random": {}}}, "pattern.random the option 'blocks' is missing"),
    (
        "block_sparse",
        {"block": 64, "pattern": {"random": {"blocks": -1}}},
        "pattern.random.blocks must be a whole number of at least 0",
    ),
    ("block_sparse", {"block": 64, "pattern": {"random": {"blocks": 1, "by_head": 1}}}, "by_head must be true or false, not 1"),
    ("block_sparse", {"block": 64, "pattern": {"fixed": {"stride": 4, "offset": 4}}}, "offset 4 is not below stride 4"),
    ("block_sparse", {"block": 64, "pattern": {"hierarchical": {"spans": [2, 3]}}}, "each is a multiple of the one before"),
    (
        "block_sparse",
        {"block": 64, "pattern": {"hierarchical": {"spans": [2], "heads": [1, 1]}}},
        "heads has 2 entries but spans has 1",
    ),
    ("block_sparse", {"block": 64, "pattern": {"explicit": {"starts": [0, 2], "columns": [1]}}}, "starts must rise from 0 to"),
    (
        "block_sparse",
        {"block": 64, "pattern": {"vertical_slash": {"slashes": 3}}},
        "slashes must be a list of whole numbers, not 3",
    ),
    ("sliding_window", {"window": 0}, "window must be a whole number of at least 1, not 0"),
    ("sliding_window", {"window": "8"}, "window must be a whole number of at least 1, not '8'"),
    ("sliding_window", {"window": 8, "step": 0}, "step must be a whole number of at least 1, not 0"),
    ("sliding_window", {"window": 2**48 + 1}, "window must be at most 2**48, longer than any sequence, not 281474976710657"),
    ("dilated", {"segments": [2**63], "rates": [1]}, "segments[0] must be at most 2**48, longer than any sequence, not 92233"),
    ("sliding_window", {"window": 8, "sinks": None}, "sinks must be a whole number of at least 0, not None"),
    ("ring", {}, "form 'ring' is unknown; the forms are dense, sliding_window, dilated"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{i}-{bad[2][:30]}" for i, bad in enumerate(BAD)])
def test_bad_options_say_what_came_and_what_was_expected(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FormError) as caught:
        make_form(name, options)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["dense(", "3", "dense(1)", "a.b()"])
def test_text_that_is_no_form(text: str) -> None:
    with pytest.raises(FormError, match="form"):
        parse_form(text)


def test_more_branches_than_heads() -> None:
    with pytest.raises(FormError, match="2 branches and 1 heads"):
        Dilated([4, 8], [1, 1], heads="grouped").relation(Problem(1, 1, 1, 8, 8, 4, 4))


def test_auto_branches_are_geometric() -> None:
    assert Dilated().branches(100) == ((2048, 1),)
    assert Dilated().branches(5000) == ((2048, 1), (4096, 2), (8192, 4))


def site(mask: MaskSpec | None = None, length: Any = 16, **changes: Any) -> AttentionSite:
    values: dict[str, Any] = {
        "index": 0, "module": "m", "source": "f.py:1", "spelling": "sdpa", "kind": "self", "batch": 1, "heads": 4,
        "kv_heads": 4, "q_len": length, "k_len": length, "head_dim": 8, "v_dim": 8, "dtype": torch.float32,
        "softmax_dtype": torch.float32, "device": torch.device("cpu"), "scale": 1.0, "mask": mask or MaskSpec(),
    }  # fmt: skip
    return AttentionSite(**{**values, **changes})


CAUSAL = MaskSpec(causal=True)
UNKNOWN = "s0"  # any length that is not a plain number


@pytest.mark.parametrize(
    ("form", "where", "expected"),
    [
        (Dense(), site(length=UNKNOWN), "exact"),
        (SlidingWindow(16), site(CAUSAL), "exact"),
        (SlidingWindow(15), site(CAUSAL), "approximate"),
        (SlidingWindow(16), site(CAUSAL, length=UNKNOWN), "approximate"),
        (SlidingWindow(8), site(MaskSpec(causal=True, left=7), length=UNKNOWN), "exact"),
        (SlidingWindow(8, sinks=2), site(MaskSpec(causal=True, left=7), length=UNKNOWN), "exact"),
        (SlidingWindow(7), site(MaskSpec(causal=True, left=7), length=UNKNOWN), "approximate"),
        (SlidingWindow(16, step=2), site(CAUSAL), "approximate"),
        (Dilated(["seq"], [1]), site(length=UNKNOWN), "exact"),
        (Dilated([16], [1]), site(), "exact"),
        (Dilated([8], [1]), site(), "approximate"),
        (Dilated([16, 16], [1, 2]), site(), "approximate"),
        (Dilated([16, 16], [1, 2], union="set"), site(), "exact"),
        (Dilated([16, "seq"], [1, 1], output_scale="1/k"), site(), "approximate"),
        (Dilated([16], [1], output_scale="1/k"), site(), "exact"),
        (Dilated(), site(), "exact"),
        (Dilated(), site(length=4096), "approximate"),
    ],
)
def test_fidelity(form: Form, where: AttentionSite, expected: str) -> None:
    assert form.fidelity(where) == expected


@pytest.mark.parametrize("form", [Dense(), SlidingWindow(4), Dilated()])
def test_a_mask_that_was_not_read_is_a_reason_to_keep(form: Form) -> None:
    assert form.reject(site(MaskSpec(unread="x + y"))) == (
        "its mask could not be read (x + y): it stays a tensor over all pairs, which only `keep` can take"
    )
    assert form.reject(site(CAUSAL)) is None


def test_cross_attention_takes_only_dense() -> None:
    assert Dense().reject(site(kind="cross")) is None
    for form in (SlidingWindow(4), Dilated()):
        assert form.reject(site(kind="cross")) == ("it is cross attention: query and key positions are not those of one sequence")


def test_notes() -> None:
    lonely, growing = Dilated().notes(site(CAUSAL, length=4096))
    assert "sees only itself" in lonely
    assert "decode step" in growing
    (alone,) = Dilated([4, 8], [1, 2]).notes(site(CAUSAL))
    assert "a multiple of 8" in alone
    assert Dilated([4, 8], [1, 2], sinks=1).notes(site(CAUSAL)) == ()


def test_registry() -> None:
    assert list(FORMS) == ["dense", "sliding_window", "dilated", "block_sparse", "keep_structure", "union"]
