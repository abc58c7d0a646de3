"""The report: costs by hand, rows, text, JSON, HTML, files."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import scripts
import torch
from policy_sites import site
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dilcompile import DilcompileError
from dilcompile.decision import Decision, Rejection
from dilcompile.forms import BlockSparse, Dense, Dilated, SlidingWindow
from dilcompile.memory import Buffer, plan_buffers
from dilcompile.memory.account import GraphMemory, Runs
from dilcompile.memory.budget import Bound, BudgetReport, Rung
from dilcompile.placements.choice import PlacementChoice
from dilcompile.policy import Policy
from dilcompile.publish import gathered
from dilcompile.report import GraphReport, Report, units
from dilcompile.report.costs import costs_of
from dilcompile.report.kernels import kernel_of, refusal_of
from dilcompile.report.rows import grouped, ranges, row_of, rows_of
from dilcompile.report.totals import totals_of
from dilcompile.site import ByRow, MaskSpec, Miss

WINDOW = SlidingWindow(window=256, sinks=4)
MISS = Miss("model.router", "modeling.py:12", "softmax_3", "the axes <B> could not be proven", "reshape before")


def decided(form: Any = WINDOW, rule: str = "near (p.yaml:5)", fidelity: Any = "approximate", **changes: Any) -> Decision:
    return Decision(site(**changes), rule, form, fidelity)


def refused(**changes: Any) -> Rejection:
    return Rejection(site(**changes), "near (p.yaml:5)", "its mask could not be read (x < 3)", "give it another form")


def kept(**changes: Any) -> Rejection:
    return Rejection(site(**changes), "rest (p.yaml:9)", "the policy keeps it", asked=True)


def report(*verdicts: Any, **changes: Any) -> Report:
    held = {"misses": (MISS,), "notes": ("left as it is",), "seconds": {"find": 0.25}}
    return Report(
        "policy mixed\n  near: ...", (GraphReport("0/0", verdicts, **{**held, **changes}),), ("rule x matched no site",)
    )


def layers(number: int, make: Any = decided, **changes: Any) -> list[Any]:
    return [make(index=i, module=f"model.layers.{i}.self_attn", layer=i, **changes) for i in range(number)]


# Costs


def test_costs_of_a_causal_window_are_those_counted_by_hand() -> None:
    """B 2, H 4/2, Sq = Sk = 8, D 16, Dv 32; window of 3 keys: rows see 1, 2, 3, 3, 3, 3, 3, 3."""
    verdict = decided(SlidingWindow(window=3), batch=2, heads=4, kv_heads=2, q_len=8, k_len=8, head_dim=16, v_dim=32)
    costs = costs_of(verdict)
    assert costs is not None
    assert costs.pairs_all == 2 * 4 * 64
    assert costs.pairs_mask == 2 * 4 * 36
    assert costs.pairs_form == 2 * 4 * 21
    assert costs.flops_before == 2 * (16 + 32) * costs.pairs_mask
    assert costs.flops_after == 2 * (16 + 32) * costs.pairs_form
    assert costs.operand_bytes == 4 * (2 * 4 * 8 * 16 + 2 * 2 * 8 * 16 + 2 * 2 * 8 * 32 + 2 * 4 * 8 * 32)
    assert costs.density_of_mask == pytest.approx(21 / 36)
    assert costs.density_of_all == pytest.approx(21 / 64)


@pytest.mark.parametrize(
    ("spelling", "mask", "scores", "masks"),
    [
        ("sdpa", MaskSpec(causal=True), 0, 0),
        ("sdpa", MaskSpec(), 0, 0),
        ("sdpa", MaskSpec(causal=True, left=9), 0, 64),
        ("sdpa", MaskSpec(causal=True, key_padding=True), 0, 3 * 64),
        ("matmul-softmax", MaskSpec(), 3 * 8 * 64 * 4, 0),
        ("matmul-softmax", MaskSpec(causal=True), 3 * 8 * 64 * 4, 64),
    ],
)
def test_bytes_avoided_are_claimed_only_where_they_are_certain(spelling: str, mask: MaskSpec, scores: int, masks: int) -> None:
    shape = {"batch": 3, "q_len": 8, "k_len": 8, "spelling": spelling, "mask": mask}
    costs, untouched = costs_of(decided(Dense(), **shape)), costs_of(kept(**shape))
    assert costs is not None
    assert untouched is not None
    assert (costs.scores_bytes, costs.mask_bytes) == (scores, masks)
    assert (untouched.scores_bytes, untouched.mask_bytes) == (0, 0)
    assert untouched.flops_after == untouched.flops_before


def test_a_kept_site_of_the_same_mask_means_that_the_mask_is_still_built() -> None:
    shape = {"mask": MaskSpec(causal=True, left=9), "q_len": 8, "k_len": 8}
    assert totals_of(report(decided(**shape), decided(**shape))).mask_bytes == 64
    assert totals_of(report(decided(**shape), kept(**shape))).mask_bytes == 0


def test_a_form_that_can_not_be_had_at_these_sizes_is_said_and_not_counted() -> None:
    many = Dilated(segments=(64, 128, 256), rates=(1, 1, 1), heads="grouped")
    verdict = decided(many, heads=2, kv_heads=2)
    assert costs_of(verdict) is None
    row = row_of(verdict)
    assert row.flops == ("", "")
    (note,) = row.notes
    assert note.startswith("can't be computed at these sizes: form dilated: heads='grouped'")
    assert totals_of(report(verdict)).uncounted == 1
    json.dumps(report(verdict).to_dict(), allow_nan=False)


def symbolic(number: int) -> torch.SymInt:
    """A length as Dynamo gives it when it may change."""
    env = ShapeEnv()
    name = env.create_symbol(number, source=torch._dynamo.source.ConstantSource("length"))
    return env.create_symintnode(name, hint=number)  # type: ignore[return-value]


def test_symbolic_lengths_are_counted_at_their_hint_without_a_guard() -> None:
    length = symbolic(4096)
    changing = decided(q_len=length, k_len=length)
    assert costs_of(changing) == costs_of(decided())
    assert row_of(changing).attention[1] == f"B 1  H 8  S {length}=4096  D 64"
    described: Any = report(changing).to_dict()
    held = described["graphs"][0]["sites"][0]
    assert (held["q_len"], held["symbols"]) == (4096, {"q_len": str(length), "k_len": str(length)})
    str(report(changing))
    assert length.node.shape_env.guards == []


# Kernels


def test_the_kernel_named_is_the_one_that_selection_picks() -> None:
    assert kernel_of(decided(Dense(), mask=MaskSpec(), q_len=4)).forward == "sdpa"
    assert kernel_of(decided(WINDOW, dropout_p=0.5)).forward == "native"
    assert kernel_of(decided(WINDOW)).forward == "native"
    both = kernel_of(decided(WINDOW, phase="train"))
    assert (both.forward, both.backward) == ("native", "native")


def test_a_kernel_asked_for_that_can_not_do_it_is_said_with_its_reason() -> None:
    choice = kernel_of(replace(decided(WINDOW), kernel="sdpa"))
    assert choice.forward is None
    assert choice.reason is not None
    assert choice.reason.startswith("kernel 'sdpa' can't compute this attention: the relation is")


def test_the_kernel_of_a_mask_by_row_takes_masks_by_row() -> None:
    assert kernel_of(decided(Dense(), mask=MaskSpec(), q_len=4)).forward == "sdpa"
    by_row = MaskSpec(by_row=(ByRow("rows", "k < n[q]"),))
    assert kernel_of(decided(Dense(), mask=by_row)).forward == "native"
    assert kernel_of(decided(Dense(), mask=MaskSpec(by_row=(ByRow("label", "a[q] == b[k]"),)))).forward == "cpu"


NOT_ZERO = "causal attention starts at key position"
REFUSED: list[tuple[str, Decision, str | None]] = [
    ("sdpa", decided(Dense()), None),
    ("sdpa", decided(WINDOW), "the relation is"),
    ("sdpa", decided(Dense(), kv_heads=2), "4 query heads share a key head"),
    ("sdpa", decided(Dense(), softcap=2.0), "softcap"),
    ("sdpa", decided(Dense(), mask=MaskSpec(by_row=(ByRow("rows", "k < n[q]"),))), "a mask by row"),
    ("sdpa", decided(Dense(), mask=MaskSpec(causal=True, q_offset=3)), f"{NOT_ZERO} 3, not at 0"),
    ("sdpa", decided(Dense(), mask=MaskSpec(causal=True, runtime_offset=True)), NOT_ZERO),
    ("flash", decided(Dense()), "the tensors are on cpu, not on a CUDA device"),
    ("native", decided(Dense(), bias="b"), None),
    ("native", decided(Dense(), mask=MaskSpec(by_row=(ByRow("pairs", "q % 2 == k % 2"),))), "a formula over pairs"),
    ("native", decided(Dilated(segments=(64,), rates=(1,), merge_grad="detach")), None),
    ("native", decided(Dilated(segments=(64,), rates=(1,), merge_grad="detach"), phase="train"), "merge_grad 'detach'"),
    ("cpu", decided(WINDOW), None),
    ("reference", decided(WINDOW, dropout_p=0.5), None),
]


@pytest.mark.parametrize(("kernel", "decision", "reason"), REFUSED)
def test_a_kernel_asked_for_is_refused_before_it_runs(kernel: Any, decision: Decision, reason: str | None) -> None:
    asked = replace(decision, kernel=kernel)
    found = refusal_of(asked)
    assert found is None if reason is None else found is not None and found.startswith(reason)
    assert (found is None) == (kernel_of(asked).reason is None) or decision.site.mask.runtime_offset


def test_what_is_known_only_when_it_runs_is_not_refused_before() -> None:
    assert refusal_of(replace(decided(WINDOW, device=torch.device("meta")), kernel="sdpa")) is None
    assert refusal_of(decided(WINDOW)) is None


def test_meta_sites_have_no_kernel() -> None:
    assert kernel_of(decided(device=torch.device("meta"))).reason == "a meta tensor has no device to choose for"


# Rows and text


def test_golden_row() -> None:
    assert str(row_of(decided())) == (
        "model.layers.0.self_attn, model.py:1 | self sdpa, B 1  H 8  S 4096  D 64, float32 | causal, k <= q | "
        "sliding_window(window=256, sinks=4), rule near | approximate, by native | 12.3 % of mask, 6.1 % of all | "
        "17.2 G, -> 2.11 G | 32.0 MiB"
    )


def test_golden_row_of_a_written_out_cross_attention_that_is_refused() -> None:
    changes = {"kind": "cross", "spelling": "baddbmm-softmax", "kv_heads": 2, "q_len": 16, "k_len": 32, "v_dim": 8, "module": ""}
    assert str(row_of(refused(mask=MaskSpec(unread="x < 3"), source="unknown", **changes))) == (
        "<top> | cross baddbmm-softmax, B 1  H 8/2  S 16 x 32  D 64 x 8, float32 | other(x < 3), x < 3 | kept: refused, rule near | "
        "unchanged, by the model |  | 590 k | 54.0 KiB"
    )


def test_golden_lines() -> None:
    rows = [decided(), kept(index=1), refused(index=2)]
    assert totals_of(report(*rows)).lines == [
        "3 sites: 1 rewritten (0 exact, 1 approximate), 1 kept as asked, 1 refused; 1 miss",
        "attention FLOPs of one forward pass: 51.6 G -> 36.5 G (70.8 %)",
    ]


def test_alike_sites_share_a_row_that_names_them_all() -> None:
    verdicts = [*layers(3), *layers(3, kept)[2:], *layers(5)[4:]]
    rows = grouped(rows_of(verdicts))
    assert [row.site for row in rows] == [
        ("model.layers.{0-2,4}.self_attn", "model.py:1, 4 sites"),
        ("model.layers.2.self_attn", "model.py:1"),
    ]
    assert sum(row.count for row in rows) == len(verdicts)


def test_sites_that_differ_in_anything_do_not_share_a_row() -> None:
    base = decided(module="layers.0.attn")
    changes = ({"source": "model.py:2"}, {"heads": 4, "kv_heads": 4}, {"dtype": torch.bfloat16}, {"mask": MaskSpec()})
    for change in changes:
        assert len(grouped(rows_of([base, decided(**{"module": "layers.1.attn", **change})]))) == 2
    assert len(grouped(rows_of([base, decided(module="layers.1.cross")]))) == 2


@pytest.mark.parametrize(("numbers", "text"), [([0], "0"), ([2, 0, 1], "0-2"), ([0, 1, 3, 5, 6], "0-1,3,5-6")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.00 k", "1000 B"),
        (1536, "1.54 k", "1.50 KiB"),
        (999_999_999, "1.00 G", "954 MiB"),
    ],
)
def test_units(number: int, count: str, size: str) -> None:
    assert (units.count(number), units.size(number)) == (count, size)


def test_plain_text_has_no_escapes_and_keeps_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = report(*layers(30), *layers(2, refused))
    for width in (60, 100, 130, 160, 240):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(whole)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= width
        # No number is cut, whatever the width.
        for figure in ("12.3 % of mask", "17.2 G", "-> 2.11 G", "32.0 MiB"):
            assert figure in text, (width, figure)


def test_text_says_everything() -> None:
    text = str(report(*layers(2), *layers(1, refused), *layers(1, kept)))
    for said in (
        "model.layers.{0-1}.self_attn",
        "Refused: a rule asked for a form that the site can't take",
        "its mask could not be read (x < 3)\n    -> give it another form",
        "model.router (modeling.py:12): softmax_3: the axes <B> could not be proven\n    -> reshape before",
        "rule x matched no site",
        "graph 0/0: left as it is",
        "model.layers.0.self_attn: the policy keeps it",
        "4 sites: 2 rewritten (0 exact, 2 approximate), 1 kept as asked, 1 refused; 1 miss",
    ):
        assert said in text


def test_square_brackets_are_text_and_not_markup() -> None:
    assert "keep[b, k]" in str(report(decided(mask=MaskSpec(key_padding=True))))


def test_nothing_found_is_said() -> None:
    assert str(Report("policy exact", (GraphReport("0/0"),))).startswith("no attention was found in 1 graph under policy exact")


def test_that_dynamo_captured_nothing_is_said() -> None:
    assert "Dynamo captured nothing of this call" in str(Report("policy exact", ()))


def test_a_rich_console_prints_the_table() -> None:
    import io

    from rich.console import Console

    written = io.StringIO()
    Console(file=written, width=160).print(report(*layers(2)))
    assert "model.layers.{0-1}.self_attn" in written.getvalue()


# JSON

LENGTH = {"type": ["integer", "null"]}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these keys."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SITE_KEYS = {
    "index": {"type": "integer"}, "module": {"type": "string"}, "source": {"type": "string"}, "spelling": {"type": "string"},
    "kind": {"enum": ["self", "cross"]}, "phase": {"enum": ["train", "prefill", "decode"]},
    "layer": LENGTH, "layer_type": {"type": ["string", "null"]},
    "batch": LENGTH, "q_len": LENGTH, "k_len": LENGTH, "symbols": {"type": "object"},
    "heads": {"type": "integer"}, "kv_heads": {"type": "integer"}, "head_dim": {"type": "integer"}, "v_dim": {"type": "integer"},
    "dtype": {"type": "string"}, "softmax_dtype": {"type": "string"}, "device": {"type": "string"}, "scale": {"type": "number"},
    "softcap": {"type": ["number", "null"]}, "dropout_p": {"type": "number"}, "bias": {"type": "array", "items": closed({"word": {"enum": ["alibi", "t5 buckets", "relative table", "tensor"]}, "tensor": {"type": "string"}, "slopes": {"type": "array", "items": {"type": "number"}}})},
    "sinks": {"type": ["string", "null"]}, "multipliers": {"type": ["string", "null"]}, "operands": {"type": "object", "additionalProperties": {"type": "string"}},
    "mask": {"type": "object"},
    "verdict": {"enum": ["rewritten", "kept", "refused"]}, "rule": {"type": ["string", "null"]},
    "form": {"type": ["string", "null"]}, "fidelity": {"enum": ["exact", "approximate", None]},
    "kernel": {"type": ["string", "null"]}, "kernel_backward": {"type": ["string", "null"]},
    "kernel_asked": {"type": ["string", "null"]}, "kernel_reason": {"type": ["string", "null"]},
    "kernel_passed_over": {"type": ["string", "null"]},
    "kernel_remarks": {"type": "array", "items": {"type": "string"}},
    "reason": {"type": ["string", "null"]}, "cure": {"type": ["string", "null"]}, "notes": {"type": "array"},
    "costs": {"type": ["object", "null"]}, "blocks": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/blocks"}]},
}  # fmt: skip
COUNT = {"type": "integer", "minimum": 0}
SITE_KEYS["placement"] = {"anyOf": [{"type": "null"}, closed({
    **{key: {"type": "string"} for key in ("axis", "method", "order", "overlap", "why")},
    "ranks": COUNT, "heads_axis": {"type": ["string", "null"]}, "heads_ranks": COUNT, "moving": {"type": ["string", "null"]},
})]}  # fmt: skip
BLOCKS = closed(dict.fromkeys(("q_block", "k_block", "rows", "columns", "heads", "full", "partial", "empty"), COUNT))


_ARENA_KEYS = {"device": {"type": "string"}, "lane": {"enum": ["compute", "communication"]}}
MEMORY = closed({
    "graph": {"type": "string"}, "direction": {"enum": ["inference", "forward", "backward"]},
    "planner": {"enum": ["dilcompile", "inductor"]}, "ratio": {"type": "number"},
    **dict.fromkeys(("steps", "buffers", "planned", "live_at_once", "without_reuse", "caching_allocator", "given", "kept", "predicted"), COUNT),
    **dict.fromkeys(("over_saved", "elsewhere"), closed({"buffers": COUNT, "live_at_once": COUNT})),
    "arenas": {"type": "array", "items": closed({
        **_ARENA_KEYS, "module": {"type": "string"}, **dict.fromkeys(("buffers", "planned", "live_at_once", "size_class"), COUNT),
    })},
    "largest": {"type": "array", "items": closed({
        **_ARENA_KEYS, **{key: {"type": "string"} for key in ("name", "module", "role")},
        **dict.fromkeys(("bytes", "offset", "begin", "end"), COUNT),
    })},
    "runs": {"anyOf": [{"type": "null"}, closed({
        **dict.fromkeys(("calls", "plans", "lease_hits", "refused"), COUNT), "measured": {"anyOf": [{"type": "null"}, COUNT]},
    })]},
})  # fmt: skip
# Written out by hand: a change of the keys must change VERSION and this.
REPORT_SCHEMA = closed({
    "schema": {"const": "dilcompile.report"},
    "version": {"const": 8},
    "policy": {"type": "string"},
    "graphs": {"type": "array", "items": closed({
        "graph": {"type": "string"},
        "sites": {"type": "array", "items": closed(SITE_KEYS)},
        "misses": {"type": "array", "items": closed({key: {"type": "string"} for key in ("module", "source", "node", "reason", "cure")})},
        "notes": {"type": "array", "items": {"type": "string"}},
        "seconds": {"type": "object", "additionalProperties": {"type": "number"}},
        "budget": {"anyOf": [{"type": "null"}, closed({
            "bounds": {"type": "array", "items": closed({
                "source": {"type": "string"}, "most": COUNT,
                "modules": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string"}}]},
            })},
            "tried": {"type": "array", "items": closed({
                "name": {"type": "string"}, "reuse": {"type": "string"}, "recompute": {"type": ["number", "null"]},
                "chunk": {"type": ["integer", "null"]}, "workspaces": {"type": "number"}, "offload": COUNT,
                "forward": COUNT, "backward": {"type": ["integer", "null"]}, "peak": COUNT, "saved": COUNT, "arenas": COUNT,
                "bounded": {"type": "array", "items": COUNT},
            })},
            "taken": {"type": "string"}, "is_upper_bound": {"type": "boolean"},
        })]},
        "memory": {"type": "array", "items": MEMORY},
    })},
    "patterns": {"type": "array", "items": closed({
        "form": {"type": "string"}, "lengths": {"type": "string"},
        "sites": {"type": "array", "items": closed({"graph": {"type": "string"}, "index": COUNT, "module": {"type": "string"}})},
        "density_of_mask": {"type": "number"}, "density_of_all": {"type": "number"}, "is_bound": {"type": "boolean"},
        "blocks": SITE_KEYS["blocks"], "unseen": {"type": "array", "items": {"type": "string"}},
        "orders": {"type": "array", "items": closed({
            "order": {"type": "string"}, "radius": {"type": "array", "items": COUNT}, "density": {"type": "number"},
            **dict.fromkeys(("blocks", "full", "partial"), COUNT),
        })},
    })},
    "unused_rules": {"type": "array", "items": {"type": "string"}},
    "totals": closed(dict.fromkeys(("sites", "rewritten", "exact", "approximate", "kept", "refused", "misses", "pairs_mask", "pairs_form", "flops_before", "flops_after", "scores_bytes", "mask_bytes", "uncounted"), COUNT)),
}) | {"$defs": {"blocks": BLOCKS}}  # fmt: skip


def test_json_has_the_keys_of_version_8() -> None:
    blocks = BlockSparse(64, {"local": {}})
    along = BlockSparse(16, {"near": {"radius": 2}}, order="hilbert", grid=(16, 16))
    verdicts = (
        decided(), kept(index=1), refused(index=2), decided(q_len=symbolic(64)), decided(blocks),
        decided(along, q_len=256, k_len=256, mask=MaskSpec()),
        replace(decided(), placement=PlacementChoice("cp", 4, "usp", "zigzag", heads_axis="heads", heads_ranks=2, why="named")),
    )  # fmt: skip
    rung = Rung("across_layers", 0.5, 512, 0.25, 2, 70, 90, 100, 30, 40, (100, 20))
    bounds = (Bound("defaults", 100), Bound("rule far (p.yaml:2)", 20, frozenset(["model"])))
    described = report(*verdicts, budget=BudgetReport(bounds, (rung,), rung), memory=memory()).to_dict()
    assert report().to_dict()["graphs"][0]["budget"] is None
    back = json.loads(json.dumps(described, allow_nan=False))
    assert back == described
    jsonschema.validate(back, REPORT_SCHEMA)
    costs = back["graphs"][0]["sites"][0]["costs"]
    assert sorted(costs) == sorted((
        "pairs_all", "pairs_mask", "pairs_form", "flops_before", "flops_after", "operand_bytes", "scores_bytes", "mask_bytes",
        "density_of_mask", "density_of_all", "is_bound",
    ))  # fmt: skip
    mask = back["graphs"][0]["sites"][0]["mask"]
    assert sorted(mask) == sorted(("words", "text", "formula", "left", "right", "q_offset", "unread", "empty_rows"))
    assert [held["verdict"] for held in back["graphs"][0]["sites"]] == ["rewritten", "kept", "refused", *["rewritten"] * 4]


def test_json_says_of_each_verdict_what_a_program_asks() -> None:
    described: Any = report(decided(), refused(index=1)).to_dict()
    rewritten, stays = described["graphs"][0]["sites"]
    assert (rewritten["form"], rewritten["fidelity"], rewritten["kernel"]) == (
        "sliding_window(window=256, sinks=4)",
        "approximate",
        "native",
    )
    assert (stays["reason"], stays["cure"], stays["form"]) == ("its mask could not be read (x < 3)", "give it another form", None)
    assert described["totals"]["refused"] == 1


def test_a_sharded_site_is_told_of_with_all_ranks() -> None:
    ring = PlacementChoice("cp", 4, "ring", "zigzag", why="the policy names it")
    sharded = replace(decided(q_len=64, k_len=64), placement=ring)
    made = gathered((GraphReport("0/0", (sharded,)),), Policy.load("exact"))
    assert (made.sites[0].q_len, made.sites[0].k_len) == (256, 256)
    (row,) = rows_of(made.verdicts)
    assert row.becomes[-1] == "ring over cp=4, zigzag, prefetch"
    assert row.notes[0] == "placement ring: the policy names it; lengths and sums are of all ranks"
    assert all("ring over cp=4, zigzag" in shown for shown in (str(made), made.to_html()))
    described: Any = made.to_dict()
    placement = described["graphs"][0]["sites"][0]["placement"]
    assert (placement["method"], placement["order"], placement["axis"], placement["ranks"]) == ("ring", "zigzag", "cp", 4)


# HTML and files


def memory() -> tuple[GraphMemory, ...]:
    """A forward that has not run, and a backward that has."""
    buffers = [Buffer("mul", 4096, 0, 1, 4096, module="layers.0"), Buffer("<b>", 8192, 1, 2, 8192, role="gradient")]
    kept = (Buffer("out", 512, 0, 2, 512),)
    forward = GraphMemory("0/0", "forward", plan_buffers(buffers[:1]), steps=3)
    backward = GraphMemory("0/0", "backward", plan_buffers(buffers), kept=kept, given=640, steps=3, runs=Runs(2, 1, 1, measured=12800))
    return forward, backward


def test_html_shows_what_the_buffers_take() -> None:
    html = report(decided(), memory=memory()).to_html()
    page = _Page()
    page.feed(html)
    (table,) = [part for part in html.split("<table") if part.startswith(' class="memory"')]
    assert all(said in table for said in ("0/0 forward", "0/0 backward", "12 KiB", "4 KiB"))
    assert html.count('<svg class="arena"') == 2
    assert len(set(re.findall(r'id="(arena-[^"]*)"', html))) == 4
    assert re.search(r'class="buffer gradient"[^>]*><title>&lt;b&gt;: 8 KiB at', html)
    assert "predicted 12.5 KiB, measured 12.5 KiB (1.0000); 2 calls: 1 planned, 1 by the plan of an earlier one" in html
    assert "<h2>Memory</h2>" not in report(decided()).to_html()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.left: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.left.append(tag)
        if tag != "meta":
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_lists_every_site_by_itself_and_needs_nothing_else() -> None:
    html = report(*layers(30), *layers(2, refused)).to_html()
    page = _Page()
    page.feed(html)
    assert page.opened == []
    assert not {"script", "link", "img", "iframe"} & set(page.left)
    assert not re.search(r"https?:|url\(|@import", html)
    for index in range(30):
        assert f"model.layers.{index}.self_attn" in page.text
    assert page.left.count("tr") == 1 + 32
    for said in (
        "the axes <B> could not be proven",
        "reshape before",
        "rule x matched no site",
        "left as it is",
        "kept: refused",
    ):
        assert said in page.text


def test_html_escapes_what_comes_from_the_model() -> None:
    html = report(decided(module="<script>alert(1)</script>")).to_html()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_write(tmp_path: Path) -> None:
    whole = report(*layers(2))
    whole.write(tmp_path / "made" / "r.json")
    assert json.loads((tmp_path / "made" / "r.json").read_text()) == whole.to_dict()
    whole.write(str(tmp_path / "R.HTML"))
    assert (tmp_path / "R.HTML").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["R.HTML", "made", "r.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r.pdf", r"^report: '.*r\.pdf' ends in '\.pdf'; name it \.html or \.json$"),
        ("report", r"^report: '.*report' ends in 'no suffix'; name it \.html or \.json$"),
        ("folder.html", r"^report: '.*folder\.html' is a folder; name a file in it$"),
        ("file/r.html", r"^report: '.*r\.html' can't be written: .*; name another place$"),
    ],
)
def test_write_refuses(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DilcompileError, match=message):
        report().write(tmp_path / name)


def test_rich_is_loaded_only_for_the_table() -> None:
    code = (
        "import sys, dilcompile.report.record, dilcompile.inspect, dilcompile.backend\n"
        "from dilcompile.report import Report\n"
        "Report('policy', ()).to_html(); Report('policy', ()).to_dict()\n"
        "assert not any(name.split('.')[0] in ('rich', 'plotly') for name in sys.modules), 'rich'\n"
        "str(Report('policy', ()))\n"
        "assert 'rich' in sys.modules\n"
    )
    scripts.run(code).check_returncode()


def test_densities_are_finite_for_every_form() -> None:
    for form in (Dense(), WINDOW, Dilated(), Dilated(union="set", offset="own", sinks=4, local=16)):
        costs = costs_of(decided(form))
        assert costs is not None
        assert math.isfinite(costs.density_of_mask)
        assert costs.density_of_all > 0
