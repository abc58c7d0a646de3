"""Where a graph node came from: the module that ran it and the line of the user's code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from torch.fx import Node

_ROOT = re.compile(r"^[LG]\['[^']*'\]")
_MODULES = re.compile(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def module_path(node: Node, prefix: str = "") -> str:
    """The dotted path of the innermost module, as ``named_modules`` spells it; empty for the top module.

    A node without a record takes that of the nearest node before or after it that has one.

    Args:
        prefix: the path of the module whose frame the graph is of (see ``frames``).
    """
    for candidate in _neighbours(node):
        # A backward's nodes name the module of the forward.
        stack = candidate.meta.get("nn_module_stack") or candidate.meta.get("fwd_nn_module_stack")
        if stack:
            return f"{prefix}.{_dotted(str(list(stack.values())[-1][0]))}".strip(".")
        if candidate.meta.get("stack_trace"):
            break  # recorded, and in no submodule
    return prefix


def source_line(node: Node) -> str:
    """``file.py:line`` of the user's call, or of the nearest node that has one; no line of a graph that torch made itself."""
    for candidate in _neighbours(node):
        found = _FRAME.findall(candidate.meta.get("stack_trace") or "")
        frames = [frame for frame in found if not frame[0].startswith("<eval_with_key>")]
        if frames:
            name, line = frames[-1]
            return f"{os.path.basename(name)}:{line}"
    return "unknown"


def _neighbours(node: Node, reach: int = 24) -> Iterator[Node]:
    """The node, then the nodes around it in the graph, nearest first."""
    yield node
    before, after = node.prev, node.next
    for _ in range(reach):
        if before.op not in ("root", "placeholder"):
            yield before
            before = before.prev
        if after.op not in ("root", "output"):
            yield after
            after = after.next


def _dotted(path: str) -> str:
    path = _ROOT.sub("", path)
    path = _MODULES.sub(lambda match: "." + next(group for group in match.groups() if group is not None), path)
    return path.strip(".").removeprefix("L__self___")


def layer_index(module: str) -> int | None:
    """The first number in a module path: the layer."""
    for part in module.split("."):
        if part.isdigit():
            return int(part)
    return None
