"""Sliding window: the nearest keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dilcompile.errors import OptionProblem
from dilcompile.forms.base import Form, NotNegative, Positive, cross_site, not_integer, unread_mask
from dilcompile.generators import Sinks, Window
from dilcompile.relation import Problem, Relation, Term

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite


@dataclass(frozen=True)
class SlidingWindow(Form):
    """Causal: the last ``window`` keys, the query's own among them. Not causal: keys nearer than ``window`` on both sides.

    Args:
        window: keys with ``|t - k| < window``.
        sinks: the first keys of the sequence (of each document), seen by every query.
        step: of the window only keys with ``(t - k) % step == 0``.

    Raises:
        FormError: if an option is not a whole number in its range.
    """

    name: ClassVar[str] = "sliding_window"

    window: Positive
    sinks: NotNegative = 0
    step: Positive = 1

    def problems(self) -> list[OptionProblem]:
        """Options that are no whole number in their range."""
        least = {"window": 1, "sinks": 0, "step": 1}
        return [problem for option in least for problem in not_integer((option,), getattr(self, option), least[option])]

    def relation(self, problem: Problem) -> Relation:
        """The window, narrowed to the problem's own, and the sinks that it does not hold."""
        left, right = self.window - 1, 0 if problem.is_causal else self.window - 1
        if problem.left is not None:
            left = min(left, problem.left)
        if problem.right is not None:
            right = min(right, problem.right)
        # A step beyond the window leaves the query's own key, as does the next longer one.
        terms = [Term(Window(left, right, min(self.step, self.window)))]
        if self.sinks:
            terms.append(Term(Sinks(self.sinks), dedupe=True))
        return Relation(problem, tuple(terms))

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Exact where the window is at least as wide as the site's own or as the keys are long."""
        if self.step != 1 or site.narrowed == "scores":
            return "approximate"
        if isinstance(site.k_len, int) and self.window >= site.k_len and site.kind == "self":
            return "exact"
        left = site.mask.left is not None and site.mask.left < self.window
        right = site.mask.causal or (site.mask.right is not None and site.mask.right < self.window)
        return "exact" if left and right else "approximate"

    def reject(self, site: AttentionSite) -> str | None:
        """A mask that could not be read; cross attention, whose two axes have no common positions."""
        return cross_site(site) or unread_mask(site)
