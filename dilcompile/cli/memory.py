"""``dilcompile plan --memory``: the memory plan of a model, printed and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilcompile.memory_plan import MemoryPlan


def planned_memory(model: str, policy: str | None, length: int | None, train: bool, html: Path | None) -> MemoryPlan:
    """Plan the memory of the model that ``MODULE:FUNCTION`` names, and write the page if there is to be one.

    Raises:
        DilcompileError: if the policy or a path is wrong, or the model can't be made or traced.
    """
    from dilcompile.cli.model import load_example, users_code
    from dilcompile.cli.page import check_page
    from dilcompile.memory_plan import memory_plan
    from dilcompile.policy import Policy
    from dilcompile.report.file import replace_file
    from dilcompile.report.memory import memory_page

    check_page(html)
    loaded = Policy.load(policy)
    example = load_example(model, "MODULE:FUNCTION")
    with users_code(f"MODULE:FUNCTION {model}: calling the model"):
        found = memory_plan(example.model, example.args, example.kwargs, loaded, length, train=train)
    if html is not None:
        replace_file(html, memory_page(found.graphs, f"memory of {model} under {str(loaded).splitlines()[0]}", found.ladders))
    return found
