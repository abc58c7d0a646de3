"""What scores and probabilities are multiplied with, brought to where it commutes with the products.

One number for all keys of a row goes to the queries or to the output, one for all rows of a key to the keys or to the values.
What scores are multiplied with beside that can only be a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from dilcompile.passes.axes.atoms import Atom
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.finding.anchors import MaskOperand, Multiplier
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.finding.score_order import in_score_order
from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.unproven import Unproven


@dataclass(frozen=True)
class Placed:
    """Multipliers by what they are brought to.

    Args:
        q, output: one number for all keys of a row.
        k, v: one number for all rows of a key.
        gates: a number for each pair; what is not a mask of zeros and ones among them can't be brought anywhere.
        factor: a number that the output is multiplied with.
    """

    q: tuple[Multiplier, ...] = ()
    k: tuple[Multiplier, ...] = ()
    v: tuple[Multiplier, ...] = ()
    output: tuple[Multiplier, ...] = ()
    gates: tuple[MaskOperand, ...] = ()
    factor: float = 1.0

    @property
    def all(self) -> tuple[Multiplier, ...]:
        return (*self.q, *self.k, *self.v, *self.output)

    def __str__(self) -> str:
        """What each side is multiplied with: ``q * scale, output * 0.5 * head_mask``."""
        sides = {"q": self.q, "k": self.k, "v": self.v, "output": self.output}
        parts = {side: [f" * {one}" for one in multipliers] for side, multipliers in sides.items()}
        parts["output"] = [f" * {self.factor:g}" for _ in range(self.factor != 1.0)] + parts["output"]
        return ", ".join(side + "".join(part) for side, part in parts.items() if part)


def placed(scales: Sequence[Multiplier], weights: Sequence[Multiplier], factor: float, roles: Roles, axes: Axes) -> Placed:
    """Where the multipliers of the scores (``scales``) and of the probabilities (``weights``, ``factor``) go.

    Raises:
        Unproven: naming one along an axis that the scores lack, or whose keys are shared by heads that it tells apart.
    """
    sides: dict[str, list[Multiplier]] = {"q": [], "k": [], "v": [], "output": []}
    gates = []
    for one in scales:
        varies = _Varies.of(one, roles, axes)
        if varies.rows and varies.keys and not one.inverse:
            gates.append(MaskOperand(one.node, one.on, "gate"))
            continue
        varies.check("scores")
        sides["k" if varies.keys else "q"].append(one)
    for one in weights:
        varies = _Varies.of(one, roles, axes)
        varies.check("probabilities")
        sides["v" if varies.keys else "output"].append(one)
    return Placed(**{side: tuple(found) for side, found in sides.items()}, gates=tuple(gates), factor=factor)


@dataclass(frozen=True)
class _Varies:
    """Along which axes of scores or probabilities a multiplier varies."""

    one: Multiplier
    rows: bool
    keys: bool
    shared_heads: bool

    @classmethod
    def of(cls, one: Multiplier, roles: Roles, axes: Axes) -> _Varies:
        """Raises: Unproven: if it varies along an axis that is none of them."""
        sizes = shape_of(one.node)
        dims = roles.score_dims(one.on, axes)
        dims = dims[len(dims) - len(sizes) :]
        varying = [atom for dim, size in zip(dims, sizes, strict=True) if not same_size(size, 1) for atom in dim]
        batch, heads = ([axis.out for axis in group] for group in (roles.batch, roles.heads))
        # Query heads of a group share a key head: nothing can be brought there that tells them apart.
        grouped = [axis.out for axis in roles.heads if axis.k is None and axis.v is None]
        known = (*batch, *heads, *roles.out_rows, *roles.score_columns)
        if not all(_among(atom, known) for atom in varying):
            reason = "scores or probabilities are multiplied along an axis that the product doesn't have"
            raise Unproven(one.node, reason, "multiply the queries or the output instead")
        return cls(
            one,
            any(_among(atom, roles.out_rows) for atom in varying),
            any(_among(atom, roles.score_columns) for atom in varying),
            bool(grouped) and any(_among(atom, heads) for atom in varying),
        )

    def check(self, what: str) -> None:
        if self.keys and self.rows:
            reason = f"the {what} are multiplied by a tensor that varies over queries and keys"
            raise Unproven(self.one.node, reason, "it stays as it is")
        if self.keys and self.shared_heads:
            reason = f"the {what} are multiplied by a tensor that varies over heads and over the keys that they share"
            raise Unproven(self.one.node, reason, "it stays as it is")


def _among(atom: Atom, atoms: Sequence[Atom]) -> bool:
    return any(atom is other for other in atoms)


def multiplied(
    emit: Emitter, operand: Node, multipliers: Sequence[Multiplier], roles: Roles, axes: Axes, along_keys: bool = False
) -> Node:
    """An operand or output [B, H or Hkv, S, D] times its multipliers.

    Args:
        along_keys: S are the keys, else the rows.
    """
    dtype = operand.meta["val"].dtype
    for one in multipliers:
        part = one.node
        if shape_of(part):  # a single number may stand on another device
            part = in_score_order(emit, part, roles.score_dims(one.on, axes), roles)
        if along_keys:
            part = emit(aten.transpose.int, part, 2, 3)
        operand = emit((aten.div if one.inverse else aten.mul).Tensor, operand, part)
    return emit.cast(operand, dtype)
