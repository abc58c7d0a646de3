"""Relations whose pairs are not known from sizes: why a schedule can't have them, or what it takes instead."""

from __future__ import annotations

from dataclasses import replace

from dilcompile.generators import Everything, Generator, Segment, Window
from dilcompile.relation import Relation, Term


def data_chosen(relation: Relation) -> str | None:
    """Where blocks are chosen from the data, by all keys, no rank knows what it needs."""
    if not relation.is_bound:
        return None
    return (
        "its blocks are chosen from the data, for which a rank would have to see all keys; take ulysses, where each rank has all "
        "keys of some heads, or a pattern without data"
    )


def restarting(relation: Relation, placement: str) -> str | None:
    """Terms whose positions count from the start of each document, which sizes alone don't tell. Windows don't: documents only
    take pairs away from them."""
    for term in relation.terms:
        if not isinstance(term.generator, Everything | Window):
            return (
                f"{placement} goes by sizes alone, but {term.generator} counts from the start of each packed document; take ring "
                "or all_gather"
            )
    return None


def anywhere(relation: Relation) -> Relation:
    """A relation with every pair that there may be, wherever documents start: what counts from their starts is taken as far as it
    may reach."""
    return replace(relation, terms=tuple(Term(_anywhere(term.generator)) for term in relation.terms))


def _anywhere(generator: Generator) -> Generator:
    if isinstance(generator, Segment):
        return Window(generator.length - 1, generator.length - 1)
    return generator if isinstance(generator, Window) else Everything()
