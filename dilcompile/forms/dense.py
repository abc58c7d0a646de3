"""Dense: every pair that the site's own mask lets through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dilcompile.forms.base import Form, unread_mask
from dilcompile.generators import Everything, Window
from dilcompile.relation import Problem, Relation, Term

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite


@dataclass(frozen=True)
class Dense(Form):
    """What the model computes anyway: a causal window stays an exact causal window, without its S x S mask."""

    name: ClassVar[str] = "dense"

    def relation(self, problem: Problem) -> Relation:
        """Everything, or a window where the problem has one."""
        if problem.window_left is None and problem.window_right is None:
            return Relation(problem, (Term(Everything()),))
        return Relation(problem, (Term(Window(problem.left, problem.right)),))

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Always exact."""
        return "exact"

    def reject(self, site: AttentionSite) -> str | None:
        """A mask that could not be read, or one that leaves rows whose result only the model's own spelling has; rounding that
        only the model's own operators repeat."""
        if site.mask.unread is None and site.mask.empty_rows == "other":
            return (
                "a row may see no key, and what it is then depends on the model's own spelling (several fills, "
                "or one so small that the scores show through)"
            )
        if site.narrowed == "scores":
            return "a float64 attention that computes its scores in fewer digits: no other kernel repeats its rounding"
        return unread_mask(site)
