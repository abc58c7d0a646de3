"""Put a graph's buffers at the places that a plan gives them: each operator writes into memory that is handed to the graph.

For graphs that run operator by operator (inner compilers ``aot_eager`` and ``eager``); Inductor plans its own buffers. What
outlives the graph (outputs, saved tensors) and what an operator without an ``out`` form makes comes from torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from dilcompile.memory import Buffer, BufferPlan, plan_buffers
from dilcompile.memory.donate import Donated, donate
from dilcompile.passes.graph.provenance import module_path
from dilcompile.passes.memory.donated import donated_memory
from dilcompile.passes.memory.lifetimes import Lifetimes, lifetimes_of, makers, travels
from dilcompile.passes.memory.out_forms import out_form, workspace_form
from dilcompile.passes.memory.shared_buffers import Layout, expression, layout, share

aten = torch.ops.aten
# Memory without content, and how it is turned.
_UNWRITTEN = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default, aten.permute.default, aten.transpose.int)
# What takes an offset that counts from the begin of its operand's memory.
_ABSOLUTE = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)
Workspaces: TypeAlias = "Callable[[object, Sequence[Any], Mapping[str, Any]], int | sympy.Expr]"
# (number of the input, symbol, its hint)
Symbols: TypeAlias = "tuple[tuple[int, sympy.Symbol, int], ...]"


def without(target: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """No operator needs anything besides its results."""
    return 0


@dataclass(frozen=True)
class Inside:
    """Inputs that share the memory in which buffers lie.

    Args:
        inputs: their numbers, and how the graph sees each.
    """

    inputs: tuple[tuple[int, Layout], ...]


@dataclass(frozen=True)
class PlannedGraph:
    """A graph that takes its buffers as further inputs.

    Args:
        gm: its last ``len(layouts)`` inputs are the buffers.
        plan: where they lie.
        layouts: of these inputs, in order.
        symbols: (number of an input, symbol) of the inputs that are lengths.
        lifetimes: of all buffers of the graph, as it is planned.
        elsewhere: the buffers that are not planned, because their operator has no ``out`` form that makes no copy.
        donated: the inputs in whose memory buffers lie, one for each of ``plan.donated``.
        workspaces: those of the planned buffers that operators have besides their results.
    """

    gm: GraphModule
    plan: BufferPlan
    layouts: tuple[Layout, ...]
    symbols: tuple[tuple[int, sympy.Symbol], ...]
    lifetimes: Lifetimes
    elsewhere: tuple[Buffer, ...]
    donated: tuple[Inside, ...] = ()
    workspaces: tuple[Buffer, ...] = ()


def plan_graph(
    gm: GraphModule, *, within_module: bool = False, workspace: Workspaces = without, donated: Collection[int] = ()
) -> PlannedGraph:
    """Plan the buffers of an ATen graph with fake values and rewrite it, in place, to use them. Its code is not written anew.

    Args:
        within_module: see ``plan_buffers``.
        workspace: bytes that a call of an operator needs besides its results, from its target and operands.
        donated: the numbers of the inputs that nobody reads after the graph.
    """
    lifetimes, symbols = lifetimes_of(gm), _symbols(gm)
    forms = [(node, out_form(node), made) for node, made in makers(gm)]
    unknown = _of_unknown_size([one for _, _, made in forms for one in made], symbols)
    live = {buffer.name for buffer in lifetimes.buffers} - _by_place(gm, lifetimes) - unknown
    planned = [
        (node, form, made)
        for node, form, made in forms
        if form is not None and not lifetimes.lost(node) and _has_places(made, live)
    ]
    homes = share([(node, form, [one for one in made if one[0] in live]) for node, form, made in planned], lifetimes)
    workspaces = _workspaces(gm, lifetimes, workspace, symbols)
    pieces = donated_memory(gm, donated, planned, homes, lifetimes)
    inside = _layouts_of(gm, pieces)
    inputs = _Inputs(gm)
    for node, form, made in planned:
        places = [inputs.add(homes.layouts[name], value) if name in live else _empty(node, value) for name, value in made]
        if made[0][0] in homes.slices:
            _fill(node, places[0], homes.slices[made[0][0]], inputs)
            continue
        own = workspaces.get(node.name)
        form.write(node, places, None if own is None or not form.workspace else inputs.add(_bytes(own)))
    _with_workspaces(gm, workspaces, inputs)
    erased = _without_unused(gm)
    gm.graph.lint()
    placed = {name for _, _, made in planned for name, _ in made if name in live}.union(erased)
    elsewhere = tuple(buffer for buffer in lifetimes.buffers if buffer.name not in placed)
    buffers = [*homes.buffers.values(), *workspaces.values()]
    held, left = donate(buffers, pieces, (*elsewhere, *lifetimes.kept), within_module=within_module)
    plan = replace(plan_buffers(left, within_module=within_module), donated=tuple(arena for arena in held if arena.buffers))
    plan.verify()
    found = replace(lifetimes, buffers=[*buffers, *elsewhere])
    lengths = tuple((n, symbol) for n, symbol, _ in symbols)
    used = tuple(one for one, arena in zip(inside, held, strict=True) if arena.buffers)
    return PlannedGraph(gm, plan, tuple(inputs.layouts), lengths, found, elsewhere, used, tuple(workspaces.values()))


def workspaces_of(gm: GraphModule, workspace: Workspaces) -> tuple[Buffer, ...]:
    """Those that a plan of the graph, which stays as it is, would have."""
    return tuple(_workspaces(gm, lifetimes_of(gm), workspace, _symbols(gm)).values())


def _by_place(gm: GraphModule, lifetimes: Lifetimes) -> set[str]:
    """Buffers whose readers count places from the begin of the memory, which in an arena is not theirs.

    Operators that run graphs or other operators may do so inside.
    """
    found: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and (node.target in _ABSOLUTE or isinstance(node.target, torch._ops.HigherOrderOperator)):
            found.update(name for operand in node.all_input_nodes for name in lifetimes.memory.get(operand.name, ()))
    return found


def _of_unknown_size(made: Sequence[tuple[str, Tensor]], symbols: Symbols) -> set[str]:
    """Buffers whose sizes or strides are not known before the graph runs."""
    known = {symbol for _, symbol, _ in symbols}
    return {name for name, value in made if not _free(value) <= known}


def _free(value: Tensor) -> set[sympy.Symbol]:
    sizes = [size for size in (*value.shape, *value.stride(), value.storage_offset()) if type(size) is not int]
    return set().union(*(size.node.expr.free_symbols for size in sizes))


def _has_places(made: Sequence[tuple[str, Tensor]], live: Container[str]) -> bool:
    """Is some result planned, and the others', which outlive the graph, of a known size?"""
    known = all(name in live or all(isinstance(side, int) for side in value.shape) for name, value in made)
    return known and any(name in live for name, _ in made)


def _empty(node: Node, value: Tensor) -> Node:
    """Memory for a result that outlives the graph, beside others of its operator that are planned."""
    with node.graph.inserting_before(node):
        said: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        made = node.graph.call_function(aten.empty_strided.default, (list(value.shape), list(value.stride())), said)
    made.meta["val"] = value
    return made


def _without_unused(gm: GraphModule) -> list[str]:
    """Erase the memory that only a copy was to be written to which now has a place, and views of it; the names."""
    found = []
    for node in reversed(gm.graph.nodes):
        if node.target in _UNWRITTEN and not node.users:
            found.append(node.name)
            gm.graph.erase_node(node)
    return found


class _Inputs:
    """Further inputs of a graph, behind those that it has."""

    def __init__(self, gm: GraphModule) -> None:
        self._graph = gm.graph
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._last = placeholders[-1] if placeholders else gm.graph._root
        self.layouts: list[Layout] = []

    def add(self, layout: Layout, value: Tensor | None = None) -> Node:
        """One more, laid out so."""
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(f"buffer_{len(self.layouts)}")
        if value is not None:
            self._last.meta["val"] = value
        self.layouts.append(layout)
        return self._last


def _layouts_of(gm: GraphModule, pieces: Sequence[Donated]) -> list[Inside]:
    nodes = gm.graph.find_nodes(op="placeholder")
    return [
        Inside(tuple((number, layout(piece.memory.name, nodes[number].meta["val"])) for number in piece.inputs))
        for piece in pieces
    ]


def _fill(cat: Node, place: Node, slices: Mapping[int, Layout], inputs: _Inputs) -> None:
    """Put the other operands of a cat into its buffer, and take the buffer for the cat."""
    operands, dim = cat.args[0], cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    assert isinstance(operands, (tuple, list))
    assert isinstance(dim, int)
    whole, start = inputs.layouts[-1], 0
    for number, operand in enumerate(operands):
        assert isinstance(operand, Node)
        value = operand.meta["val"]
        shape = tuple(map(expression, value.shape))
        if number not in slices:
            part = replace(whole, shape=shape, offset=whole.offset + start * whole.stride[dim])
            into = inputs.add(part, value)
            with cat.graph.inserting_before(cat):
                cat.graph.call_function(aten.copy_.default, (into, operand)).meta["val"] = value
        start = start + shape[dim]
    cat.replace_all_uses_with(place)
    cat.graph.erase_node(cat)


def _workspaces(gm: GraphModule, lifetimes: Lifetimes, workspace: Workspaces, symbols: Symbols) -> dict[str, Buffer]:
    """By the name of the node: what operators need besides their results."""
    steps, hints = {name: step for step, name in enumerate(lifetimes.nodes)}, {symbol: hint for _, symbol, hint in symbols}
    found: dict[str, Buffer] = {}
    for node in gm.graph.nodes:
        if node.name not in steps or workspace_form(node) is None or lifetimes.lost(node):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda held: held.meta.get("val"))
        size = sympy.sympify(workspace(node.target, args, kwargs))
        if not size.free_symbols <= hints.keys():
            continue
        hint, step = int(size.subs(hints)), steps[node.name]
        if hint:
            device = str(node.all_input_nodes[0].meta["val"].device)
            own = Buffer(f"{node.name}.workspace", size, step, step, hint, device, module=module_path(node))
            if travels(node):
                own = replace(own, end=lifetimes.arrivals[node.name], lane="communication", role="send")
            found[node.name] = own
    return found


def _with_workspaces(gm: GraphModule, workspaces: Mapping[str, Buffer], inputs: _Inputs) -> None:
    """Give those operators their workspace whose results are not planned."""
    for node in list(gm.graph.nodes):
        form = workspace_form(node) if node.name in workspaces and "workspace" not in node.kwargs else None
        if form is not None:
            node.target, node.kwargs = form, {**node.kwargs, "workspace": inputs.add(_bytes(workspaces[node.name]))}


def _bytes(buffer: Buffer) -> Layout:
    return Layout(buffer.name, torch.uint8, (buffer.size,), (1,))


def _symbols(gm: GraphModule) -> Symbols:
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [(number, node.meta.get("val")) for number, node in enumerate(inputs)]
    found = [(number, value.node.expr, value.node.hint) for number, value in values if isinstance(value, torch.SymInt)]
    # Data decides a length without a hint.
    return tuple((number, expr, int(hint)) for number, expr, hint in found if isinstance(expr, sympy.Symbol) and hint is not None)
