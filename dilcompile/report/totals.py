"""Sums over a whole model."""

from __future__ import annotations

from dataclasses import dataclass

from dilcompile.report import units
from dilcompile.report.costs import costs_of
from dilcompile.report.record import Record


@dataclass(frozen=True)
class Totals:
    """Of all sites of all graphs.

    Args:
        flops_before, flops_after: of the attention of one forward pass, kept sites included.
        pairs_mask, pairs_form: as in ``Costs``.
        scores_bytes: the most that one site's scores took; they live one site at a time.
        mask_bytes: of the masks not built any more; sites of one graph with equal masks share one.
        uncounted: sites whose costs are not known.
    """

    sites: int
    rewritten: int
    exact: int
    approximate: int
    kept: int
    refused: int
    misses: int
    pairs_mask: int
    pairs_form: int
    flops_before: int
    flops_after: int
    scores_bytes: int
    mask_bytes: int
    uncounted: int

    @property
    def lines(self) -> list[str]:
        """The sums in words."""
        found = [
            f"{_many(self.sites, 'site')}: {self.rewritten} rewritten ({self.exact} exact, {self.approximate} approximate), "
            f"{self.kept} kept as asked, {self.refused} refused; {_many(self.misses, 'miss')}"
        ]
        if self.flops_before:
            found.append(
                f"attention FLOPs of one forward pass: {units.count(self.flops_before)} -> {units.count(self.flops_after)} "
                f"({units.percent(self.flops_after / self.flops_before)})"
            )
        if self.scores_bytes:
            found.append(f"scores over all pairs not held any more: {units.size(self.scores_bytes)} for the largest site")
        if self.mask_bytes:
            found.append(f"masks over all pairs not built any more: at least {units.size(self.mask_bytes)}")
        if self.uncounted:
            found.append(f"{_many(self.uncounted, 'site')} not counted: a length is not known, or the form can't be had")
        return found


def _many(number: int, word: str) -> str:
    plural = "misses" if word == "miss" else f"{word}s"
    return f"{number} {word if number == 1 else plural}"


def totals_of(report: Record) -> Totals:
    """The sums of a report."""
    verdicts = report.verdicts
    costs = [held for verdict in verdicts if (held := costs_of(verdict)) is not None]
    masks: dict[tuple[int, str, str, str], int] = {}
    for index, graph in enumerate(report.graphs):
        for verdict in graph.verdicts:
            held, site = costs_of(verdict), verdict.site
            if held is not None:
                key = (index, site.mask.formula, str(site.q_len), str(site.k_len))
                # A kept site (0 bytes) still has its mask built.
                masks[key] = min(held.mask_bytes, masks.get(key, held.mask_bytes))
    decisions, rejections = report.decisions, report.rejections
    return Totals(
        sites=len(verdicts),
        rewritten=len(decisions),
        exact=sum(decision.fidelity == "exact" for decision in decisions),
        approximate=sum(decision.fidelity == "approximate" for decision in decisions),
        kept=sum(rejection.asked for rejection in rejections),
        refused=sum(not rejection.asked for rejection in rejections),
        misses=len(report.misses),
        pairs_mask=sum(held.pairs_mask for held in costs),
        pairs_form=sum(held.pairs_form for held in costs),
        flops_before=sum(held.flops_before for held in costs),
        flops_after=sum(held.flops_after for held in costs),
        scores_bytes=max((held.scores_bytes for held in costs), default=0),
        mask_bytes=sum(masks.values()),
        uncounted=len(verdicts) - len(costs),
    )
