"""Tensors that are broadcast against scores, brought into the order [B, H, Sq, Sk]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from dilcompile.passes.axes.atoms import Atom, Layout, leaves
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.site import Length


def in_score_order(emit: Emitter, tensor: Node, dims: Layout, roles: Roles) -> Node:
    """A tensor that is broadcast against score dims, broadcastable to [B, H, Sq, Sk]."""
    # The dims that it lacks are broadcast along, too: one of their atoms may merge with one that it has.
    shape: tuple[Length, ...] = (*[1] * (len(dims) - len(shape_of(tensor))), *shape_of(tensor))
    atoms: list[Atom] = []
    sizes: list[Length] = []
    for dim, size in zip(dims, shape, strict=True):
        own = leaves(dim)
        atoms += own
        # A dim of size 1 is broadcast along all the atoms it stands for.
        sizes += [1] * len(own) if same_size(size, 1) else [atom.size for atom in own]
    node = emit.reshape(tensor, sizes)
    groups = [
        [axis.out for axis in roles.batch],
        [axis.out for axis in roles.heads],
        list(roles.out_rows),
        list(roles.score_columns),
    ]
    present = [[_index_of(atoms, atom) for atom in group if any(atom is a for a in atoms)] for group in groups]
    node = emit.permute(node, [i for group in present for i in group])
    merged = [_product(sizes[i] for i in group) for group in present]
    spread = [_spread([sizes[i] for i in group], group, atoms) for group in present]
    if any(spread):
        full = [atoms[i].size if spread[g] else sizes[i] for g, group in enumerate(present) for i in group]
        node = emit(aten.expand.default, node, [emit.size(size) for size in full])
        merged = [_product(atoms[i].size for i in group) if spread[g] else merged[g] for g, group in enumerate(present)]
    return emit.reshape(node, merged)


def _spread(sizes: list[Length], group: list[int], atoms: list[Atom]) -> bool:
    """Must a partly broadcast group be written out, because its atoms merge into one dim?"""
    ones = [same_size(size, 1) for size in sizes]
    return any(ones) and not all(ones)


def _index_of(atoms: Sequence[Atom], atom: Atom) -> int:
    return next(i for i, other in enumerate(atoms) if other is atom)


def _product(sizes: Iterable[Length]) -> Length:
    total: Length = 1
    for size in sizes:
        total = total * size
    return total
