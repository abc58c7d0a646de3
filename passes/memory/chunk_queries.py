"""Attention whose queries come in chunks, so that a bias which the graph computes is there for the rows of one chunk at a time.

Each row of attention is computed by itself, so the numbers stay what they were; dropout is drawn by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dilcompile.forms import BlockSparse, parse_form
from dilcompile.passes.axes.along import argument
from dilcompile.passes.graph.copies import copied
from dilcompile.passes.graph.operators import MOVES_ONLY, is_tensor, op_name, shape_of
from dilcompile.passes.graph.provenance import module_path
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.memory.chunk_gradients import Shares, course_of
from dilcompile.passes.memory.growing import Growing, fake_mode_of, put_in_order
from dilcompile.passes.memory.rows import Rows
from dilcompile.passes.memory.rows_of import RowsOf, view_of
from dilcompile.relation import Problem

aten = torch.ops.aten

# Borders of chunks are multiples of it: blocks of kernels and of patterns begin there.
LEAST_ROWS = 256
# The operands that have a number, or several, for each row, and the dim of the rows, counted from the back.
_BY_ROW = {"q": -2, "bias": -2, "row_limits": -1, "row_terms": -1, "grad_out": -2, "grad_lse": -1, "out": -2, "lse": -1}
# Those that kernels read without strides; a copy of which the graph knows is one that is counted.
_DENSE = ("lse", "grad_lse")
# Its place among the results of the backward.
_GRAD_BIAS = 3


@dataclass(frozen=True)
class Chunked:
    """What became of a graph.

    Args:
        gm: the graph with attentions in chunks; None: there are none that could be.
        whys: of those with a bias over pairs that are not, the reasons.
    """

    gm: GraphModule | None
    whys: tuple[str, ...] = ()


def chunk_queries(gm: GraphModule, rows: int) -> Chunked:
    """Let attentions with a bias over pairs take so many queries at a time, forward and backward, in a copy of the graph.

    Args:
        gm: an ATen graph with fake values: one for inference, or a joint graph.
        rows: a multiple of 256.
    """
    # By the name of the bias: if one of the calls that read it is left whole, it is there whole.
    whys: dict[str, str] = {}
    while True:
        work = _Work(copied(gm), rows, whys)
        before = len(whys)
        number = work.run()
        if len(whys) == before:
            return Chunked(work.gm if number else None, tuple(dict.fromkeys(whys.values())))


def chunk_sizes(gm: GraphModule) -> Iterator[int]:
    """How many queries there may be at once: about half of all, half of that, down to 256."""
    lengths = (shape_of(argument(call, "q"))[2] for call in _attentions(gm) if has_pairs(call))
    rows = max((int(length if isinstance(length, int) else length.node.hint) for length in lengths), default=0) // 2
    before = None
    while rows > LEAST_ROWS // 2:
        # The nearest: of 530 queries 512 would be nearly all.
        nearest = (rows + LEAST_ROWS // 2) // LEAST_ROWS * LEAST_ROWS
        if nearest != before:
            yield nearest
        before, rows = nearest, rows // 2


def _attentions(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.dilcompile.attention.default))


def _backwards(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.dilcompile.attention_backward.default))


def has_pairs(call: Node) -> bool:
    """Does the graph compute a bias for each pair of a query and a key?"""
    bias = argument(call, "bias")
    if not is_tensor(bias) or len(shape_of(bias)) < 2 or any(same_size(size, 1) for size in shape_of(bias)[-2:]):
        return False
    while bias.op == "call_function" and _is_view(bias):
        bias = bias.all_input_nodes[0]
    return bool(bias.op == "call_function")


def _is_view(node: Node) -> bool:
    return op_name(node) in MOVES_ONLY and bool(node.target._schema.returns[0].alias_info)  # type: ignore[union-attr]


def why_whole(call: Node) -> str | None:
    """Why the attention can't be computed for some of its queries alone, or None."""
    q, k, v, offset = (argument(call, name) for name in ("q", "k", "v", "q_offset"))
    sizes = [size for operand in (q, k, v, argument(call, "bias")) for size in shape_of(operand)]
    if not all(isinstance(size, int) for size in (*sizes, offset)):
        return "its lengths are known only when the graph runs"
    if argument(call, "pages") is not None:
        return "its keys are in pages"
    form = parse_form(argument(call, "form"))
    if isinstance(form, BlockSparse) and form.curve is not None and form.curve.moves:
        return "its tokens are in the order of a curve"
    if argument(call, "block_columns") is not None or form.relation(_problem(q, k, v)).is_bound:
        return "its blocks are chosen from all of its queries"
    return None


def _problem(q: Node, k: Node, v: Node) -> Problem:
    (batch, heads, rows, dim), (_, kv_heads, keys, _) = shape_of(q), shape_of(k)
    return Problem(batch, heads, kv_heads, rows, keys, dim, shape_of(v)[3])  # type: ignore[arg-type]


class _Work:
    """One try: the calls whose bias is in ``whys`` stay whole, and those that turn out to have to be are put there."""

    def __init__(self, gm: GraphModule, rows: int, whys: dict[str, str]) -> None:
        self.gm, self.rows, self.whys = gm, rows, whys
        mode = fake_mode_of(gm.graph)
        assert mode is not None, "the graph has fake values"
        self.mode = mode

    def run(self) -> int:
        """Put all chunks in their places; how many calls they stand for."""
        graph = self.gm.graph
        forwards = [call for call in _attentions(self.gm) if self._fits(call)]
        backwards = [call for call in _backwards(self.gm) if self._fits(call)]
        gradients = {call: self._gradient(call) for call in backwards}
        course = course_of(graph, {source: _keys(call) for call, source in gradients.items() if source is not None})
        for call, source in gradients.items():
            if source in course.whys:
                self._refuse(call, course.whys[source])
        shares = Shares(course, tuple(node for node in graph.nodes if node in course.rows or node in course.ends))
        grown = [Growing(graph, self.mode, call) for call in (*forwards, *backwards)]
        for call, grow in zip(forwards, grown, strict=False):
            self._refuse(call, _forward(call, self.rows, grow))
        for call, grow in zip(backwards, grown[len(forwards) :], strict=True):
            if self._name(call) not in self.whys:
                self._refuse(call, _backward(call, self.rows, grow, gradients[call], shares))
        if grown:
            shares.settle(graph, grown[0])
        put_in_order(graph)
        graph.eliminate_dead_code()
        graph.lint()
        self.gm.recompile()
        return len(grown)

    def _fits(self, call: Node) -> bool:
        if not has_pairs(call) or self._name(call) in self.whys:
            return False
        why = why_whole(call)
        self._refuse(call, why)
        return why is None and int(shape_of(argument(call, "q"))[2]) > self.rows

    def _refuse(self, call: Node, why: str | None) -> None:
        if why is not None:
            place = module_path(call) or "the graph"
            self.whys.setdefault(self._name(call), f"attention of {place} takes no chunks of queries: {why}")

    def _name(self, call: Node) -> str:
        return str(argument(call, "bias").name)

    def _gradient(self, call: Node) -> Node | None:
        """The gradient of the bias; None if nobody reads one."""
        return next((user for user in call.users if user.args[1] == _GRAD_BIAS and user.users), None)


def _keys(call: Node) -> int:
    return int(shape_of(argument(call, "k"))[2])


def _forward(call: Node, rows: int, grow: Growing) -> str | None:
    """Put calls for chunks in the place of one call, or say why not."""
    outs, lses = list[Node](), list[Node]()
    before = (argument(call, "q"),)
    for chunk in _chunks(call, rows):
        made = _chunk_of(call, chunk, _over(call, grow, before), {})
        if isinstance(made, str):
            return made
        out, lse = (grow.call(getitem, (made, number), {}, call) for number in range(2))
        # In memory rows come before heads.
        outs.append(grow.call(aten.permute.default, (out, (0, 2, 1, 3)), {}, call))
        lses.append(lse)
        before = (lse,)
    _replace(call, {0: _joined(outs, call, grow), 1: grow.call(aten.cat.default, (lses, 2), {}, call)})
    return None


def _backward(call: Node, rows: int, grow: Growing, gradient: Node | None, shares: Shares) -> str | None:
    """The same for the backward of a call; the gradient of its bias goes on chunk by chunk."""
    queries = list[Node]()
    keys_values: list[Node] | None = None
    before: tuple[Node, ...] = (argument(call, "grad_out"),)
    changed = {} if gradient is not None else {"bias_grad": False}
    for chunk in _chunks(call, rows):
        over = _over(call, grow, before)
        made = _chunk_of(call, chunk, over, changed)
        if isinstance(made, str):
            return made
        grads = [grow.call(getitem, (made, number), {}, call) for number in range(4)]
        queries.append(grow.call(aten.permute.default, (grads[0], (0, 2, 1, 3)), {}, call))
        keys_values = [
            grow.wide_sum(held, grad, call) for held, grad in zip(keys_values or (None, None), grads[1:3], strict=True)
        ]
        before = (grads[0], *keys_values)
        if gradient is not None:
            own = Rows(len(shape_of(gradient)) - 2, chunk.start, chunk.stop)
            ends = shares.add(gradient, grads[_GRAD_BIAS], own, over)
            if isinstance(ends, str):
                return ends
            before = (*before, *ends)
    assert keys_values is not None, "there are chunks"
    why = shares.end_of_call(grow)
    dtypes = [argument(call, name).meta["val"].dtype for name in ("k", "v")]
    summed = {1 + number: grow.cast(held, dtypes[number]) for number, held in enumerate(keys_values)}
    _replace(call, {0: _joined(queries, call, grow), **summed, _GRAD_BIAS: gradient})
    return why


def _chunks(call: Node, rows: int) -> list[Rows]:
    """The rows of each chunk of [.., rows, dim]."""
    length = int(shape_of(argument(call, "q"))[2])
    return [Rows(2, start, min(start + rows, length)) for start in range(0, length, rows)]


def _over(call: Node, grow: Growing, before: tuple[Node, ...]) -> RowsOf:
    return RowsOf(grow, _keys(call), prod(map(int, shape_of(argument(call, "q")))), before)


def _joined(parts: list[Node], call: Node, grow: Growing) -> Node:
    """[B, H, S, D], in memory [B, S, H, D], from parts [B, rows, H, D]."""
    return grow.call(aten.permute.default, (grow.call(aten.cat.default, (parts, 1), {}, call), (0, 2, 1, 3)), {}, call)


def _replace(call: Node, results: Mapping[int, Node | None]) -> None:
    """Let these stand for the elements of what a call gives."""
    for user in list(call.users):
        made = results[int(user.args[1])]  # type: ignore[arg-type]
        if made is not None and made is not user:
            user.replace_all_uses_with(made)


def _chunk_of(call: Node, chunk: Rows, over: RowsOf, further: Mapping[str, Any]) -> Node | str:
    """The call for some of its queries, or why there is none."""
    changed: dict[str, Any] = {"q_offset": argument(call, "q_offset") + chunk.start, **further}
    for name, back in _BY_ROW.items():
        operand = argument(call, name)
        if not is_tensor(operand):
            continue
        rows = Rows(len(shape_of(operand)) + back, chunk.start, chunk.stop)
        if shape_of(operand)[rows.dim] == 1:
            continue
        # What is not a bias is there whole anyway.
        made = over.of(operand, rows) if name == "bias" else view_of(over.grow, operand, rows)
        if isinstance(made, str):
            return made
        if name in _DENSE:
            made = over.grow.call(aten.clone.default, (made,), {"memory_format": torch.contiguous_format}, call)
        changed[name] = made
    args, kwargs = _with(call, changed)
    return over.grow.call(call.target, args, kwargs, call)


def _with(call: Node, changed: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments, some of them others."""
    args, kwargs = list(call.args), dict(call.kwargs)
    for number, each in enumerate(call.target._schema.arguments):  # type: ignore[union-attr]
        if each.name not in changed:
            continue
        if number < len(args):
            args[number] = changed[each.name]
        else:
            kwargs[each.name] = changed[each.name]
    return args, kwargs
