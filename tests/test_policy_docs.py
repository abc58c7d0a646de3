"""docs/policy.md: its tables are what the schema says, its examples are policies."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from dilcompile.cli import app
from dilcompile.policy import Policy
from dilcompile.policy.check import check
from dilcompile.policy.reference import BLOCKS, render

PAGE = Path(__file__).parent.parent / "docs" / "policy.md"


def test_the_tables_are_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert render(page) == page, "run: python -m dilcompile.policy.reference docs/policy.md"
    assert re.findall(r"<!-- generated: (\w+) -->", page) == [
        "match", "forms", "numerics", "tolerance", "fallback", "shard", "mesh", "memory", "presets",
    ]  # fmt: skip
    assert len(BLOCKS) == 9


def test_no_meaning_of_an_option_is_cut() -> None:
    rows = re.findall(r"^\| .* \|$", BLOCKS["forms"](), flags=re.MULTILINE)
    meanings = [row.split(" | ")[-1].removesuffix(" |") for row in rows if row.startswith("| `")]
    assert len(meanings) == 21
    assert [meaning for meaning in meanings if not meaning.endswith(".")] == []
    assert any(meaning.endswith("`zero`, or `own` (the query's own).") for meaning in meanings)


def test_the_examples_are_policies(tmp_path: Path) -> None:
    examples = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert examples
    for number, text in enumerate(examples):
        assert check(Policy.from_yaml(text)) == []
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        done = CliRunner().invoke(app, ["policy", "check", str(path)])
        assert (done.exit_code, done.stderr) == (0, "")
