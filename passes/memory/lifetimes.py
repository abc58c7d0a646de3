"""When each buffer of a graph is live: which node makes its memory, which is the last to read it, through views too.

Read off an ATen graph with fake values (what AOTAutograd gives the inner compiler: a forward, a backward, or one for inference).
A step is a node that computes, or that waits for what travels; views take none.

Note [Under way]
A collective ends at its wait, not where its node does: until then others write its result. It is live from the collective to its
last reader, and at least to the wait. The same is true of what it reads, unless it packs that first, as ours do: then the message
is a workspace from the collective to the wait. What is never waited for in the graph is under way to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeGuard

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dilcompile.memory import Buffer
from dilcompile.memory.buffer import Role
from dilcompile.passes.graph.provenance import module_path

_OURS = "dilcompile::"
_WAIT = "_c10d_functional::wait_tensor"
# What gives back the memory of its argument, though its schema doesn't say so.
_SAME = (_WAIT, "aten::_unsafe_view")
# What travels while other nodes compute.
_SENT = ("_c10d_functional::",)
# Of these, what reads its operands no more when it has started.
_PACKED = (
    "_c10d_functional::dilcompile_exchange",
    "_c10d_functional::dilcompile_exchange_equal",
    "_c10d_functional::dilcompile_gather",
)


@dataclass
class Lifetimes:
    """The buffers of a graph.

    Args:
        buffers: made and given up inside the graph: these can be planned.
        held: bytes by name of what outlives the graph or was there before: inputs, outputs, saved tensors. Never planned.
        nodes: the name of the node of each step.
        kept: of ``held`` what the graph makes: outputs and saved tensors, from the step that makes them to the last one.
        given: of ``held`` what was there before, from step 0 to its last reader.
        outputs: for each output of the graph the name of what holds its memory; None for what is no tensor.
        memory: the names of the buffers in which the value of a node lies, by the node's name; views have those of their source.
        arrivals: of each buffer that travels: the step that waits for it. Missing: nothing in the graph does.
    """

    buffers: list[Buffer] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    kept: list[Buffer] = field(default_factory=list)
    given: list[Buffer] = field(default_factory=list)
    outputs: tuple[str | None, ...] = ()
    memory: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arrivals: dict[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many nodes compute or wait."""
        return len(self.nodes)

    def lost(self, node: Node) -> bool:
        """Is the node a collective that nothing in the graph waits for?"""
        return travels(node) and node.name not in self.arrivals


@dataclass
class _Storage:
    name: str
    size: int | sympy.Expr
    hint: int
    begin: int
    end: int
    node: Node
    held: bool = False


def lifetimes_of(gm: GraphModule, *, ours_only: bool = False) -> Lifetimes:
    """The lifetimes of a graph's buffers.

    Args:
        gm: nodes carry fake values (``meta["val"]``).
        ours_only: leave out what other operators make (where Inductor plans those itself).
    """
    walk = _Walk()
    for node in gm.graph.nodes:
        walk.visit(node)
    walk.land()
    found = Lifetimes(nodes=tuple(walk.nodes), outputs=tuple(walk.outputs), memory=walk.memory(), arrivals=walk.arrivals)
    for storage in walk.storages.values():
        if ours_only and not _is_ours(storage.node):
            continue
        if not storage.held:
            found.buffers.append(_buffer(storage))
            continue
        found.held[storage.name] = storage.hint
        if storage.node.op == "call_function":
            found.kept.append(replace(_buffer(storage), end=max(storage.begin, walk.step - 1)))
        else:
            found.given.append(_buffer(storage))
    return found


def makers(gm: GraphModule) -> Iterator[tuple[Node, list[tuple[str, Tensor]]]]:
    """Each node that makes memory, with the name and the value of each buffer that it makes."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and not _is_view(node):
            made = list(_named(node))
            if made:
                yield node, made


class _Walk:
    """The nodes in order: who makes which storage, and who reads it."""

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.storages: dict[int, _Storage] = {}
        self.outputs: list[str | None] = []
        self.arrivals: dict[str, int] = {}
        # By the result of a collective: what travels with it.
        self._under_way: dict[int, tuple[int, ...]] = {}
        self._of_node: dict[Node, tuple[int, ...]] = {}
        self._numbers = 0

    @property
    def step(self) -> int:
        """The number of the next node that computes."""
        return len(self.nodes)

    def memory(self) -> dict[str, tuple[str, ...]]:
        """See ``Lifetimes``."""
        return {node.name: tuple(self.storages[key].name for key in keys) for node, keys in self._of_node.items()}

    def visit(self, node: Node) -> None:
        """One node more."""
        if node.op in ("placeholder", "get_attr"):
            self._of_node[node] = self._made(node, held=True)
            return
        read = [key for argument in node.all_input_nodes for key in self._of_node.get(argument, ())]
        if node.op == "output":
            for key in read:
                self.storages[key].held = True
            for result in _results(node):
                keys = self._of_node.get(result, ()) if isinstance(result, Node) else ()
                self.outputs.append(self.storages[keys[0]].name if keys else None)
            return
        if _is_view(node):
            self._of_node[node] = self._viewed(node)
            if _writes(node):
                self._read(read)
                self.nodes.append(node.name)
            if _operator(node) == _WAIT:
                self._wait(read)
                self.nodes.append(node.name)
            return
        self._read(read)
        made = self._made(node, held=False)
        # A tensor of another layout holds its parts, which its operands may be, and says nothing of them.
        self._of_node[node] = (*made, *read) if _has_parts(node) else made
        if travels(node):
            sent = () if _operator(node) in _PACKED else tuple(read)
            self._under_way.update((key, (key, *sent)) for key in made)
        self.nodes.append(node.name)

    def _read(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.storages[key].end = self.step

    def _wait(self, read: Sequence[int]) -> None:
        for key in read:
            for other in self._under_way.pop(key, (key,)):
                self.storages[other].end = self.step
            self.arrivals.setdefault(self.storages[key].name, self.step)

    def land(self) -> None:
        """The graph ends, and what nothing waits for is still under way."""
        for keys in self._under_way.values():
            for key in keys:
                self.storages[key].end = max(0, self.step - 1)

    def _viewed(self, node: Node) -> tuple[int, ...]:
        source = self._of_node.get(node.all_input_nodes[0], ())
        if _is_getitem(node) and isinstance(node.args[1], int) and not _is_view(node.all_input_nodes[0]):
            # One storage for each element that is a tensor.
            places = _elements(node.all_input_nodes[0])
            return (source[places.index(node.args[1])],) if node.args[1] in places else ()
        return source

    def _made(self, node: Node, held: bool) -> tuple[int, ...]:
        keys = []
        for name, value in _named(node):
            size = value.untyped_storage().nbytes()
            expression = size.node.expr if isinstance(size, torch.SymInt) else int(size)
            self.storages[self._numbers] = _Storage(name, expression, _hint(size), self.step, self.step, node, held)
            keys.append(self._numbers)
            self._numbers += 1
        return tuple(keys)


def _results(node: Node) -> Sequence[object]:
    """What an output node gives, in order."""
    (given,) = node.args
    return given if isinstance(given, (tuple, list)) else (given,)


def _named(node: Node) -> Iterator[tuple[str, Tensor]]:
    for number, value in enumerate(_tensors(node.meta.get("val"))):
        yield node.name if number == 0 else f"{node.name}.{number}", value


def _hint(size: int | torch.SymInt) -> int:
    """The size at the example; 0 where data decides it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return 0 if size.node.hint is None else int(size.node.hint)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [item for item in value if _has_storage(item)]
    return [value] if _has_storage(value) else []


def _has_storage(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _has_parts(node: Node) -> bool:
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(item, Tensor) and not _has_storage(item) for item in items)


def _elements(node: Node) -> Sequence[int]:
    """Which elements of a tuple are tensors."""
    value = node.meta.get("val")
    assert isinstance(value, (tuple, list)), "getitem takes an element of a tuple"
    return [number for number, item in enumerate(value) if _has_storage(item)]


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _operator(node: Node) -> str:
    return _name_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


@cache
def _name_of(op: torch._ops.OpOverload) -> str:
    return str(op._schema.name)


@cache
def _aliases(op: torch._ops.OpOverload) -> bool:
    """Does the operator say that a result is memory of an operand?"""
    return any(returned.alias_info is not None for returned in op._schema.returns)


def _is_view(node: Node) -> bool:
    """Does the node give memory that is there already?"""
    if _is_getitem(node):
        # An operator that runs another one may not say what it returns: its elements do.
        return "val" in node.all_input_nodes[0].meta
    if _operator(node) in _SAME:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return _aliases(node.target) or _shares_memory(node)


def _writes(node: Node) -> bool:
    """Does the operator change an operand, so that it is more than a view?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _shares_memory(node: Node) -> bool:
    """Did the fake operator give back memory of an input?"""
    own = _storage_ids(node)
    return any(id_of in own for argument in node.all_input_nodes for id_of in _storage_ids(argument))


def _storage_ids(node: Node) -> list[int]:
    return [value.untyped_storage()._cdata for value in _tensors(node.meta.get("val"))]


def travels(node: Node) -> bool:
    """Does others' work go on in the node's result until a wait?"""
    return _operator(node).startswith(_SENT)


def _is_ours(node: Node) -> bool:
    return _operator(node).startswith((_OURS, *_SENT))


def _role(node: Node) -> Role:
    operator = _operator(node)
    if travels(node) and not operator.endswith("return_gradients"):
        return "receive"
    if operator.endswith(("_backward", "return_gradients")):
        return "gradient"
    return "output" if operator.startswith(_OURS) else "workspace"


def _buffer(storage: _Storage) -> Buffer:
    node = storage.node
    value = _tensors(node.meta.get("val"))[0]
    return Buffer(
        name=storage.name,
        size=storage.size,
        begin=storage.begin,
        end=storage.end,
        hint=storage.hint,
        device=str(value.device),
        lane="communication" if travels(node) else "compute",
        role=_role(node),
        module=module_path(node),
    )
