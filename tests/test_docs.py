"""Every python block of the README and the docs runs, and every relative link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]+\]\((?!https?://|#)([^)#]+)[^)]*\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page as one program, top to bottom, in an empty folder with the examples' policies at hand."""
    (tmp_path / "policy.yaml").write_text((ROOT / "examples/policy.yaml").read_text())
    program = "\n".join(BLOCK.findall(page.read_text()))
    done = scripts.run(program, cwd=tmp_path, imported=scripts.COMPILERS)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_policy_in_the_readme_is_the_one_of_the_examples() -> None:
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    held = (ROOT / "examples/policy.yaml").read_text()
    assert shown == "".join(line for line in held.splitlines(keepends=True) if not line.startswith("#"))
