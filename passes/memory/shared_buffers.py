"""Results that lie in the buffer of another one: in a slice of the ``cat`` that joins them, or over an operand that is dead.

Both save memory that is live at once, which no packing can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from dilcompile.memory import Buffer
from dilcompile.passes.memory.lifetimes import Lifetimes
from dilcompile.passes.memory.out_forms import OutForm

aten = torch.ops.aten
Size: TypeAlias = "int | sympy.Expr"
Made: TypeAlias = "tuple[Node, OutForm, list[tuple[str, Tensor]]]"

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_ALIASES = (aten.alias.default, aten.detach.default)
# How many steps a cat's buffer may be live before it, for each of its operands.
_EARLY = 2


@dataclass(frozen=True)
class Layout:
    """How a buffer, or a part of it, is seen as a tensor; sizes, strides and offset, in elements, may be expressions."""

    buffer: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size = 0

    def of(self, memory: Tensor, lengths: Mapping[sympy.Symbol, int]) -> Tensor:
        """The tensor in ``memory``, uint8, at the buffer's place."""
        shape, stride = ([at(size, lengths) for size in sizes] for sizes in (self.shape, self.stride))
        seen = memory.view(self.dtype)
        return seen.as_strided(shape, stride, int(seen.storage_offset()) + at(self.offset, lengths))


@dataclass
class Homes:
    """Where results lie.

    Args:
        buffers: by name; what lies in another one's buffer is not among them.
        layouts: of each result, by its name.
        slices: by the name of a cat: the layouts of those of its operands, by number, that are written where the cat has them.
    """

    buffers: dict[str, Buffer]
    layouts: dict[str, Layout]
    slices: dict[str, dict[int, Layout]] = field(default_factory=dict)


def share(made: Sequence[Made], lifetimes: Lifetimes) -> Homes:
    """Give each result of these nodes, all of them planned, its home."""
    live = {buffer.name: buffer for buffer in lifetimes.buffers}
    homes = Homes(
        {name: live[name] for _, _, results in made for name, _ in results},
        {name: layout(name, value) for _, _, results in made for name, value in results},
    )
    makers = {name: (node, form) for node, form, results in made for name, _ in results}
    for node, _, results in made:
        if node.target is aten.cat.default:
            _join(node, results[0][0], homes, makers, lifetimes)
    _overwrite(made, homes, lifetimes)
    return homes


def _join(cat: Node, name: str, homes: Homes, makers: Mapping[str, tuple[Node, OutForm]], lifetimes: Lifetimes) -> None:
    """Put operands of a cat where the cat has them, if they are made for it alone."""
    operands, whole = cat.args[0], homes.layouts[name]
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    assert isinstance(operands, (tuple, list))
    assert isinstance(dim, int)
    if not all(isinstance(x, Node) and x.meta["val"].dim() == len(whole.shape) for x in operands):
        return
    start: Size = 0
    found: dict[int, Layout] = {}
    taken: list[str] = []
    for number, operand in enumerate(operands):
        assert isinstance(operand, Node)
        shape = tuple(map(expression, operand.meta["val"].shape))
        part = Layout(name, whole.dtype, shape, whole.stride, whole.offset + start * whole.stride[dim])
        start = start + shape[dim]
        source = _made_for(operand, part, makers, homes, lifetimes)
        if source is None or homes.buffers[name].begin - homes.buffers[source.buffer].begin > _EARLY * len(operands):
            continue
        homes.layouts[source.buffer] = replace(source, buffer=name)
        taken.append(source.buffer)
        found[number] = part
    if not found:
        return
    first = min(homes.buffers.pop(own).begin for own in taken)
    homes.buffers[name] = replace(homes.buffers[name], begin=first)
    homes.slices[name] = found


def _made_for(
    operand: Node, part: Layout, makers: Mapping[str, tuple[Node, OutForm]], homes: Homes, lifetimes: Lifetimes
) -> Layout | None:
    """How the result behind an operand would lie if the operand lay in ``part``; None if it can't, or others read it."""
    held = lifetimes.memory.get(operand.name, ())
    if len(held) != 1 or held[0] not in homes.buffers or operand.meta["val"].dtype != part.dtype:
        return None
    name = held[0]
    maker, form = makers[name]
    if not form.anywhere:
        return None
    at_node, stride = operand, part.stride
    while len(at_node.users) == 1:
        several = isinstance(maker.meta["val"], (tuple, list))
        if at_node is maker or (several and at_node.all_input_nodes == [maker]):
            value = at_node.meta["val"]
            own = homes.layouts[name]
            whole = own.buffer == name and own.offset == 0 and same(prod_of(own.shape), prod_of(part.shape))
            return Layout(name, part.dtype, tuple(map(expression, value.shape)), stride, part.offset) if whole else None
        before = at_node.all_input_nodes
        found = _stride_before(at_node, stride) if len(before) == 1 else None
        if found is None:
            return None
        at_node, stride = before[0], found
    return None


def _stride_before(view: Node, stride: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """The strides of what is viewed, where those of the view are given."""
    source = view.all_input_nodes[0].meta["val"]
    if view.target in _ALIASES:
        return stride
    if view.target is aten.permute.default:
        dims = view.args[1]
        assert isinstance(dims, (tuple, list))
        order = [int(dim) % source.dim() for dim in dims]  # type: ignore[arg-type]
        return tuple(stride[order.index(dim)] for dim in range(source.dim()))
    if view.target is aten.transpose.int:
        one, other = (int(dim) % source.dim() for dim in view.args[1:3])  # type: ignore[arg-type]
        swapped = list(stride)
        swapped[one], swapped[other] = stride[other], stride[one]
        return tuple(swapped)
    if view.target in _VIEWS:
        before, after = (tuple(map(expression, x.shape)) for x in (source, view.meta["val"]))
        return unviewed(before, after, stride)
    return None


def unviewed(source: tuple[Size, ...], shape: tuple[Size, ...], stride: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """The strides with which ``source`` is seen as ``shape`` without a copy, given those of ``shape``; None if there are none."""
    found: list[Size] = [1] * len(source)
    i, j = len(source) - 1, len(shape) - 1
    while True:
        while i >= 0 and source[i] == 1:
            i -= 1
        while j >= 0 and shape[j] == 1:
            j -= 1
        if i < 0 or j < 0:
            return tuple(found) if i < 0 and j < 0 else None
        last = stride[j]
        group = _group(source[: i + 1], shape[: j + 1])
        if group is None:
            return None
        count, wide = group
        # Dims that are joined lie without gaps.
        joined = range(j - wide + 1, j + 1)
        if any(shape[n] != 1 and not same(stride[n], last * prod_of(shape[n + 1 : j + 1])) for n in joined):
            return None
        for n in range(i, i - count, -1):
            found[n] = last
            last = last * source[n]
        i, j = i - count, j - wide


def _group(source: tuple[Size, ...], shape: tuple[Size, ...]) -> tuple[int, int] | None:
    """How many of the last dims of each have the same product: the fewest."""
    for total in range(2, len(source) + len(shape) + 1):
        for count in range(1, total):
            wide = total - count
            if count <= len(source) and wide <= len(shape) and same(prod_of(source[-count:]), prod_of(shape[-wide:])):
                return count, wide
    return None


def _overwrite(made: Sequence[Made], homes: Homes, lifetimes: Lifetimes) -> None:
    """Let results lie over operands that are read for the last time."""
    steps = {name: step for step, name in enumerate(lifetimes.nodes)}
    for node, form, results in made:
        if not form.by_element or len(results) != 1 or results[0][0] not in homes.buffers:
            continue
        name, value = results[0]
        own = homes.layouts[name]
        for operand in node.all_input_nodes:
            under = _under(operand, node, homes, lifetimes)
            if under is None or under.buffer == name or not alike(operand, value, node, lifetimes):
                continue
            below = homes.buffers[under.buffer]
            if below.end != steps[node.name] or not same(below.size, homes.buffers[name].size):
                continue
            homes.buffers[under.buffer] = replace(below, end=homes.buffers[name].end)
            homes.layouts[name] = replace(own, buffer=under.buffer)
            del homes.buffers[name]
            break


def _under(operand: Node, node: Node, homes: Homes, lifetimes: Lifetimes) -> Layout | None:
    """The layout of what an operand lies in, if that is all of a planned buffer."""
    held = lifetimes.memory.get(operand.name, ())
    found = homes.layouts.get(held[0]) if len(held) == 1 else None
    if found is None or found.offset != 0 or found.buffer not in homes.buffers:
        return None
    # What stays in the communication lane is what travels.
    return found if homes.buffers[found.buffer].lane == "compute" else None


def alike(operand: Node, value: Tensor, node: Node, lifetimes: Lifetimes) -> bool:
    """Does each operand in the memory of this one have the elements at the places at which the result has them?"""
    memory = lifetimes.memory[operand.name]
    for other in node.all_input_nodes:
        if lifetimes.memory.get(other.name) != memory:
            continue
        seen = other.meta["val"]
        sizes = ((seen.shape, value.shape), (seen.stride(), value.stride()))
        if seen.dtype != value.dtype or seen.dim() != value.dim() or not same(expression(seen.storage_offset()), 0):
            return False
        if not all(same(expression(a), expression(b)) for one, two in sizes for a, b in zip(one, two, strict=True)):
            return False
    return True


def layout(name: str, value: Tensor) -> Layout:
    """How a tensor is laid out that has a buffer for itself."""
    return Layout(name, value.dtype, *(tuple(map(expression, sizes)) for sizes in (value.shape, value.stride())))


def expression(size: int | torch.SymInt) -> Size:
    """A size as a number or an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def at(size: Size, lengths: Mapping[sympy.Symbol, int]) -> int:
    """A size where the symbols have these values."""
    return size if isinstance(size, int) else int(size.subs(lengths))


def prod_of(sizes: Sequence[Size]) -> Size:
    """The product of sizes."""
    return prod(sizes, start=1)


def same(one: Size, other: Size) -> bool:
    """Are two sizes equal whatever the lengths?"""
    return bool(one == other) or (not (isinstance(one, int) and isinstance(other, int)) and sympy.expand(one - other) == 0)
