"""The pages of reports in a real browser: all is there to see, fits, can be read, and says the JSON's numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripts
from browsing import HOVER, NARROW, WIDE, browser, shown

MODELS = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, vocab_size=96, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), (), {"input_ids": torch.arange(64)[None], "use_cache": False}
"""
POLICY = """
version: 1
rules:
  - name: a rule with a name that is long enough to need more than one line of the table
    match: {layers: [0]}
    apply: {form: dilated, segments: [16, 64], rates: [1, 4], offset: own}
    memory: {pool: private, reuse: across_layers}
  - match: {layers: [1]}
    apply: {form: block_sparse, block: 16, pattern: {bigbird: {}}}
"""
TRAINED = """
import torch
from browsed import gpt2

def train(report):
    torch._dynamo.reset()
    model, _, inputs = gpt2()
    options = {"policy": "policy.yaml", "inner": "aot_eager", "report": report}
    compiled = torch.compile(model, backend="dilated", options=options)
    for _ in range(3):
        compiled(**inputs)[0].square().mean().backward()

train("trained.json")
train("trained.html")
"""
COMMANDS = {
    "inspected": ("inspect", "browsed:gpt2", "--policy", "policy.yaml", "--json", "--html", "inspected.html"),
    "planned": (
        "plan",
        "browsed:gpt2",
        "--memory",
        "--policy",
        "policy.yaml",
        "--json",
        "--length",
        "48",
        "--html",
        "planned.html",
    ),
}
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    (made / "browsed.py").write_text(MODELS)
    (made / "policy.yaml").write_text(POLICY)
    return made


@pytest.fixture(scope="module", params=["trained", *COMMANDS])
def page(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, Any]:
    """The page, and the same numbers as JSON."""
    kind = request.param
    script = "from dilcompile.cli import main; main()" if kind in COMMANDS else TRAINED
    done = scripts.run(script, COMMANDS.get(kind, ()), cwd=folder, imported=scripts.COMPILERS)
    assert done.returncode == 0, done.stderr
    told = done.stdout if kind in COMMANDS else (folder / "trained.json").read_text()
    return folder / f"{kind}.html", json.loads(told)


def memory_of(told: Any) -> list[Any]:
    """The graphs whose memory is planned."""
    held = told["memory"]["graphs"] if "memory" in told else [held for graph in told["graphs"] for held in graph["memory"]]
    assert [graph["direction"] for graph in held] == ["forward", "backward"]
    return list(held)


def size(words: str) -> float:
    """Bytes that are shown as ``1.5 MiB``."""
    number, unit = words.split()[:2]
    return float(number) * UNITS[unit]


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light")])
def test_all_is_there_fits_and_can_be_read(chromium: Any, page: tuple[Path, Any], width: int, scheme: str) -> None:
    with shown(chromium, page[0], width, scheme) as seen:
        assert seen.wrong() == []
        assert seen.page.locator("table").count() >= 1
        assert seen.page.locator("svg.arena").count() == 2
        dark = seen.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark == (scheme == "dark") == (max(map(int, re.findall(r"\d+", background))) < 100)


def test_the_memory_that_is_shown_is_the_jsons(chromium: Any, page: tuple[Path, Any]) -> None:
    path, told = page
    with shown(chromium, path) as seen:
        rows = seen.table("table.memory")
        pictures = seen.page.locator("svg.arena").all()
        for row, graph, picture in zip(rows, memory_of(told), pictures, strict=True):
            assert row["graph"] == f"{graph['graph']} {graph['direction']}"
            assert (int(row["steps"]), int(row["buffers"])) == (graph["steps"], graph["buffers"])
            assert float(row["ratio"]) == pytest.approx(graph["ratio"], abs=5e-4)
            for heading in ("planned", "live at once", "without reuse", "caching allocator", "given", "kept"):
                assert size(row[heading]) == pytest.approx(graph[heading.replace(" ", "_")], rel=5e-3), heading
            for heading in ("over saved", "elsewhere"):
                assert size(row[heading]) == pytest.approx(graph[heading.replace(" ", "_")]["live_at_once"], rel=5e-3), heading
            check_picture(picture, graph)
            runs = graph["runs"]
            if runs is not None:
                line = seen.page.get_by_text(f"{row['graph']} predicted").inner_text()
                predicted, measured = re.findall(r"(?:predicted|measured) ([\d.]+ \w+)", line)
                assert size(predicted) == pytest.approx(graph["predicted"], rel=5e-3)
                assert size(measured) == pytest.approx(runs["measured"], rel=5e-3)
                assert f"; {runs['calls']} calls:" in line


def check_picture(picture: Any, graph: Any) -> None:
    """A buffer lies in the picture where it lies in the arena, under axes that say so, and the pointer finds its name."""
    tips = picture.evaluate(HOVER)
    assert tips
    assert all(met == tip for tip, met in tips)
    (arena,) = graph["arenas"]
    labels = picture.locator("text").all_text_contents()
    assert {"offset \N{RIGHTWARDS ARROW}", "step \N{RIGHTWARDS ARROW}", "0 B"} <= set(labels)
    (ceiling,) = {label for label in labels if re.fullmatch(r"[\d.]+ [KMG]?i?B", label) and size(label) > 0.9 * arena["planned"]}
    assert size(ceiling) == pytest.approx(arena["planned"], rel=5e-3)
    edge = picture.locator("rect.edge").bounding_box()
    boxes = {shape.text_content(): shape.bounding_box() for shape in picture.locator("rect.buffer").all()}
    first, wide = steps_across(picture)
    held = [buffer for buffer in graph["largest"] if buffer["bytes"]]
    assert held
    for buffer in held:
        (box,) = [box for tip, box in boxes.items() if tip.startswith(f"{buffer['name']} of {buffer['module']}:")]
        scale = edge["height"] / arena["planned"]
        assert box["height"] == pytest.approx(buffer["bytes"] * scale, abs=2)
        assert edge["y"] + edge["height"] - box["y"] - box["height"] == pytest.approx(buffer["offset"] * scale, abs=2)
        middle = first + (buffer["begin"] + buffer["end"]) / 2 * wide
        assert box["x"] + box["width"] / 2 == pytest.approx(middle, abs=2)
        assert box["width"] == pytest.approx((buffer["end"] - buffer["begin"] + 1) * wide, abs=2)


def test_the_sites_that_are_shown_are_the_jsons(chromium: Any, page: tuple[Path, Any]) -> None:
    path, told = page
    with shown(chromium, path) as seen:
        if "totals" not in told:
            # A page of memory alone.
            assert seen.page.locator(".card").count() == seen.page.locator("table:not(.memory)").count() == 0
            return
        cards = dict(card.inner_text().split("\n", 1)[::-1] for card in seen.page.locator(".card").all())
        totals = told["totals"]
        assert cards["attention sites"] == str(totals["sites"])
        assert cards["missed"] == str(totals["misses"])
        assert cards[f"rewritten: {totals['exact']} exact, {totals['approximate']} approximate"] == str(totals["rewritten"])
        rows = seen.table("table:not(.memory)")
        sites = [site for graph in told["graphs"] for site in graph["sites"]]
        for row, site in zip(rows, sites, strict=True):
            assert row["site"].startswith(f"{site['module']}\n{site['source']}")
            assert row["numbers"].startswith(site["fidelity"] or "unchanged")
            if site["verdict"] == "rewritten":
                assert row["becomes"].startswith(site["form"])
                shares = [float(share) / 100 for share in re.findall(r"([\d.]+) %", row["pairs"])]
                costs = site["costs"]
                assert shares == pytest.approx([costs["density_of_mask"], costs["density_of_all"]], abs=1e-3)
        figures = seen.page.locator("figure:has(svg.pairs)")
        assert figures.count() == len(told["patterns"])
        for figure, pattern in zip(figures.all(), told["patterns"], strict=True):
            assert pattern["form"] in figure.locator("figcaption").inner_text()


def steps_across(picture: Any) -> tuple[float, float]:
    """Where the labels of the axis say that step 0 is, and the pixels from a step to the next."""
    places = {}
    for label in picture.locator("text").all():
        if re.fullmatch(r"\d+", label.text_content()):
            box = label.bounding_box()
            places[int(label.text_content())] = box["x"] + box["width"] / 2
    last = max(places)
    return places[0], (places[last] - places[0]) / last


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>x</title>
<body style="background: #fff; color: #000; font: 14px sans-serif">{}</body></html>"""


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ("<img src='https://example.org/x.png' alt=''>", "asked for https://example.org/x.png"),
        ("<script>console.log('hello')</script>", "console: hello"),
        ("<script>nothing()</script>", "error: nothing is not defined"),
        ("<p style='width: 2000px'>wide</p>", "the page is "),
        ("<p style='width: 50px; overflow: hidden; white-space: nowrap'>more than there is room for</p>", "cut off: more than"),
        ("<p style='color: #999'>grey</p>", "hard to read, contrast 2.8: grey"),
        ("<p style='font-size: 8px'>tiny</p>", "too small: tiny"),
        ("<div style='width: 90px'><table><tr><td>incomprehensibilities</table></div>", "a table is wider than its box"),
        ("<details open><summary>more</summary><p>it is</p></details>", "fold 0 is open"),
        ("<svg width=0 height=0><title>plan</title></svg>", "a picture of no size: plan"),
        ("<figure style='width: 90px; margin: 0'><svg width=200 height=90></svg></figure>", "a picture out of its box"),
        ("<svg width=90 height=90><text x=70 y=20>offset</text></svg>", "outside of its picture: text offset"),
        (
            "<svg width=90 height=90><text x=5 y=20>one<title></title></text><text x=5 y=24>other</text></svg>",
            "one over the other",
        ),
        ("<svg class=arena width=90 height=90><rect class='buffer saved' width=9 height=9></svg>", "1 roles and 0 colours"),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(chromium: Any, tmp_path: Path, flaw: str, said: str) -> None:
    (tmp_path / "flawed.html").write_text(PAGE.format(flaw))
    with shown(chromium, tmp_path / "flawed.html") as seen:
        assert any(wrong.startswith(said) for wrong in seen.wrong())


def test_nothing_is_wrong_with_a_page_without_flaws(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.html").write_text(PAGE.format("<p>plain</p><svg width=90 height=90><text x=5 y=20>one</text></svg>"))
    with shown(chromium, tmp_path / "plain.html") as seen:
        assert seen.wrong() == []


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_fails_where_tests_must_run(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(outcome, match=r"no browser found|playwright is not installed"), browser():
        pass
