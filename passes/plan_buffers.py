"""Put a graph's buffers at the places that a plan gives them: each operator writes into memory that is handed to the graph.

For graphs that run operator by operator (inner compilers ``aot_eager`` and ``eager``); Inductor plans its own buffers. What
outlives the graph (outputs, saved tensors) and what an operator without an ``out`` form makes comes from torch's allocator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dilcompile.memory import Buffer, BufferPlan, plan_buffers
from dilcompile.passes.lifetimes import Lifetimes, lifetimes_of, makers

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True)
class Layout:
    """How a buffer is seen as a tensor; sizes and strides may be expressions."""

    buffer: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]

    def of(self, memory: Tensor, lengths: Mapping[sympy.Symbol, int]) -> Tensor:
        """The tensor in ``memory``, uint8, at the buffer's place."""
        shape, stride = ([_at(size, lengths) for size in sizes] for sizes in (self.shape, self.stride))
        return memory.view(self.dtype).as_strided(shape, stride)


@dataclass(frozen=True)
class PlannedGraph:
    """A graph that takes its buffers as further inputs.

    Args:
        gm: its last ``len(layouts)`` inputs are the buffers.
        plan: where they lie.
        layouts: of these inputs, in order.
        symbols: (number of an input, symbol) of the inputs that are lengths.
        lifetimes: of all buffers of the graph.
        elsewhere: the buffers that are not planned, because their operator has no ``out`` form.
    """

    gm: GraphModule
    plan: BufferPlan
    layouts: tuple[Layout, ...]
    symbols: tuple[tuple[int, sympy.Symbol], ...]
    lifetimes: Lifetimes
    elsewhere: tuple[Buffer, ...]


def plan_graph(gm: GraphModule, *, within_module: bool = False) -> PlannedGraph:
    """Plan the buffers of an ATen graph with fake values and rewrite it, in place, to use them.

    Args:
        within_module: see ``plan_buffers``.
    """
    lifetimes = lifetimes_of(gm)
    live = {buffer.name: buffer for buffer in lifetimes.buffers}
    layouts: list[Layout] = []
    planned: list[Buffer] = []
    symbols = _symbols(gm)
    after = _last_input(gm)
    for node, made in makers(gm):
        form = _out_form(node)
        if form is None or not all(name in live for name, _ in made):
            continue
        places = []
        for name, value in made:
            with gm.graph.inserting_after(after):
                after = gm.graph.placeholder(f"buffer_{len(layouts)}")
            after.meta["val"] = value
            layouts.append(_layout(name, value))
            planned.append(live.pop(name))
            places.append(after)
        _write_into(node, form, places)
    gm.graph.lint()
    gm.recompile()
    plan = plan_buffers(planned, within_module=within_module)
    return PlannedGraph(gm, plan, tuple(layouts), symbols, lifetimes, tuple(live.values()))


def _symbols(gm: GraphModule) -> tuple[tuple[int, sympy.Symbol], ...]:
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [(number, node.meta.get("val")) for number, node in enumerate(inputs)]
    found = [(number, value.node.expr) for number, value in values if isinstance(value, torch.SymInt)]
    return tuple((number, expr) for number, expr in found if isinstance(expr, sympy.Symbol))


def _last_input(gm: GraphModule) -> Node:
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return inputs[-1] if inputs else gm.graph._root


def _layout(name: str, value: Tensor) -> Layout:
    return Layout(name, value.dtype, *(tuple(map(_expression, sizes)) for sizes in (value.shape, value.stride())))


def _expression(size: int | torch.SymInt) -> Size:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _at(size: Size, lengths: Mapping[sympy.Symbol, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(lengths))


def _out_form(node: Node) -> torch._ops.OpOverload | None:
    return _out_overload(node.target) if isinstance(node.target, torch._ops.OpOverload) else None


@lru_cache(maxsize=1024)
def _out_overload(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload with the same arguments and ``out`` ones besides, one a result; None where there is none."""
    own = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    packet = op.overloadpacket
    for name in packet.overloads():
        other: torch._ops.OpOverload = getattr(packet, name)
        outs = [argument for argument in other._schema.arguments if argument.is_out]
        rest = [(argument.name, str(argument.type)) for argument in other._schema.arguments if not argument.is_out]
        if outs and rest == own and len(outs) == len(op._schema.returns):
            return other
    return None


def _write_into(node: Node, form: torch._ops.OpOverload, places: Sequence[Node]) -> None:
    names = [argument.name for argument in form._schema.arguments if argument.is_out]
    node.target = form
    node.kwargs = {**node.kwargs, **dict(zip(names, places, strict=True))}
