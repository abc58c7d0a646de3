"""docs/policy.md: its tables are what the schema says, its examples are policies."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_examples_are_policies() -> None:
    examples = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert examples
    for text in examples:
        assert check(Policy.from_yaml(text)) == []
