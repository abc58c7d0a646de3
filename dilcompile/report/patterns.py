"""The distinct patterns of a report: which pairs the forms of its sites compute, counted and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dilcompile.blocks.cells import MOST_CELLS, BlockCount, Cells, cells_of
from dilcompile.blocks.picture import TEXT_LEGEND, svg, text
from dilcompile.decision import Decision
from dilcompile.generators import Blocks, Segment
from dilcompile.relation import Relation
from dilcompile.report import units
from dilcompile.report.block_counts import block_count, blocks_of, listed
from dilcompile.report.costs import costs_of, relation_of
from dilcompile.report.lengths import shown, symbol
from dilcompile.report.orders import OrderCount, figure, orders_of, words
from dilcompile.report.pair_cells import MOST_CELLS as PAIR_CELLS
from dilcompile.report.pair_cells import pair_cells
from dilcompile.report.record import Record, Verdict
from dilcompile.report.rows import named, ranges
from dilcompile.site import AttentionSite

# Heads that differ are drawn one by one, but no more than these.
MOST_HEADS = 4
_TEXT_CELLS = 24
_DRAWN_AS_IT_IS = {"causal", "window"}


@dataclass(frozen=True)
class Pattern:
    """What some sites have in common: form, lengths, heads and limits.

    Args:
        form: its text.
        name: of the form.
        relation: at the example's sizes, for one batch row.
        lengths: queries and keys; a symbol with its value in the example call.
        sites: graph and index of each site.
        modules: their modules.
        density_of_mask, density_of_all: as in ``Costs``: of the pairs that are computed, or of the most that may be.
        count: the blocks, where the form has any.
        unseen: factors of the mask that depend on data. Nothing here knows of them.
        orders: the blocks of the form's neighbourhood by its order of tokens and by rows, where it has them.
    """

    form: str
    name: str
    relation: Relation
    lengths: str
    sites: tuple[tuple[str, int], ...]
    modules: tuple[str, ...]
    density_of_mask: float
    density_of_all: float
    count: BlockCount | None
    unseen: tuple[str, ...]
    orders: tuple[OrderCount, ...] = ()

    @property
    def is_bound(self) -> bool:
        """Does the data choose, so that the densities are the most that may be computed?"""
        return self.relation.is_bound

    @property
    def title(self) -> str:
        """The form's name and the density."""
        return f"{self.name}: {'at most ' if self.is_bound else ''}{units.percent(self.density_of_all)} of all pairs"

    @property
    def lines(self) -> tuple[str, ...]:
        """What there is to say of the numbers."""
        unseen = f"; {' and '.join(self.unseen)} of the mask left out" if self.unseen else ""
        of_mask = f"{units.percent(self.density_of_mask)} of the pairs of the model's own mask, at {self.lengths}{unseen}"
        return (of_mask,) if self.count is None else (of_mask, str(self.count))

    def pictures(self, most: int = MOST_CELLS) -> Iterator[tuple[str, Cells]]:
        """Which heads are drawn, in words (empty: all are alike), and the picture; heads that are alike share one."""
        blocks = blocks_of(self.relation)
        return _pairs_drawn(self.relation, most) if blocks is None else _blocks_drawn(blocks, self.relation.problem.heads, most)

    def svgs(self, name: str) -> Iterator[str]:
        """The pictures for a page. ``name``: unique in the page."""
        for number, (heads, cells) in enumerate(self.pictures()):
            yield svg(cells, f"{self.title}; {heads}" if heads else self.title, self.lines, f"{name}-{number}")
        if self.orders:
            yield figure(self.orders, f"{name}-orders")

    def __str__(self) -> str:
        parts = [f"{named(self.modules)}: {self.form}", self.title, *self.lines, *([words(self.orders)] if self.orders else [])]
        for heads, cells in self.pictures(_TEXT_CELLS):
            parts += [*([heads] if heads else []), text(cells)]
        return "\n".join([*parts, TEXT_LEGEND])


def patterns_of(report: Record) -> list[Pattern]:
    """One for each distinct pattern, in the order of the first site that has it. Dense attention under no window has none."""
    found: dict[tuple[object, ...], Pattern] = {}
    for graph in report.graphs:
        for verdict in graph.verdicts:
            pattern = _pattern(verdict, graph.graph)
            if pattern is None:
                continue
            key = (pattern.form, pattern.relation, pattern.lengths, pattern.unseen)
            held = found.get(key)
            if held is not None:
                pattern = replace(held, sites=held.sites + pattern.sites, modules=held.modules + pattern.modules)
            found[key] = pattern
    return list(found.values())


def _pattern(verdict: Verdict, graph: str) -> Pattern | None:
    relation, costs = relation_of(verdict), costs_of(verdict)
    if (
        relation is None
        or costs is None
        or not isinstance(verdict, Decision)
        or not (relation.problem.q_len and relation.problem.k_len)
    ):
        return None
    site, size = verdict.site, relation.problem
    if verdict.form.name == "dense" and site.mask.left is None and site.mask.right is None:
        return None
    return Pattern(
        form=str(verdict.form),
        name=verdict.form.name,
        relation=replace(relation, problem=replace(size, batch=1, head_dim=1, v_dim=1)),
        lengths=_lengths(site),
        sites=((graph, site.index),),
        modules=(site.module or "<top>",),
        density_of_mask=costs.density_of_mask,
        density_of_all=costs.density_of_all,
        count=block_count(verdict),
        unseen=tuple(word for word in site.mask.words if word not in _DRAWN_AS_IT_IS),
        orders=orders_of(verdict.form),
    )


def _lengths(site: AttentionSite) -> str:
    changing = symbol(site.q_len) is not None or symbol(site.k_len) is not None
    return f"{shown(site.q_len)} x {shown(site.k_len)} positions" + (", the example's lengths" if changing else "")


def _blocks_drawn(blocks: Blocks, heads: int, most: int) -> Iterator[tuple[str, Cells]]:
    if not blocks.pattern.by_head:
        yield "", cells_of(listed(blocks, 0), blocks.grid, most)
        return
    alike: dict[tuple[bytes, bytes], list[int]] = {}
    for head in range(heads):
        lists = listed(blocks, head)
        alike.setdefault((lists.starts.tobytes(), lists.blocks.tobytes()), []).append(head)
    for group in list(alike.values())[:MOST_HEADS]:
        yield _words(group, len(alike)), cells_of(listed(blocks, group[0]), blocks.grid, most)


def _pairs_drawn(relation: Relation, most: int) -> Iterator[tuple[str, Cells]]:
    """Heads that differ in the offset of a branch alone look alike in cells."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for head in range(relation.problem.heads):
        alike.setdefault(tuple(_kind(term.generator, head) for term in relation.terms), []).append(head)
    for heads in list(alike.values())[:MOST_HEADS]:
        cells = pair_cells(relation, heads[0], min(most, PAIR_CELLS))
        offsets = {residue for term in relation.terms for residue in _residues(term.generator)}
        if cells is not None:
            own = "; heads differ in the offset alone" if len(offsets) > 1 else ""
            yield (_words(heads, len(alike)) or ("all heads" if own else "")) + own, cells


def _kind(generator: object, head: int) -> object:
    """Heads look alike where this is equal under each term."""
    if isinstance(generator, Blocks) and generator.pattern.by_head:
        lists = listed(generator, head)
        return lists.starts.tobytes(), lists.blocks.tobytes()
    return not isinstance(generator, Segment) or generator.heads is None or generator.heads[0] <= head < generator.heads[1]


def _residues(generator: object) -> tuple[int, ...]:
    return generator.residues or () if isinstance(generator, Segment) else ()


def _words(heads: list[int], groups: int) -> str:
    if groups == 1:
        return ""
    more = f", of {groups} groups that differ" if groups > MOST_HEADS else ""
    return f"{'head' if len(heads) == 1 else 'heads'} {ranges(heads)}{more}"
