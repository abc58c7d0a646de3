"""Heads dealt to the ranks of a mesh axis: which relation each part of them has."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import gcd
from typing import Any

from dilcompile.generators import Blocks, Segment
from dilcompile.relation import Relation


def share_of(heads: int, kv_heads: int, parts: int) -> int:
    """How often each key head is sent, so that every part has equally many query heads a key head."""
    group = heads // kv_heads
    return group // gcd(group, heads // parts)


@lru_cache(maxsize=64)
def by_part(relation: Relation, parts: int) -> tuple[Relation, ...]:
    """The relations of the parts of the heads, each under its own key heads numbered from 0."""
    if parts == 1:
        return (relation,)
    share = share_of(relation.problem.heads, relation.problem.kv_heads, parts)
    dealt = _repeated(relation, share)
    each = dealt.problem.kv_heads // parts
    return tuple(dealt.of_heads(part * each, (part + 1) * each) for part in range(parts))


def _repeated(relation: Relation, share: int) -> Relation:
    """The same relation where each key head stands ``share`` times, each for a share of its query heads."""
    if share == 1:
        return relation
    terms = tuple(replace(term, generator=_repeated_generator(term.generator, share)) for term in relation.terms)
    return Relation(replace(relation.problem, kv_heads=relation.problem.kv_heads * share), terms)


def _repeated_generator(generator: Any, share: int) -> Any:
    if isinstance(generator, Segment):
        residues = generator.residues
        repeated = None if residues is None else tuple(each for each in residues for _ in range(share))
        return replace(generator, residues=repeated, group=generator.group // share)
    return replace(generator, group=generator.group // share) if isinstance(generator, Blocks) else generator
