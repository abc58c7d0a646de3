"""Reductions over one dim of a tensor that stand beside it as one number a row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import op_name, shape_of
from dilcompile.passes.graph.sizes import same_size

# They put no number at another row.
_PASSES = frozenset("expand expand_as clone contiguous alias".split())


def reduced_dim(number: Node, names: Collection[str], of: Node, facts: Facts) -> int | None:
    """The dim of ``of`` that ``number`` reduces by one of the operators named, broadcast against ``of``; None if it does not."""
    rank = len(shape_of(of))
    inserted: int | None = None
    if len(shape_of(number)) != rank:
        return None
    while op_name(number) in _PASSES or (op_name(number) == "unsqueeze" and inserted is None):
        if op_name(number) == "unsqueeze":
            inserted = int(number.args[1]) % rank  # type: ignore[arg-type]
        source = number.args[0]
        if not isinstance(source, Node) or facts.mutations.stale(source, number):
            return None
        number = source
    if op_name(number) not in names or number.args[0] is not of or facts.mutations.stale(of, number) or len(number.args) < 2:
        return None
    dims: Any = number.args[1]
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    if len(listed) != 1:
        return None
    dim = int(listed[0]) % rank
    kept = len(shape_of(number)) == rank and same_size(shape_of(number)[dim], 1)
    return dim if (kept and inserted is None) or (not kept and inserted == dim) else None
