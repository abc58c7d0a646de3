"""`dilcompile inspect`: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dilcompile.cli import app

MODELS = """
import torch
import torch.nn.functional as F
from models import NoAttention, SdpaAttention, Stack

def stack():
    return Stack(SdpaAttention), torch.randn(2, 16, 32)

def nothing():
    return NoAttention(), (torch.randn(2, 16, 32),)

def padded():
    return SdpaAttention(causal=False), (torch.randn(2, 16, 32),), {"padding": torch.ones(2, 16, dtype=torch.bool)}

class Cross(torch.nn.Module):
    def forward(self, q, k):
        return F.scaled_dot_product_attention(q, k, k)

def cross():
    return Cross(), (torch.randn(1, 2, 16, 8), torch.randn(1, 2, 24, 8))

class Odd(torch.nn.Module):
    def forward(self, q):
        return (q @ q.mT).softmax(0) @ q

def odd():
    return Odd(), torch.randn(2, 16, 8)

def wrong():
    return 3
"""
POLICY = """
version: 1
name: near
rules:
  - {name: nobody, match: {module: "modle.*"}, apply: {form: keep}}
  - {name: window, apply: {form: sliding_window, window: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inspected")
    (made / "inspected.py").write_text(MODELS)
    (made / "near.yaml").write_text(POLICY)
    return made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["inspect", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def test_the_table(run: Any) -> None:
    result = run("inspected:stack", "--policy", "near.yaml")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "attention in 1 graph under policy near"
    (row,) = [line for line in lines if line.startswith(" layers.")]
    assert row.split("  ")[0].strip() == "layers.{0-1}"
    assert "rule nobody (near.yaml:5) matched no site: module 'modle.*' (nearest: 'layers.0')" in result.stdout
    assert "2 sites: 2 rewritten (0 exact, 2 approximate), 0 kept as asked, 0 refused; 0 misses" in lines


def test_json(run: Any) -> None:
    result = run("inspected:padded", "--policy", "exact", "--json")
    described = json.loads(result.stdout)
    (site,) = described["graphs"][0]["sites"]
    assert (result.exit_code, site["mask"]["words"], site["verdict"]) == (0, ["padding"], "rewritten")


def test_html(run: Any, folder: Path) -> None:
    result = run("inspected:stack", "--policy", "near.yaml", "--html", "made/report.html")
    assert result.exit_code == 0
    html = (folder / "made" / "report.html").read_text()
    assert "layers.0" in html
    assert "layers.1" in html


def test_pictures(run: Any) -> None:
    assert "██" not in run("inspected:stack", "--policy", "near.yaml").stdout
    lines = run("inspected:stack", "--policy", "near.yaml", "--pictures").stdout.splitlines()
    start = lines.index("layers.{0-1}: sliding_window(window=4)")
    assert lines[start - 1] == ""
    assert lines[start + 1] == "sliding_window: 22.7 % of all pairs"
    # Queries down, keys across, one position a cell: a band of four.
    assert lines[start + 3 : start + 8] == [
        "██" + "··" * 15,
        "████" + "··" * 14,
        "██████" + "··" * 13,
        "████████" + "··" * 12,
        "··████████" + "··" * 11,
    ]


def test_no_attention_is_no_failure(run: Any) -> None:
    result = run("inspected:nothing", "--fail-on-miss")
    assert result.exit_code == 0
    assert result.stdout.startswith("no attention was found in 1 graph under policy longnet")


@pytest.mark.parametrize("name", ["cross", "odd"])
def test_a_refused_or_missed_site_fails_only_if_asked(run: Any, name: str) -> None:
    assert run(f"inspected:{name}", "--policy", "near.yaml").exit_code == 0
    result = run(f"inspected:{name}", "--policy", "near.yaml", "--fail-on-miss")
    assert result.exit_code == 1
    assert result.stderr == f"inspected:{name}: missed or refused: 1\n"
    assert "->" in result.stdout, "the cure"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspected"], "MODULE:FUNCTION takes module:function, got 'inspected'\n"),
        (["inspected:nobody"], "MODULE:FUNCTION inspected:nobody: the module inspected has no function 'nobody'\n"),
        (["nowhere:stack"], "MODULE:FUNCTION nowhere:stack: No module named 'nowhere'\n"),
        (
            ["inspected:wrong"],
            "MODULE:FUNCTION inspected:wrong: the function must return (model, inputs) or (model, args, kwargs)\n",
        ),
        (["inspected:stack", "--policy", "nowhere.yaml"], "nowhere.yaml: no such file (did you mean 'near.yaml'?)\n"),
        (["inspected:stack", "--html", "r.pdf"], "report: 'r.pdf' ends in '.pdf'; name it .html or .json\n"),
        (["inspected:stack", "--html", "r.json"], "--html r.json: name it .html; --json prints the JSON\n"),
    ],
)
def test_bad_input_is_said_on_stderr(run: Any, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
