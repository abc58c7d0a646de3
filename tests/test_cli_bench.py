"""`dilcompile bench`: small measurements, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dilcompile import bench
from dilcompile.cli import app

SMALL = ["--lengths", "96,128", "--dtypes", "float32", "--heads", "2", "--head-dim", "8", "--repeats", "1"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "80"})


def test_the_table_has_a_verdict_beside_each_number() -> None:
    result = run(*SMALL)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("correct") == 4
    assert [line.split()[0] for line in result.stdout.splitlines()[5:9]] == ["96", "float32", "full", "96"]
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "both" not in result.stdout
    assert result.stderr == "measuring length 96, float32\nmeasuring length 128, float32\n"


def test_the_table_says_what_is_asked_of_the_kernels() -> None:
    """Both passes beside the ideal, gathering and merging (where segments divide the length), extra memory, in 80 columns."""
    held = {
        "length": 65536, "dtype": "bfloat16", "causal": False, "density": 0.0151, "forward_s": 12.3456, "forward_over_ideal": 0.75,
        "dense_over_forward": 37.8, "both_over_ideal": 0.85, "gather_over_forward": 13.2, "extra_over_one_tensor": 0.04,
        "error": 1.3e-3, "dense_error": 1e-3, "correct": True,
    }  # fmt: skip
    apart = {name: value for name, value in held.items() if name != "gather_over_forward"} | {"length": 96}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "run", lambda lengths, *rest: [held if lengths == [65536] else apart])
        result = run("--lengths", "65536,96", "--dtypes", "bfloat16", "--backward")
    rows = result.stdout.splitlines()
    assert max(map(len, rows)) <= 80
    assert [name for name in ("gather", "both", "memory") if name in result.stdout] == ["gather", "both", "memory"]
    assert [row.split()[1:] for row in rows if row.rstrip().endswith("correct")] == [
        ["2%", "12345.6", "0.75", "37.8", "13.2", "0.85", "0.04", "1.30", "correct"],
        ["2%", "12345.6", "0.75", "37.8", "-", "0.85", "0.04", "1.30", "correct"],
    ]


def test_json_and_save(tmp_path: Path) -> None:
    result = run(*SMALL, "--backward", "--json", "--save", str(tmp_path / "rows.json"))
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["length"], row["causal"]) for row in rows] == [(96, False), (96, True), (128, False), (128, True)]
    assert all(row["backward_s"] > 0 for row in rows)
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["rows"] == rows
    assert saved["command"] == "dilcompile bench --lengths 96,128 --dtypes float32 --heads 2 --head-dim 8 --repeats 1 --backward"


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    held = bench.run([96], heads=1, head_dim=8, backward=False, repeats=1)
    monkeypatch.setattr(bench, "run", lambda *args: [{**held[0], "correct": False}])
    result = run(*SMALL)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "12,x"], "--lengths takes whole numbers of at least 1 with commas between, got '12,x'\n"),
        (["--lengths", "0"], "--lengths takes whole numbers of at least 1 with commas between, got '0'\n"),
        (["--dtypes", "int8"], "--dtypes takes float16, bfloat16, float32, float64 with commas between, got 'int8'\n"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
