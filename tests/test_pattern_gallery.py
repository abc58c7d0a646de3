"""docs/patterns.md: its pictures are what the code draws, its policies are policies, and no pattern is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dilcompile import DilcompileError
from dilcompile.blocks.spec import KINDS
from dilcompile.forms import make_form
from dilcompile.policy import Policy
from dilcompile.policy.check import check
from dilcompile.report.gallery import GALLERY, files, policy

PAGE = Path(__file__).parent.parent / "docs" / "patterns.md"


def names_in(content: object) -> set[str]:
    """The patterns that a pattern is made of, itself among them."""
    if isinstance(content, list):
        return set().union(*map(names_in, content))
    if not isinstance(content, dict):
        return set()
    return {*content, *(name for key, value in content.items() if key in ("any", "all") for name in names_in(value))}


def test_the_gallery_is_current() -> None:
    made = files(PAGE)
    for path, content in made.items():
        assert path.read_text(encoding="utf-8") == content, "run: python -m dilcompile.report.gallery docs/patterns.md"
    assert {*PAGE.with_suffix("").iterdir(), PAGE} == {*made}, "a picture that is not drawn any more: remove it"
    assert sorted(re.findall(r"\]\(patterns/(\w+)\.svg\)", made[PAGE])) == sorted(GALLERY)


@pytest.mark.parametrize("name", GALLERY)
def test_the_policy_of_an_entry_is_one_and_holds_its_pattern(name: str) -> None:
    text = policy(GALLERY[name])
    form = yaml.safe_load(text)
    if GALLERY[name].in_policy:
        assert check(Policy.from_yaml(text)) == []
        (rule,) = form["rules"]
        form = rule["apply"]
    assert make_form(form.pop("form"), form).name == "block_sparse"
    assert name in names_in(form["pattern"])


def test_a_pattern_without_an_entry_is_named_with_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilcompile.report.gallery.KINDS", {**KINDS, "spiral": KINDS["local"]})
    with pytest.raises(
        DilcompileError, match=r"no entry for the patterns \['spiral'\].*give each pattern an Entry\(words, pattern\)"
    ):
        files(PAGE)
    monkeypatch.setattr("dilcompile.report.gallery.KINDS", {name: kind for name, kind in KINDS.items() if name != "fixed"})
    with pytest.raises(DilcompileError, match=r"entries for unknown ones \['fixed'\]"):
        files(PAGE)
