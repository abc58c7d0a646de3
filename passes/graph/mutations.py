"""Which tensors are written in place, and when: a value read after that is not what its node says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import Node

from dilcompile.passes.graph.operators import is_tensor


class Mutations:
    """All in-place writes of one graph, by storage.

    The retrace already follows ``x.mul_(2)`` itself: later uses of ``x`` name the ``mul_`` node. What is left are writes
    through another view of the same storage.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.position = {node: i for i, node in enumerate(nodes)}
        self._first: dict[int, Node] | None = None
        self._writes: dict[int, list[Node]] = defaultdict(list)
        for node in nodes:
            for target in written(node):
                self._writes[storage(target)].append(node)

    def stale(self, source: Node, reader: Node) -> bool:
        """Was ``source`` written after it was made and before ``reader`` reads it (by neither of the two)?"""
        return bool(self.writes(source, source, reader))

    def overwritten(self, source: Node, reader: Node, until: Node) -> bool:
        """Is ``source`` written before ``until``, by ``reader`` or after it? Then it can't be read again there."""
        return reader in self.writers(source) or bool(self.writes(source, reader, until))

    def writers(self, target: Node) -> list[Node]:
        """All writes to ``target``'s storage."""
        return self._writes.get(storage(target), []) if self._writes else []

    def written_after(self, source: Node) -> bool:
        """Is ``source`` written to once it is made?"""
        return any(self.position[write] > self.position[source] for write in self.writers(source))

    def is_first(self, source: Node) -> bool:
        """Is it the first tensor of its storage, so that every other one comes from it?"""
        if self._first is None:
            self._first = {}
            for node in self.position:
                if is_tensor(node):
                    self._first.setdefault(storage(node), node)
        return self._first[storage(source)] is source

    def writes(self, target: Node, after: Node, before: Node) -> list[Node]:
        """The writes to ``target``'s storage strictly between two nodes."""
        if not self._writes:
            return []
        start, end = self.position[after], self.position[before]
        return [write for write in self._writes.get(storage(target), ()) if start < self.position[write] < end]


def written(node: Node) -> list[Node]:
    """The tensor arguments that ``node`` writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found: list[Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value: Any = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        found.extend(v for v in (value if isinstance(value, (list, tuple)) else [value]) if is_tensor(v))
    return found


def storage(node: Node) -> int:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    while is_functorch_wrapped_tensor(value):  # inside a vmap
        value = get_unwrapped(value)
    return int(value.untyped_storage()._cdata)
