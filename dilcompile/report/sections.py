"""What a report says beside its table: headed lists of lines, for text and HTML alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dilcompile.report.record import Record
from dilcompile.report.rows import Row

READING = (
    "pairs: exact count of the form's over the model's own mask's, and over Sq x Sk; a multiset counts a pair once a branch",
    "FLOPs: 2 (D + Dv) a pair, forward, whole batch, all heads; before: the pairs of the model's own mask",
    "memory: q, k, v and output; not: scores and masks over all pairs that are not built any more",
)


@dataclass(frozen=True)
class Section:
    """A heading and its items; an item is what it is about, what is to say, and the cure (may be empty)."""

    heading: str
    items: tuple[tuple[str, str, str], ...]


def sections(report: Record, rows: Iterable[Row]) -> list[Section]:
    """All that are not empty. ``rows`` as they are shown, so that one item speaks of the same sites as one row."""
    rows = list(rows)
    refused = [(row.site[0], row.reason, row.cure) for row in rows if row.reason and not row.asked]
    kept = [(row.site[0], row.reason, row.cure) for row in rows if row.reason and row.asked]
    misses = [(f"{miss.module or '<top>'} ({miss.source})", f"{miss.node}: {miss.reason}", miss.cure) for miss in report.misses]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            notes.setdefault(note, []).append(row.site[0])
    graphs = [(f"graph {graph.graph}", note, "") for graph in report.graphs for note in graph.notes]
    found = (
        Section("Refused: a rule asked for a form that the site can't take", tuple(refused)),
        Section("Missed: looks like attention and was left alone", tuple(misses)),
        Section("Rules that matched no site", tuple((line, "", "") for line in report.unused_rules)),
        Section("Graphs", tuple(graphs)),
        Section("Notes", tuple((", ".join(sites), note, "") for note, sites in notes.items())),
        Section("Kept as the policy asks", tuple(kept)),
    )
    return [section for section in found if section.items]
