"""Halo: a rank receives the edges of its neighbours' shards, as wide as its queries reach, and the sinks once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from dilcompile.generators import Blocks, Segment, Sinks, Window, least
from dilcompile.placements.needs import Exchange, local_first, needed, split
from dilcompile.placements.rows import Rows
from dilcompile.placements.schedule import RankSchedule
from dilcompile.placements.shards import Shards
from dilcompile.placements.unfit import data_chosen, restarting
from dilcompile.placements.volume import Volume, of_one_exchange
from dilcompile.position_sets import disjoint
from dilcompile.progression import Progression
from dilcompile.relation import Relation, Term

RESENDS = False
ONLY_NEEDED = False


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


@lru_cache(maxsize=32)
def volume(relation: Relation, shards: Shards, documents: bool = False) -> Volume:
    """See ``Placement``."""
    return of_one_exchange(_halos(relation, shards), shards)


@lru_cache(maxsize=16)
def _exchange(relation: Relation, shards: Shards) -> Exchange:
    return Exchange.of([split(rows, shards) for rows in _halos(relation, shards)])


@lru_cache(maxsize=16)
def _halos(relation: Relation, shards: Shards) -> list[tuple[Rows, ...]]:
    """What each rank attends to, under all key heads: the run from the first to the last key near that is read, and the sinks."""
    sinks = [term for term in relation.terms if isinstance(term.generator, Sinks)]
    near = [term for term in relation.terms if term not in sinks]
    of_terms = [needed(replace(relation, terms=tuple(terms)), shards) for terms in (near, sinks)]
    halos: list[tuple[Rows, ...]] = []
    for run_of, rest in zip(*of_terms, strict=True):
        ends = [end for rows in run_of for part in rows.positions for end in (part.start, part.positions()[-1])]
        runs = [Progression(min(ends), max(ends) + 1)] if ends else []
        parts = disjoint([*runs, *(part for rows in rest for part in rows.positions)])
        halos.append((Rows((0, relation.problem.kv_heads), parts),))
    return halos
