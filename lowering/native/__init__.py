"""The native CPU kernel: the whole relation in one pass of compiled code, straight from the model's layout.

Queries that see the same keys are computed together; a key that several branches hold is computed once and counted. One
running softmax per query, no output per branch, nothing gathered but the block of keys at hand. See README.md beside it.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dilcompile.blocks.heads import kind_of_head
from dilcompile.generators import Blocks, Everything, Segment, Sinks, Window
from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Gradients, bias_gradient_of, lse_of, output_of
from dilcompile.lowering.native import huge_pages
from dilcompile.lowering.native.build import (
    BIAS_DTYPES,
    ELEMENTS,
    NO_LIMIT,
    CallStruct,
    Library,
    OperandStruct,
    SquareStruct,
    TermStruct,
    library,
    made_from,
)
from dilcompile.lowering.native.workspace import workspace_bytes as workspace_bytes
from dilcompile.lowering.selection import Selection, adaptive_blocks
from dilcompile.lowering.union import beyond_union
from dilcompile.progression import Positions
from dilcompile.relation import Problem, Relation, grid_of

TAKES_ROW_MASKS = True
# Queries lie in the lanes of vectors: with fewer most of the work would be for nobody.
LEAST_ROWS = 16

_MOST_POSITIONS = 2**31 - 1
# How many values a draw of dropout.py may have.
_DRAWS = 2**32


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; the source names the processor that it is compiled for."""
    return f"{digest.of_files('native')}, {made_from(call.q.dtype)}"


def supports(call: Call, backward: bool) -> str | None:
    """See ``Kernel``."""
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device}, not on a CPU"
    if call.q.dtype not in ELEMENTS:
        return f"dtype {call.q.dtype}"
    if _least_draw(call.dropout_p) >= _DRAWS:
        return f"dropout of {call.dropout_p}, which keeps nothing"
    if call.bias is not None and call.bias.dtype not in BIAS_DTYPES:
        return f"a bias of dtype {call.bias.dtype}"
    size = call.problem
    queries, keys = call.places
    if max(size.k_len, keys.stop, abs(queries.start) + queries.stop - queries.start) > _MOST_POSITIONS:
        return f"{size.k_len} keys and {size.q_len} queries from {size.q_offset}: positions are held in 32 bits"
    reason = beyond_union(call, backward) or _unequal_counts(call.relation)
    if reason is not None:
        return reason
    built = library(call.q.dtype)
    return built if isinstance(built, str) else None


def _unequal_counts(relation: Relation) -> str | None:
    """A window that other terms are added to: how often a key counts would differ between queries of a group."""
    windows = [index for index, term in enumerate(relation.terms) if isinstance(term.generator, Window)]
    if not windows:
        return None
    added = [term for index, term in enumerate(relation.terms) if index >= max(1, windows[0]) and not term.dedupe]
    return "a window whose keys count beside those of other terms" if len(windows) > 1 or added else None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    out, lse = _result(call, 0, call.q, call.problem.v_dim), lse_of(call)
    bound = _bind(call, out, lse)
    _library(call).forward(bound.struct)
    return out, lse


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    bound = _bind(call, _dense_rows(out), lse.contiguous())
    grads = [_result(call, number, x, x.shape[-1]) for number, x in enumerate((call.q, call.k, call.v))]
    kept = _dense_rows(grad_out)
    bound.struct.grad_out = _operand(kept)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
        bound.struct.grad_lse = _operand(grad_lse)
    bound.struct.grad_q, bound.struct.grad_k, bound.struct.grad_v = (_operand(grad) for grad in grads)
    grad_bias = None
    if call.bias is not None and call.bias_grad:
        grad_bias = bias_gradient_of(call, call.bias)
        bound.struct.grad_bias = _square(grad_bias)
    _library(call).backward(bound.struct)
    return grads[0], grads[1], grads[2], None if grad_bias is None or call.bias is None else grad_bias.to(call.bias.dtype)


def _result(call: Call, number: int, like: Tensor, dim: int) -> Tensor:
    found = output_of(call, number, like, dim)
    # Memory that was there before has been touched.
    return huge_pages.advise(found) if call.room is None else found


class _Bound(NamedTuple):
    """The C structure, and what its addresses point into."""

    struct: CallStruct
    kept: tuple[object, ...]


def _bind(call: Call, out: Tensor, lse: Tensor) -> _Bound:
    size = call.problem
    queries, keys = call.places
    # The lists of blocks are those of all positions between the first query and the last.
    relation = call.relation.at(queries.stop - queries.start, size.k_len, queries.start)
    terms = _terms(relation, call.documents is not None) if call.selection is None else _selected(call, call.selection)
    q, k, v = (_dense_rows(x) for x in (call.q, call.k, call.v))
    padding = call.key_padding
    documents = None if call.documents is None else call.documents.to(torch.int64).contiguous()
    struct = CallStruct(
        size.batch, size.heads, size.kv_heads, size.q_len, size.k_len, size.head_dim, size.v_dim,
        queries.start, queries.step, keys.start, keys.stop, keys.step, k.shape[2],
        _limit(size.left), _limit(size.right), len(terms.structs), ctypes.addressof(terms.structs),
        *(_operand(x) for x in (q, k, v, out, lse)),
    )  # fmt: skip
    if padding is not None:
        struct.key_padding, struct.padding_batch, struct.padding_key = padding.data_ptr(), padding.stride(0), padding.stride(1)
    if documents is not None:
        struct.documents, struct.document_rows = documents.data_ptr(), documents.shape[0]
    limits = None if call.row_limits is None else call.row_limits.to(torch.int64).contiguous()
    if limits is not None:
        struct.row_limits, struct.limit_rows = limits.data_ptr(), limits.shape[1]
    if call.bias is not None:
        struct.bias, struct.bias_dtype = _square(call.bias), BIAS_DTYPES[call.bias.dtype]
    if call.dropout_p > 0:
        assert call.dropout_seed is not None, "dropout needs a seed"
        struct.dropout_seed, struct.dropout_least = int(call.dropout_seed), _least_draw(call.dropout_p)
        struct.dropout_factor = 1 / (1 - call.dropout_p)
        struct.dropout_head = 0 if call.held is None else call.held.first_head
    struct.scale, struct.softcap = call.scale, call.softcap or 0.0
    struct.threads, struct.exact_lse, struct.wide = torch.get_num_threads(), call.exact_lse, call.held is not None
    workspace = None if call.room is None else call.room.workspace
    if workspace is not None:
        struct.workspace, struct.workspace_size = workspace.data_ptr(), workspace.numel()
    return _Bound(struct, (q, k, v, out, lse, padding, documents, limits, call.bias, terms))


class _Terms(NamedTuple):
    structs: ctypes.Array[TermStruct]
    kept: tuple[object, ...]


@lru_cache(maxsize=256)
def _terms(relation: Relation, by_document: bool) -> _Terms:
    structs, kept = (TermStruct * len(relation.terms))(), list[object]()
    for struct, term in zip(structs, relation.terms, strict=True):
        generator = term.generator
        struct.dedupe = term.dedupe
        if isinstance(generator, Everything):
            struct.kind = 0
        elif isinstance(generator, Segment):
            struct.kind, struct.length, struct.rate = 1, generator.length, generator.rate
            struct.head_start, struct.head_stop = generator.heads or (0, relation.problem.heads)
            if generator.residues is not None:
                residues = (ctypes.c_int64 * len(generator.residues))(*generator.residues)
                struct.residues = ctypes.addressof(residues)
                kept.append(residues)
        elif isinstance(generator, Window):
            struct.kind, struct.step = 2, generator.step
            struct.left, struct.right = _limit(generator.left), _limit(generator.right)
        elif isinstance(generator, Blocks):
            kept += _list_blocks(struct, generator, relation.problem, by_document)
        else:
            assert isinstance(generator, Sinks), generator
            struct.kind, struct.count = 3, generator.count
    return _Terms(structs, tuple(kept))


def _selected(call: Call, selection: Selection) -> _Terms:
    """The one term of a relation of blocks that the data chooses: its lists without the places that are not taken."""
    blocks, structs = adaptive_blocks(call.relation), (TermStruct * 1)()
    assert blocks is not None, "a selection is made for blocks"
    there = torch.arange(selection.capacity) < selection.counts[..., None]
    columns = selection.columns[there]
    ends = selection.counts.flatten().cumsum(0, dtype=torch.int64).view(selection.counts.shape)
    starts = torch.cat([ends[..., :1] - selection.counts[..., :1], ends], -1).contiguous()
    batch, heads, lines = selection.counts.shape
    struct = structs[0]
    struct.kind, struct.q_block, struct.k_block = 4, blocks.grid.q_block, blocks.grid.k_block
    struct.first_line, struct.lines, struct.lists = max(0, call.problem.q_offset) // blocks.grid.q_block, lines, heads
    struct.batch_lists = heads if batch > 1 else 0
    struct.starts, struct.columns = starts.data_ptr(), columns.data_ptr()
    return _Terms(structs, (starts, columns))


def _least_draw(dropout_p: float) -> int:
    """The least draw that keeps a pair."""
    return round(dropout_p * _DRAWS)


def _list_blocks(struct: TermStruct, generator: Blocks, size: Problem, by_document: bool) -> list[object]:
    """Point ``struct`` to the blocks of each line; what is pointed to."""
    if by_document:
        # Positions count from the start of each document, which may be as long as the keys.
        size = replace(size, q_offset=0, q_len=size.k_len)
    grid = grid_of(size, generator.grid.q_block, generator.grid.k_block)
    kinds = [kind_of_head(generator.pattern, head) for head in range(size.heads if generator.pattern.by_head else 1)]
    starts, columns = list[Positions](), dict[object, npt.NDArray[np.int32]]()
    ends, first = dict[object, Positions](), 0
    for head, kind in enumerate(kinds):
        if kind not in columns:
            found = generator.lists(head, grid)
            ends[kind], columns[kind] = found.starts + first, found.blocks.astype(np.int32)
            first += len(found)
        starts.append(ends[kind])
    joined, listed, lines = np.concatenate(starts), np.concatenate([*columns.values()]), grid.rows
    struct.kind, struct.q_block, struct.k_block = 4, generator.grid.q_block, generator.grid.k_block
    struct.first_line, struct.lines, struct.lists = int(lines[0]) if len(lines) else 0, len(lines), len(kinds)
    struct.starts, struct.columns = joined.ctypes.data, listed.ctypes.data
    return [joined, listed]


def _limit(value: int | None) -> int:
    """A limit on the distance of two positions, which are less than 2^32 apart."""
    return NO_LIMIT if value is None else max(-(2**32), min(value, 2**32))


def _operand(x: Tensor) -> OperandStruct:
    """The address and strides of a [B, H, S, D] or [B, H, S] tensor."""
    return OperandStruct(x.data_ptr(), *x.stride()[:3])


def _square(x: Tensor) -> SquareStruct:
    """The address and strides of what broadcasts to [B, H, Sq, Sk]."""
    x = x[(None,) * (4 - x.dim())]
    return SquareStruct(x.data_ptr(), *(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _library(call: Call) -> Library:
    built = library(call.q.dtype)
    assert not isinstance(built, str), "supports() was not asked"
    return built
