"""Halo: a rank receives the edges of its neighbours' shards, as wide as its queries reach, and the sinks once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from dilcompile.generators import Blocks, Segment, Sinks, Window, least
from dilcompile.placements.needs import Exchange, local_first, needed, split
from dilcompile.placements.schedule import RankSchedule, Rows
from dilcompile.placements.shards import Shards
from dilcompile.placements.unfit import data_chosen, restarting
from dilcompile.position_sets import Parts, disjoint
from dilcompile.progression import Progression
from dilcompile.relation import Relation, Term

RESENDS = False


def reject(relation: Relation, shards: Shards, documents: bool = False) -> str | None:
    """Shards that are not runs of the sequence; keys out of a bounded reach; whatever starts anew in each document."""
    if shards.order != "contiguous":
        return f"halo needs contiguous shards, not {shards.order}: only there are the nearest keys those of the neighbours"
    for term in relation.terms:
        reason = data_chosen(relation) or _unbounded(term, relation, shards)
        if reason is not None:
            return f"halo: {reason}; take gather_needed"
    return restarting(relation, "halo") if documents else None


def _unbounded(term: Term, relation: Relation, shards: Shards) -> str | None:
    generator, size = term.generator, relation.problem
    if isinstance(generator, Sinks):
        return None
    if isinstance(generator, Segment):
        if generator.length <= shards.places:
            return None
        return f"segments of {generator.length} positions are longer than a shard of {shards.places}"
    if isinstance(generator, Blocks):
        return "how far blocks reach is not known"
    left, right = size.left, size.right
    if isinstance(generator, Window):
        left, right = least(left, generator.left), least(right, generator.right)
    if left is None or right is None:
        return f"{generator} reaches any key on the {'left' if left is None else 'right'}"
    return None


def schedule(relation: Relation, shards: Shards, rank: int, documents: bool = False) -> RankSchedule:
    """See ``Placement``: all own keys, then the edges and the sinks."""
    return local_first(relation, shards, rank, _exchange(relation, shards))


@lru_cache(maxsize=16)
def _exchange(relation: Relation, shards: Shards) -> Exchange:
    sinks = [term for term in relation.terms if isinstance(term.generator, Sinks)]
    near = [term for term in relation.terms if term not in sinks]
    of_terms = [needed(replace(relation, terms=tuple(terms)), shards) for terms in (near, sinks)]
    heads = (0, relation.problem.kv_heads)
    return Exchange.of([split((Rows(heads, _halo(*rows)),), shards) for rows in zip(*of_terms, strict=True)])


def _halo(near: tuple[Rows, ...], sinks: tuple[Rows, ...]) -> Parts:
    """One run from the first to the last near key that is read, for all key heads alike, and the sinks."""
    ends = [end for rows in near for part in rows.positions for end in (part.start, part.positions()[-1])]
    runs = [Progression(min(ends), max(ends) + 1)] if ends else []
    return disjoint([*runs, *(part for rows in sinks for part in rows.positions)])
