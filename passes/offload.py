"""Saved tensors wait in pinned host memory from their last reader in the forward to their first in the backward.

Both copies are put on the stream that the graph computes on: the copy back is behind the copy away, the copy away behind what
writes the tensor, and the memory goes to nobody who could run before the copy. Values are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from dilcompile.passes.lifetimes import lifetimes_of

_HOST = "host_"


def offloadable(forward: GraphModule, backward: GraphModule, num_outputs: int) -> list[str] | str:
    """Names of the saved tensors that can wait in host memory, largest first; or the reason why none can."""
    results = _outputs(forward)
    own = {node for node in results[:num_outputs] if isinstance(node, Node)}
    saved = [node for node in results[num_outputs:] if isinstance(node, Node) and node not in own]
    made = [node for node in saved if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)]
    if not made:
        return "the graph saves no tensor that it makes"
    if all(node.meta["val"].device.type == "cpu" for node in made):
        return "the graph is on a CPU, whose memory is the host's"
    names = lifetimes_of(forward).outputs
    read = {node.name for node in backward.graph.nodes if node.op == "placeholder"}
    found = []
    for node in made:
        alone = names.count(names[results.index(node)]) == 1
        if alone and node.name in read and _movable(node.meta["val"]):
            found.append(node)
    found.sort(key=lambda node: (-_size(node), node.name))
    return [node.name for node in found] or "every saved tensor shares its memory with another, or is not dense"


def offload(forward: GraphModule, backward: GraphModule, names: Sequence[str]) -> None:
    """Rewrite both graphs, in place, so that these saved tensors wait in host memory."""
    for name in names:
        node = next(node for node in forward.graph.nodes if node.name == name)
        waiting = next(node for node in backward.graph.nodes if node.op == "placeholder" and node.name == name)
        _send(forward, node)
        _fetch(backward, waiting, node.meta["val"].device)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()


def _send(gm: GraphModule, node: Node) -> None:
    readers = _readers(node)
    order = {other: number for number, other in enumerate(gm.graph.nodes)}
    last = max([node, *readers], key=order.__getitem__)
    (results,) = gm.graph.output_node().args
    with gm.graph.inserting_after(last):
        sent = _moved(gm, node, torch.device("cpu"), f"{_HOST}{node.name}")
    gm.graph.output_node().args = (type(results)(sent if result is node else result for result in results),)  # type: ignore


def _fetch(gm: GraphModule, waiting: Node, device: torch.device) -> None:
    """The input is renamed as the forward's output is; what it was called is now the copy."""
    name, readers = waiting.name, list(waiting.users)
    waiting._rename(f"{_HOST}{name}")
    waiting.target = waiting.name
    first = next(node for node in gm.graph.nodes if node in waiting.users)
    value = waiting.meta["val"]
    with gm.graph.inserting_before(first):
        fetched = _moved(gm, waiting, device, name)
    fetched.meta["val"] = value
    waiting.meta["val"] = value.to(torch.device("cpu"))
    for reader in readers:
        reader.replace_input_with(waiting, fetched)


def _moved(gm: GraphModule, node: Node, device: torch.device, name: str) -> Node:
    # From a CUDA device and without blocking, the copy's memory is pinned.
    options = {"device": device, "non_blocking": True}
    moved = gm.graph.create_node("call_function", torch.ops.aten._to_copy.default, (node,), options, name)
    moved.meta = {key: node.meta[key] for key in ("nn_module_stack", "fwd_nn_module_stack", "stack_trace") if key in node.meta}
    moved.meta["val"] = node.meta["val"].to(device)
    moved.meta["tensor_meta"] = _extract_tensor_metadata(moved.meta["val"])
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


def _movable(value: Tensor) -> bool:
    """Does a copy have the same strides, and is all of its memory the tensor's own?"""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value.device.type != "cpu" and statically_known_true(whole) and is_non_overlapping_and_dense_or_false(value)


def _size(node: Node) -> int:
    size = node.meta["val"].untyped_storage().nbytes()
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
