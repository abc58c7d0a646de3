"""``numerics.check``: every wrong reading or rewrite of a site is caught by trying it, and the model's own computation is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CausalAttention, MaskedBlock, SdpaAttention, Stack
from torch import Tensor, nn
from torch.export import export
from torch.fx import Node

import dilcompile
from dilcompile import rewriting
from dilcompile.decision import Decision
from dilcompile.errors import DilcompileWarning, RewriteError
from dilcompile.passes.finding.match import Match
from dilcompile.passes.validation import validate

ATTENTION = torch.ops.dilcompile.attention.default
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"form": "dense"},
    "window": {"form": "sliding_window", "window": 4},
    "dilated": {"form": "dilated", "segments": [4, 16], "rates": [1, 4], "offset": "own"},
}


def policy(check: str, form: str = "dense", quality: str = "keep", **tolerance: float) -> dict[str, Any]:
    numerics = {"check": check, **({"tolerance": tolerance} if tolerance else {})}
    fallback = {"unsupported": "keep", "unmatched": "keep", "quality": quality}
    rule = {"name": "all", "apply": FORMS[form]}
    return {"version": 1, "name": "tried", "defaults": {"numerics": numerics, "fallback": fallback}, "rules": [rule]}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Padded(nn.Module):
    """Causal, scaled and padded, as BERT and GPT write it."""

    def __init__(self, fill: float = torch.finfo(torch.float32).min) -> None:
        super().__init__()
        self.qkv, self.fill = nn.Linear(32, 96), fill

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.shape[1])
        seen = (at[None, :] <= at[:, None])[None, None] & keep[:, None, None, :].bool()
        scores = (q @ k.transpose(-2, -1) * 8**-0.5).masked_fill(~seen, self.fill)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def padded() -> tuple[nn.Module, tuple[Tensor, ...]]:
    keep = torch.ones(2, 12, dtype=torch.int64)
    keep[1, :3] = 0
    return Padded(), (torch.randn(2, 12, 32), keep)


def explained(check: str = "compile", form: str = "dense", **more: Any) -> Any:
    model, args = padded()
    return dilcompile.explain(model, *args, policy=policy(check, form, **more))


@pytest.mark.parametrize("form", list(FORMS))
def test_a_right_rewrite_is_accepted_and_the_figures_are_noted(form: str) -> None:
    report = explained(form=form)
    (decision,) = report.decisions
    (note,) = [note for note in decision.notes if note.startswith("numerics.check")]
    assert note.startswith("numerics.check: compared on 6 random inputs: max ")
    assert report.graphs[0].seconds["check"] > 0


# --------------------------------------------------------------------------- each of these makes a rewrite wrong


def _argument(name: str, change: Callable[[Any], Any]) -> Callable[[Node], None]:
    def apply(call: Node) -> None:
        position = [argument.name for argument in ATTENTION._schema.arguments].index(name)
        call.update_arg(position, change(call.args[position]))

    return apply


def _swapped_axes(call: Node) -> None:
    """Keys with heads and positions exchanged and put back wrongly: the same shape, other elements."""
    k = call.args[1]
    with call.graph.inserting_before(call):
        wrong = call.graph.call_function(torch.ops.aten.reshape.default, (k, list(k.meta["val"].transpose(1, 2).shape)))
        wrong = call.graph.call_function(torch.ops.aten.transpose.int, (wrong, 1, 2))
    call.update_arg(1, wrong)


def _values_for_keys(call: Node) -> None:
    call.update_arg(1, call.args[2])


MUTATIONS: dict[str, Callable[[Node], None]] = {
    "scale": _argument("scale", lambda scale: scale * 1.001),
    "no scale": _argument("scale", lambda scale: 1.0),
    "mask not causal": _argument("is_causal", lambda causal: False),
    "mask off by one": _argument("q_offset", lambda offset: offset + 1),
    "padding forgotten": _argument("key_padding", lambda keep: None),
    "window added": _argument("window_left", lambda left: 5),
    "soft cap added": _argument("softcap", lambda cap: 30.0),
    "axes swapped": _swapped_axes,
    "values for keys": _values_for_keys,
}


def _broken(monkeypatch: pytest.MonkeyPatch, mutation: Callable[[Node], None]) -> None:
    """Every rewrite from now on emits the mutated call."""
    right = rewriting.rewrite_site

    def wrong(part: Any, match: Match, decision: Decision, axes: Any, *rest: Any) -> Node:
        result = right(part, match, decision, axes, *rest)
        for call in part.gm.graph.find_nodes(op="call_function", target=ATTENTION):
            if not call.meta.get("mutated"):
                call.meta["mutated"] = True
                mutation(call)
        return result

    monkeypatch.setattr(rewriting, "rewrite_site", wrong)


@pytest.mark.parametrize("name", list(MUTATIONS))
@pytest.mark.parametrize("form", list(FORMS))
def test_a_wrong_rewrite_is_refused_with_the_figure(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, MUTATIONS[name])
    (rejection,) = explained(form=form).rejections
    assert rejection.reason.startswith("numerics.check: its replacement differs from the model: max ")
    assert rejection.reason.endswith("; tolerance rel_l2 1.0e-09")
    assert (rejection.asked, rejection.cure) == (False, "please report it: the finder read this site wrongly")


@pytest.mark.parametrize("name", list(MUTATIONS))
@pytest.mark.parametrize("check", ["compile", "first_call"])
def test_a_refused_site_runs_as_the_model_has_it(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, MUTATIONS[name])
    model, args = padded()
    run = torch.compile(model, backend="dilated", options={"policy": policy(check), "inner": "eager"})
    for _ in range(2):
        torch.testing.assert_close(run(*args), model(*args), rtol=0, atol=0)


@pytest.mark.parametrize("reads", ["causal", "fill"])
def test_a_wrong_reading_is_refused(reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder itself errs: what it says of the mask is not what the model does."""
    right = rewriting.rewrite_site

    def misread(part: Any, match: Match, decision: Decision, axes: Any, *rest: Any) -> Node:
        said = {"causal": {"causal": False}, "fill": {"empty_rows": "zero"}}[reads]
        return right(part, replace(match, site=replace(match.site, mask=replace(match.site.mask, **said))), decision, axes, *rest)

    monkeypatch.setattr(rewriting, "rewrite_site", misread)
    (rejection,) = explained().rejections
    assert "differs from the model" in rejection.reason


def test_gradients_are_compared_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detached keys give the same output."""

    def detached(call: Node) -> None:
        with call.graph.inserting_before(call):
            k = call.graph.call_function(torch.ops.aten.detach.default, (call.args[1],))
        call.update_arg(1, k)

    _broken(monkeypatch, detached)
    (rejection,) = explained().rejections
    assert "a gradient, inputs:" in rejection.reason
    with torch.no_grad():
        assert len(explained().decisions) == 1


def test_the_tolerance_is_the_policys(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, MUTATIONS["scale"])
    assert len(explained(rel_l2=0.5).decisions) == 1
    assert len(explained(rel_l2=1e-6).rejections) == 1


def test_off_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, MUTATIONS["scale"])
    (decision,) = explained("off").decisions
    assert decision.notes == ("fallback.quality: has no effect while numerics.check is off",)


@pytest.mark.parametrize("check", ["compile", "first_call", "always"])
def test_warn_and_error(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch, MUTATIONS["no scale"])
    model, args = padded()

    def run(quality: str) -> Any:
        torch._dynamo.reset()
        options = {"policy": policy(check, quality=quality), "inner": "eager"}
        return torch.compile(model, backend="dilated", options=options)(*args)

    with pytest.warns(DilcompileWarning, match=r"test_check\.py:\d+\): numerics\.check: its replacement differs"):
        torch.testing.assert_close(run("warn"), model(*args), rtol=0, atol=0)
    with pytest.raises(Exception, match=r"numerics\.check: its replacement differs") as caught:
        run("error")
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), RewriteError)


def test_only_the_wrong_site_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At compile time sites are accepted one by one; what follows the wrong one is rewritten all the same."""
    right = rewriting.rewrite_site

    def wrong(part: Any, match: Match, decision: Decision, axes: Any, *rest: Any) -> Node:
        result = right(part, match, decision, axes, *rest)
        if match.site.module == "layers.0":
            for call in part.gm.graph.find_nodes(op="call_function", target=ATTENTION):
                MUTATIONS["no scale"](call)
        return result

    monkeypatch.setattr(rewriting, "rewrite_site", wrong)
    model, x = Stack(), torch.randn(2, 16, 32)
    report = dilcompile.explain(model, x, policy=policy("compile"))
    assert [verdict.site.module for verdict in report.rejections] == ["layers.0"]
    assert [verdict.site.module for verdict in report.decisions] == ["layers.1"]
    torch.testing.assert_close(
        torch.compile(model, backend="dilated", options={"policy": policy("compile"), "inner": "eager"})(x), model(x)
    )


# --------------------------------------------------------------------------- on the first call


def _report(path: Path) -> list[dict[str, Any]]:
    return [site for graph in json.loads(path.read_text())["graphs"] for site in graph["sites"]]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_first_call_is_compared_and_reported(form: str, inner: str, tmp_path: Path) -> None:
    model, args = padded()
    path = tmp_path / "report.json"
    run = torch.compile(
        model, backend="dilated", options={"policy": policy("first_call", form), "inner": inner, "report": str(path)}
    )
    run(*args).sum().backward()
    (site,) = _report(path)
    assert site["verdict"] == "rewritten"
    assert any(note.startswith("numerics.check: compared on the first call: max ") for note in site["notes"])
    first = path.stat().st_mtime_ns
    run(*args)
    assert path.stat().st_mtime_ns == first, "the second call is not compared"


def test_always_compares_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    right = validate._compared
    monkeypatch.setattr(validate, "_compared", lambda trial, values: calls.append(1) or right(trial, values))
    model, args = padded()
    for check, wanted in (("first_call", 1), ("always", 3)):
        torch._dynamo.reset()
        calls.clear()
        run = torch.compile(model, backend="dilated", options={"policy": policy(check), "inner": "eager"})
        for _ in range(3):
            run(*args)
        assert len(calls) == wanted


class Remembers(nn.Module):
    """Writes to a buffer and draws random numbers around its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.inner = SdpaAttention()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.inner(F.dropout(x, 0.5)) + self.seen.sum()


def test_comparing_the_first_call_changes_nothing() -> None:
    model, x = Remembers(), torch.randn(2, 16, 32)
    torch.manual_seed(1)
    wanted = model(x)
    model.seen.zero_()
    torch.manual_seed(1)
    found = torch.compile(model, backend="dilated", options={"policy": policy("first_call"), "inner": "eager"})(x)
    torch.testing.assert_close(found, wanted)
    assert model.seen.tolist() == [1, 1, 1]


def test_a_wrong_site_on_the_first_call_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _broken(monkeypatch, MUTATIONS["no scale"])
    path = tmp_path / "report.json"
    model, x = Stack(), torch.randn(2, 16, 32)
    run = torch.compile(model, backend="dilated", options={"policy": policy("first_call"), "inner": "eager", "report": str(path)})
    torch.testing.assert_close(run(x), model(x))
    assert [site["verdict"] for site in _report(path)] == ["refused", "refused"]


# --------------------------------------------------------------------------- where sites stand


def test_masks_from_outside_a_checkpoint() -> None:
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 10:] = False
    for check in ("compile", "first_call"):
        (decision,) = dilcompile.explain(MaskedBlock(), torch.randn(2, 16, 32), keep, policy=policy(check)).decisions
        assert any("compared on" in note and "random inputs" in note for note in decision.notes)


def test_symbolic_lengths() -> None:
    model = CausalAttention()
    run = torch.compile(
        model, backend="dilated", dynamic=True, options={"policy": policy("compile", quality="error"), "inner": "eager"}
    )
    for length in (16, 24):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x), model(x))


class Scaled(nn.Module):
    """Its scale is a number of its own, which ``dynamic=True`` makes an input of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.3

    def forward(self, q: Tensor, keep: Tensor) -> Tensor:
        return (q @ q.mT * self.scale).masked_fill(keep[:, None, None, :] == 0, -1e9).softmax(-1) @ q


@pytest.mark.parametrize("check", ["compile", "first_call"])
@pytest.mark.parametrize("training", [False, True])
def test_numbers_of_the_model_under_dynamic_shapes(check: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what they are in the trial, too; a replacement with another scale is refused all the same."""
    model, keep = Scaled(), torch.ones(2, 12, dtype=torch.int64)
    keep[1, :3] = 0
    q = torch.randn(2, 2, 12, 8, dtype=torch.float64, requires_grad=training)
    options = {"policy": policy(check, quality="error"), "inner": "eager"}
    run = torch.compile(model, backend="dilated", dynamic=True, options=options)
    for scale in (0.3, 0.7):
        model.scale = scale
        # What every exact site must keep to in float64.
        torch.testing.assert_close(run(q, keep), model(q, keep), rtol=1e-9, atol=1e-9)
    torch._dynamo.reset()
    _broken(monkeypatch, MUTATIONS["scale"])
    with pytest.raises(Exception, match=r"numerics\.check: its replacement differs"):
        run(q, keep)


def test_exported_programs_are_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = CausalAttention().eval(), torch.randn(2, 16, 32)
    for check in ("compile", "first_call"):
        rewritten = dilcompile.rewrite_exported(export(model, (x,)), policy(check, quality="error"))
        torch.testing.assert_close(rewritten.module()(x), model(x))
    _broken(monkeypatch, MUTATIONS["no scale"])
    rewritten = dilcompile.rewrite_exported(export(model, (x,)), policy("first_call"))
    assert not list(rewritten.graph.find_nodes(op="call_function", target=ATTENTION))
    torch.testing.assert_close(rewritten.module()(x), model(x))


class InPlace(nn.Module):
    """The mask is written through a view: no user leads from the write to the scores."""

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        hidden = torch.zeros(x.shape[1], x.shape[1])
        hidden[:, 4:] = -1e9
        return ((q @ q.mT) + hidden).softmax(-1) @ q


def test_writes_through_views_are_part_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    report = dilcompile.explain(InPlace(), torch.randn(2, 12, 8), policy=policy("compile"))
    for decision in report.decisions:
        assert any("compared on" in note for note in decision.notes)
    assert not [r for r in report.rejections if "numerics.check" in r.reason]


class Narrowing(nn.Module):
    """Its finite fill is infinite where the softmax is taken: a row that sees nothing is NaN, not the mean."""

    def forward(self, q: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ q.mT).masked_fill(keep[:, None, None, :] == 0, torch.finfo(torch.float64).min)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ q


def test_casts_keep_their_range() -> None:
    q, keep = torch.randn(2, 2, 12, 8, dtype=torch.float64), torch.ones(2, 12, dtype=torch.int64)
    (verdict,) = dilcompile.explain(Narrowing(), q, keep, policy=policy("compile")).graphs[0].verdicts
    assert isinstance(verdict, Decision), verdict
    assert verdict.site.mask.empty_rows == "nan"


def test_dropout_is_left_out_of_the_comparison() -> None:
    (decision, _) = dilcompile.explain(Stack(dropout=0.5), torch.randn(2, 16, 32), policy=policy("compile")).decisions
    assert any("compared on" in note for note in decision.notes)


def test_what_is_too_large_is_said_and_not_tried() -> None:
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    (decision,) = dilcompile.explain(attend, torch.empty(1, 1, 8192, 8), policy=policy("compile")).decisions
    (note,) = decision.notes
    assert note == "numerics.check: not compared: it has 67108864 scores, more than 33554432; compile it with shorter inputs once"


def test_nothing_warns_where_all_is_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, x = Stack(checkpointed=True), torch.randn(2, 16, 32)
        torch.compile(model, backend="dilated", options={"policy": policy("first_call", quality="warn"), "inner": "eager"})(x)
