"""A function of one pair (b, h, q, k), as FlexAttention takes it, computed for all pairs at once.

Every index becomes a range along a dim of its own and every operator runs on tensors of four dims, so that what depends on the
head and the key alone has no dim of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.graph.operators import CASTS, RANDOM, indexed, is_pointwise, is_tensor, op_name, shape_of
from dilcompile.site import Length

_RANK = 4
# They make a number out of nothing.
_MAKING = frozenset(("full", "scalar_tensor", "zeros", "ones"))
# Of numbers they make numbers, though they lack the tag.
_ELEMENTWISE = CASTS | frozenset(("where", "floor_divide", "__and__", "__or__", "__xor__"))


@dataclass(frozen=True)
class PairFunction:
    """The inputs of a function's graph.

    Args:
        indices: those that are b, h, q and k, and how many there are of each.
        buffers: the others, each with the node of the graph around it that it stands for.
        dtype: of the scores that the function is given.
    """

    indices: tuple[tuple[Node, Length], ...]
    buffers: tuple[tuple[Node, Node], ...]
    dtype: torch.dtype

    def refusal(self, node: Node) -> str | None:
        """Why a value of the function can't be computed for all pairs at once; None if it can."""
        known = {own for own, _ in (*self.indices, *self.buffers)}
        queue, seen = [node], {node}
        while queue:
            one = queue.pop()
            if one in known:
                continue
            reason = _refusal(one)
            if reason is not None:
                return reason
            sources = one.all_input_nodes if indexed(one) is None else [_table(one)[0], *_table(one)[1]]
            fresh = [source for source in sources if source not in seen]
            seen.update(fresh)
            queue += fresh
        return None

    def emit(self, emit: Emitter, node: Node, device: torch.device) -> Node:
        """The value for all pairs, a float tensor with a dim each for b, h, q and k; 1 where it does not depend on one."""
        values = dict(self.buffers)
        for dim, (own, length) in enumerate(self.indices):
            if own.users:
                # As many as there are, whatever the dtype of the pair's own numbers: int64, as in an uncompiled call.
                run = emit(aten.arange.default, emit.size(length), dtype=torch.int64, device=device)
                values[own] = emit(aten.view.default, run, [-1 if i == dim else 1 for i in range(_RANK)])
        found = _Emission(emit, values).value(node)
        return found if found.meta["val"].dtype.is_floating_point else emit.cast(found, self.dtype)


@dataclass
class _Emission:
    emit: Emitter
    values: dict[Node, Node]

    def value(self, node: Any) -> Any:
        """The node for an argument; tensors with four dims, as all of them have the same rank in the function, none."""
        if not isinstance(node, Node):
            return node
        if node not in self.values:
            self.values[node] = self._computed(node)
        held = self.values[node]
        if is_tensor(held) and not shape_of(held):
            held = self.values[node] = self.emit(aten.view.default, held, [1] * _RANK)
        return held

    def _computed(self, node: Node) -> Node:
        if indexed(node) is not None:
            table, chosen = _table(node)
            return self.emit(aten.index.Tensor, self.values[table], [self.value(index) for index in chosen])
        args = torch.fx.map_arg(node.args, self.value)
        kwargs = torch.fx.map_arg(node.kwargs, self.value)
        found = self.emit(node.target, *args, **kwargs)  # type: ignore[arg-type]
        assert not is_tensor(node) or _same_kind(found, node), f"{node.name} has another dtype for all pairs"
        return found


def _same_kind(found: Node, node: Node) -> bool:
    """One dtype, or integers both: a pair's own numbers may be narrower than the ranges."""
    ours, theirs = (one.meta["val"].dtype for one in (found, node))
    integers = all(not (dtype.is_floating_point or dtype.is_complex) and dtype is not torch.bool for dtype in (ours, theirs))
    return ours is theirs or integers


def _refusal(node: Node) -> str | None:
    if node.op != "call_function":
        return "it reads a constant of its own"
    name = op_name(node)
    if indexed(node) is not None:
        table, chosen = _table(node)
        if table.op != "placeholder" or len(chosen) != len(shape_of(table)):
            return "it reads more than one number of a tensor"
        return None
    if is_tensor(node) and shape_of(node):
        return f"{name} makes more than a number"
    if name in RANDOM or not (is_pointwise(node) or name in _ELEMENTWISE or name in _MAKING):
        return f"it computes {name}, which has no rule"
    return None


def _table(node: Node) -> tuple[Node, list[Node]]:
    """The tensor that ``table[i][j]`` reads, and all its indices."""
    chosen: list[Node] = []
    while (found := indexed(node)) is not None and all(isinstance(index, Node) for index in found[1]):
        node, chosen = found[0], [*found[1], *chosen]
    return node, chosen
