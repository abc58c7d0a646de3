"""How many blocks a site computes, counted from the lists that kernels walk."""

from __future__ import annotations

from functools import lru_cache

from dilcompile.blocks.adaptive import is_adaptive
from dilcompile.blocks.cells import BlockCount, with_pairs
from dilcompile.blocks.lists import BlockLists
from dilcompile.generators import Blocks
from dilcompile.relation import Relation
from dilcompile.report.costs import relation_of
from dilcompile.report.record import Verdict


def block_count(verdict: Verdict) -> BlockCount | None:
    """The blocks of a site at the example's sizes; None where its form has none, or where a length is not known."""
    relation = relation_of(verdict)
    return None if relation is None else count_of(relation)


@lru_cache(maxsize=256)
def count_of(relation: Relation) -> BlockCount | None:
    """The blocks of a relation, of one head where all have the same; None where it has none."""
    blocks = blocks_of(relation)
    if blocks is None:
        return None
    heads, full, there = relation.problem.heads if blocks.pattern.by_head else 1, 0, 0
    for head in range(heads):
        lists = listed(blocks, head)
        full, there = full + int(lists.full.sum()), there + len(lists)
    grid = blocks.grid
    return BlockCount(grid.q_block, grid.k_block, len(grid.rows), grid.columns, heads, full, there - full)


def blocks_of(relation: Relation) -> Blocks | None:
    """The blocks that the relation consists of, or None; also where the data of each call chooses them."""
    generators = [term.generator for term in relation.terms]
    blocks = generators[0] if len(generators) == 1 else None
    return blocks if isinstance(blocks, Blocks) and not is_adaptive(blocks.pattern) else None


def listed(blocks: Blocks, head: int) -> BlockLists:
    """The blocks of one head in which a pair counts."""
    return with_pairs(blocks.lists(head, blocks.grid), blocks.grid)
