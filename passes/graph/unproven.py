"""How a proof ends without a site."""

from __future__ import annotations

from torch.fx import Node


class Unproven(Exception):
    """The walk met something that the proof does not cover.

    Args:
        node: where it ended.
        reason: what it met.
        cure: what the user can do.
    """

    def __init__(self, node: Node, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.node, self.reason, self.cure = node, reason, cure
