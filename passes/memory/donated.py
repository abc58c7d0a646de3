"""Which inputs of a backward are given to it for good: saved tensors that nobody else can see."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dilcompile.memory import Buffer
from dilcompile.memory.donate import Donated
from dilcompile.passes.memory.lifetimes import Lifetimes, travels
from dilcompile.passes.memory.shared_buffers import Homes, Made, alike, same


def donated_numbers() -> frozenset[int]:
    """The numbers of the inputs of the backward that is compiled now which AOTAutograd gives away, if it tells.

    AOTAutograd refuses ``retain_graph`` and ``create_graph`` where there are any (``torch._functorch.config.donated_buffer``).
    """
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    return frozenset(getattr(metadata, "bw_donated_idxs", None) or ())


def donated_between(forward: GraphModule, backward: GraphModule, num_outputs: int | None) -> frozenset[int]:
    """The same before AOTAutograd has looked: saved tensors that alias no input or output of the model, and no gradient."""
    if not torch._functorch.config.donated_buffer:
        return frozenset()
    results, gradients = _results(forward), _results(backward)
    seen = [*forward.graph.find_nodes(op="placeholder"), *results[:num_outputs], *gradients]
    visible = {_memory(node) for node in seen}
    saved = {node.name for node in results[num_outputs:] if isinstance(node, Node) and _memory(node) not in {None, *visible}}
    inputs = backward.graph.find_nodes(op="placeholder")
    return frozenset(number for number, node in enumerate(inputs) if node.name in saved)


def donated_memory(
    gm: GraphModule, numbers: Collection[int], made: Sequence[Made], homes: Homes, found: Lifetimes
) -> list[Donated]:
    """The memory of these inputs, each piece from step 0 to its last reader.

    Args:
        made, homes: what is planned, and where it lies so far.
    """
    groups: dict[int | None, list[tuple[int, Node]]] = {}
    for number, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        groups.setdefault(_memory(node), []).append((number, node))
    given = {buffer.name: buffer for buffer in found.given}
    moved = _moved(gm, found)
    result = []
    for memory, members in groups.items():
        names = [node.name for _, node in members]
        if memory is None or not all(number in numbers for number, _ in members) or not moved.isdisjoint(names):
            continue
        if not all(name in given for name in names):
            continue
        piece = replace(given[names[0]], end=max(given[name].end for name in names))
        over = _over(members[0][1], piece, made, homes, found) if len(members) == 1 else frozenset()
        result.append(Donated(piece, tuple(number for number, _ in members), over))
    return result


def _over(given: Node, piece: Buffer, made: Sequence[Made], homes: Homes, found: Lifetimes) -> frozenset[str]:
    """The elementwise results that its last reader may write where it reads."""
    last = found.nodes[piece.end] if found.nodes else ""
    names = set()
    for node, form, results in made:
        if node.name != last or not form.by_element or len(results) != 1 or results[0][0] not in homes.buffers:
            continue
        name, value = results[0]
        buffer = homes.buffers[name]
        if buffer.begin != piece.end or not same(buffer.size, piece.size):
            continue
        if any(
            found.memory.get(operand.name) == (given.name,) and alike(operand, value, node, found)
            for operand in node.all_input_nodes
        ):
            names.add(name)
    return frozenset(names)


def _moved(gm: GraphModule, found: Lifetimes) -> set[str]:
    """What is read on its way to other ranks or devices: by whom, and until when, the steps don't tell."""
    names: set[str] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        device = _device(node)
        for operand in node.all_input_nodes:
            if travels(node) or _device(operand) != device:
                names.update(found.memory.get(operand.name, ()))
    return names


def _device(node: Node) -> torch.device | None:
    value = node.meta.get("val")
    tensors = [value] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else ()
    return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)


def _memory(node: object) -> int | None:
    """Which memory a node's tensor has."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and value.layout is torch.strided else None


def _results(gm: GraphModule) -> Sequence[object]:
    (given,) = gm.graph.output_node().args
    assert isinstance(given, (tuple, list)), "AOTAutograd's graphs give several results"
    return given
