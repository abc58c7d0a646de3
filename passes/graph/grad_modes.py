"""Where a graph computes without gradients (``torch.no_grad``): a rewrite may not give some to what is computed there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

_SWITCH = torch._C._set_grad_enabled


class GradModes:
    """The parts of a graph that compute with and without gradients, where gradients are asked for at all.

    Args:
        nodes: the whole graph, in order.
        training: gradients will be asked for.
    """

    def __init__(self, nodes: Sequence[Node], training: bool) -> None:
        self._position = {node: i for i, node in enumerate(nodes)} if training else {}
        self._switches = [i for node, i in self._position.items() if node.target is _SWITCH]
        self._off: set[Node] = set()
        off = False
        for node in self._position if self._switches else ():
            if node.target is _SWITCH:
                off = not node.args[0]
            elif off:
                self._off.add(node)

    def cut(self, node: Node, reader: Node) -> bool:
        """Does ``reader`` have gradients that end at ``node``, because that is computed without?"""
        return node in self._off and reader not in self._off

    def change(self, first: Node, last: Node) -> bool:
        """Are they switched on or off between two nodes?"""
        if not self._switches:
            return False
        return any(self._position[first] < switch < self._position[last] for switch in self._switches)
