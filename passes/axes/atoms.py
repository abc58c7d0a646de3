"""Atoms: the axes that the dims of tensors are made of, and how views cut and join them.

A dim is a tuple of atoms, outermost first; a dim of size 1 is the empty tuple. An atom is an identity, not a size: the
query and the key axis of one product are different atoms though they have the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.passes.graph.sizes import same_size
from dilcompile.site import Length

Role = Literal["feature", "token"]
Leaves = tuple["Atom", ...]
Layout = tuple[Leaves, ...]


class Atom:
    """One axis, or the part of one that some view split off.

    Args:
        size: its length.
        role: ``feature`` if it comes out of a projection, ``token`` if it surely does not, None if unknown.
        broadcast: the tensor does not vary along it (it came from ``expand`` or ``repeat``).
        origin: the axis it is a copy, slice or extension of.
        moved: it is a slice or an extension, so that its positions are not those of its origin.
        placed: a later projection has treated all positions along it alike, as it does tokens or heads.

    Attributes:
        parts: the two that some view split it into.
        segments: the lengths and axes that it was concatenated from.
    """

    __slots__ = ("broadcast", "moved", "origin", "parts", "placed", "role", "segments", "size")

    def __init__(
        self,
        size: Length,
        role: Role | None = None,
        broadcast: bool = False,
        origin: Atom | None = None,
        moved: bool = False,
        placed: bool = False,
    ) -> None:
        self.size = size
        self.role = role
        self.broadcast = broadcast
        self.origin = origin
        self.moved = moved
        self.placed = placed
        self.parts: Leaves | None = None
        self.segments: tuple[tuple[Length, Leaves], ...] = ()

    def split(self, outer: Length, inner: Length) -> Leaves:
        self.parts = (
            Atom(outer, self.role, self.broadcast, placed=self.placed),
            Atom(inner, self.role, self.broadcast, placed=self.placed),
        )
        return self.parts

    @property
    def is_channel(self) -> bool:
        """Does it come out of a projection, and no other has taken it for tokens or heads since?"""
        return self.role == "feature" and not self.placed

    def as_places(self) -> Atom:
        """The same axis behind a projection of another one."""
        return Atom(self.size, self.role, self.broadcast, self, placed=True) if self.is_channel else self

    @property
    def root(self) -> Atom:
        """The axis this one is a copy of, position by position."""
        atom = self
        while atom.origin is not None and not atom.moved:
            atom = atom.origin
        return atom


def leaves(dim: Leaves) -> Leaves:
    """The dim's atoms with every later split applied."""
    found: list[Atom] = []
    for atom in dim:
        found.extend((atom,) if atom.parts is None else leaves(atom.parts))
    return tuple(found)


def flat(layout: Layout) -> Leaves:
    return tuple(atom for dim in layout for atom in leaves(dim))


def _divides(part: Length, whole: Length) -> bool:
    return bool(statically_known_true(whole % part == 0))  # type: ignore[operator]


def regroup(atoms: Leaves, shape: Sequence[Length]) -> Layout | None:
    """Group row-major ``atoms`` into dims of ``shape``, splitting atoms where a dim ends inside one.

    Returns None where a dim ends inside an atom that it doesn't divide.
    """
    queue = list(leaves(atoms))
    layout: list[Leaves] = []
    for size in shape:
        need, dim = size, []
        while not same_size(need, 1):
            if not queue:
                return None
            atom = queue.pop(0)
            if same_size(atom.size, need):
                dim.append(atom)
                break
            if _divides(atom.size, need):
                dim.append(atom)
                need = need // atom.size
            elif _divides(need, atom.size):
                outer, inner = atom.split(need, atom.size // need)
                dim.append(outer)
                queue.insert(0, inner)
                break
            else:
                return None
        layout.append(tuple(dim))
    return tuple(layout)


def align(a: Leaves, b: Leaves) -> list[tuple[Atom | None, Atom | None]] | None:
    """Pair up the atoms of two dims that are multiplied elementwise; None stands for a side of size 1.

    Returns None where the two can't be cut into common parts.
    """
    left, right = list(leaves(a)), list(leaves(b))
    if not left or not right:
        return [(x, None) for x in left] + [(None, y) for y in right]
    pairs: list[tuple[Atom | None, Atom | None]] = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if same_size(x.size, y.size):
            pairs.append((x, y))
        elif _divides(y.size, x.size):
            outer, inner = x.split(y.size, x.size // y.size)
            pairs.append((outer, y))
            left.insert(0, inner)
        elif _divides(x.size, y.size):
            outer, inner = y.split(x.size, y.size // x.size)
            pairs.append((x, outer))
            right.insert(0, inner)
        else:
            return None
    return None if left or right else pairs


def spans(dim: Leaves, size: Length) -> bool:
    """Do the dim's atoms have the length of the dim? (An operator may have broadcast a dim of size 1.)"""
    total: Length = 1
    for atom in dim:
        total = total * atom.size
    return same_size(total, size)


def role_of(dim: Leaves) -> Role | None:
    roles = {atom.role for atom in dim}
    return roles.pop() if len(roles) == 1 else None
