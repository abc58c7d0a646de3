"""Saved tensors wait in pinned host memory from their last reader in the forward to their first in the backward.

Both copies are put on the stream that the graph computes on: the copy back is behind the copy away, the copy away behind what
writes the tensor, and the memory goes to nobody who could run before the copy. Values are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from dilcompile.passes.memory.lifetimes import lifetimes_of

_HOST = "host_"


def offloadable(forward: GraphModule, backward: GraphModule, num_outputs: int) -> list[tuple[str, ...]] | str:
    """The saved tensors that can wait in host memory, largest first; or the reason why none can.

    Returns:
        For each its name, or its names where it is saved several times.
    """
    results, memory = _outputs(forward), lifetimes_of(forward).outputs
    own = {*memory[:num_outputs]}
    read = {node.name for node in backward.graph.nodes if node.op == "placeholder" and node.users}
    groups: dict[str, list[Node]] = {}
    for node, name in zip(results[num_outputs:], memory[num_outputs:], strict=True):
        if isinstance(node, Node) and node.op == "call_function" and name is not None and name not in own:
            groups.setdefault(name, []).append(node)
    if not groups:
        return "the graph saves no tensor that it makes and keeps to itself"
    if all(nodes[0].meta["val"].device.type == "cpu" for nodes in groups.values()):
        return "the graph is on a CPU, whose memory is the host's"
    found = [nodes for nodes in groups.values() if _movable(nodes) and all(node.name in read for node in nodes)]
    found.sort(key=lambda nodes: (-_size(nodes[0]), nodes[0].name))
    names = [tuple(dict.fromkeys(node.name for node in nodes)) for nodes in found]
    return names or "every saved tensor is a part of its memory, or is not dense"


def offload(forward: GraphModule, backward: GraphModule, groups: Sequence[Sequence[str]]) -> None:
    """Rewrite both graphs, in place, so that these saved tensors wait in host memory."""
    for names in groups:
        nodes = [node for node in forward.graph.nodes if node.name in names]
        waiting = [node for node in backward.graph.nodes if node.op == "placeholder" and node.name in names]
        _send(forward, nodes)
        _fetch(backward, waiting)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()


def _send(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """One copy, behind the last reader; all of the names give it."""
    order = {other: number for number, other in enumerate(gm.graph.nodes)}
    last = max([*nodes, *(reader for node in nodes for reader in _readers(node))], key=order.__getitem__)
    with gm.graph.inserting_after(last):
        sent = _moved(gm, nodes[0], nodes[0].meta["val"].to(torch.device("cpu")), f"{_HOST}{nodes[0].name}")
    output = gm.graph.output_node()
    output.args = (type(output.args[0])(sent if result in nodes else result for result in _outputs(gm)),)  # type: ignore


def _fetch(gm: GraphModule, waiting: Sequence[Node]) -> None:
    """One copy back, before the first reader. Inputs are renamed as the forward's output is; the copy takes their first name."""
    name, value = waiting[0].name, waiting[0].meta["val"]
    readers = [(node, reader) for node in waiting for reader in node.users]
    first = next(node for node in gm.graph.nodes if any(node is reader for _, reader in readers))
    host = value.to(torch.device("cpu"))
    for node in waiting:
        node._rename(f"{_HOST}{node.name}")
        node.target, node.meta["val"] = node.name, host
    with gm.graph.inserting_before(first):
        fetched = _moved(gm, waiting[0], value, name)
    for node, reader in readers:
        reader.replace_input_with(node, fetched)


def _moved(gm: GraphModule, node: Node, value: Tensor, name: str) -> Node:
    # From a CUDA device and without blocking, the copy's memory is pinned.
    options: dict[str, Any] = {"device": value.device, "non_blocking": True}
    moved = gm.graph.create_node("call_function", torch.ops.aten._to_copy.default, (node,), options, name)
    moved.meta = {key: node.meta[key] for key in ("nn_module_stack", "fwd_nn_module_stack", "stack_trace") if key in node.meta}
    moved.meta["val"], moved.meta["tensor_meta"] = value, _extract_tensor_metadata(value)
    return moved


def _readers(node: Node) -> list[Node]:
    """Those of its memory, through views too."""
    own = node.meta["val"].untyped_storage()._cdata
    found: list[Node] = []
    for user in node.users:
        if user.op == "output":
            continue
        found.append(user)
        value = user.meta.get("val")
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == own:
            found += _readers(user)
    return found


def _outputs(gm: GraphModule) -> list[object]:
    (results,) = gm.graph.output_node().args
    return list(results)  # type: ignore[arg-type]


def _movable(nodes: Sequence[Node]) -> bool:
    """Is all of the memory one tensor, whose copy has its strides?"""
    value = nodes[0].meta["val"]
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    alike = all(
        statically_known_true(one == other)
        for node in nodes[1:]
        for one, other in zip(_layout(node.meta["val"]), _layout(value), strict=False)
    )
    return value.device.type != "cpu" and statically_known_true(whole) and is_non_overlapping_and_dense_or_false(value) and alike


def _layout(value: Tensor) -> tuple[object, ...]:
    return (value.dtype, value.dim(), *value.shape, *value.stride())


def _size(node: Node) -> int:
    size = node.meta["val"].untyped_storage().nbytes()
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
