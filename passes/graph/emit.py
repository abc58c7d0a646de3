"""Insert nodes into a graph together with the fake values that later compilers read off them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._pytree import tree_map
from torch.utils._sympy.functions import FloorDiv

from dilcompile.passes.dialect.normalize import fake_mode_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.site import Length

aten = torch.ops.aten

# What says where a node came from and how to treat it (activation checkpointing).
_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id", "partitioner_tag", "custom")


class Emitter:
    """Emits before one node of a graph, with that node's provenance."""

    def __init__(self, gm: GraphModule, before: Node) -> None:
        self.graph = gm.graph
        self.before = before
        self._fake_mode = fake_mode_of(gm)
        self._sizes: dict[Any, tuple[Node, int]] | None = None

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in _PROVENANCE:
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        values = tree_map(lambda arg: arg.meta["val"] if isinstance(arg, Node) else arg, (args, kwargs))
        with self._fake_mode, disable_proxy_modes_tracing(), _no_autocast():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def held(self, target: Callable[..., Any], value: Any, args: tuple[Any, ...]) -> Node:
        """A call of which ``value``, without data, says what it gives; nothing is called."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args)
        node.meta.update({key: held for key, held in self.before.meta.items() if key in _PROVENANCE})
        node.meta["val"] = value
        return node

    def size(self, length: Length) -> int | Node:
        """A length as a graph argument: the number, or a node that computes it from some tensor's shape."""
        return length if isinstance(length, int) else self._computed(length.node.expr)

    def _computed(self, expr: Any) -> int | Node:
        """A length by arithmetic on those that tensors of the graph have."""
        if expr.is_Integer:
            return int(expr)
        known = self._known_sizes()
        if expr in known:
            tensor, dim = known[expr]
            return self(aten.sym_size.int, tensor, dim)
        for part, (tensor, dim) in known.items():
            quotient = expr / part
            if quotient.is_Integer:
                held = self(aten.sym_size.int, tensor, dim)
                return self(operator.mul, held, int(quotient))
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            combine = operator.add if isinstance(expr, sympy.Add) else operator.mul
            return reduce(lambda first, second: self(combine, first, second), map(self._computed, expr.args))
        if isinstance(expr, FloorDiv):
            return self(operator.floordiv, *map(self._computed, expr.args))
        return self.symbol(expr)

    def symbol(self, expr: Any) -> Node:
        """A node that holds a symbolic length or number of the caller."""
        known = self._known_sizes()
        if expr in known:
            return self(aten.sym_size.int, *known[expr])
        for node in self.graph.nodes:
            if node is self.before:
                break
            if isinstance(node.meta.get("val"), torch.SymInt) and node.meta["val"].node.expr == expr:
                found: Node = node
                return found
        raise LookupError(f"nothing in the graph holds the number {expr}")

    def _known_sizes(self) -> dict[Any, tuple[Node, int]]:
        if self._sizes is None:
            self._sizes = {}
            for node in self.graph.nodes:
                if node is self.before:
                    break
                value = node.meta.get("val")
                if not isinstance(value, torch.Tensor):
                    continue
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self._sizes.setdefault(size.node.expr, (node, dim))
        return self._sizes

    def item(self, node: Node, index: int) -> Node:
        """One result of an operator that has several."""
        with self.graph.inserting_before(self.before):
            found = self.graph.call_function(operator.getitem, (node, index))
        found.meta.update({key: held for key, held in node.meta.items() if key in _PROVENANCE})
        found.meta["val"] = node.meta["val"][index]
        return found

    def offset(self, q_offset: Length, q: Node, k: Node) -> int | Node:
        """The position of query row 0 among the keys: a number, or the difference of the lengths."""
        if isinstance(q_offset, int):
            return q_offset
        rows, columns = self(aten.sym_size.int, q, 2), self(aten.sym_size.int, k, 2)
        return self(operator.sub, columns, rows)

    def reshape(self, node: Node, shape: Sequence[Length]) -> Node:
        """``node`` in the given shape; nothing is emitted if it has it."""
        old = tuple(node.meta["val"].shape)
        if len(old) == len(shape) and all(same_size(a, b) for a, b in zip(old, shape, strict=True)):
            return node
        symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        # One unknown length needs no node: the reshape infers it.
        arguments = [-1 if symbolic == [i] else self.size(size) for i, size in enumerate(shape)]
        return self(aten.reshape.default, node, arguments)

    def permute(self, node: Node, order: Sequence[int]) -> Node:
        if list(order) == list(range(len(order))):
            return node
        return self(aten.permute.default, node, list(order))

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        if node.meta["val"].dtype is dtype:
            return node
        return self(aten.to.dtype, node, dtype)


def _no_autocast() -> contextlib.ExitStack:
    """Emitted values have the dtypes that were asked for; no ambient autocast changes their record."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
