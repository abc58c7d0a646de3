"""The Triton kernel: the whole relation in one launch, forward and backward, straight from the model's layout.

Tiles of queries of one residue class walk the keys of term after term with strided loads, under one running softmax. See
README.md beside it. Triton itself is imported when a call is first computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Gradients, lse_of, output_of
from dilcompile.lowering.space import NOWHERE, Space, bytes_of
from dilcompile.lowering.triton import split, tiles
from dilcompile.lowering.triton.bound import Bound, arch, bind, folded, head_block, interpreting, mask_shapes
from dilcompile.lowering.triton.config import Pass
from dilcompile.lowering.triton.plan import held, map_of, plan_of_few, unplannable
from dilcompile.lowering.union import beyond_union

TAKES_ROW_MASKS = True
LEAST_ROWS = 1

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD = 256
_OLDEST = (8, 0)
# What a launch may have of the dims but the first.
_MOST_PROGRAMS = 65535

# The passes whose tiles can be tuned.
_FORWARD: tuple[Pass, ...] = ("forward",)
_BACKWARD: tuple[Pass, ...] = ("queries", "keys")


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; nothing is compiled where Triton interprets."""
    if interpreting():
        return None
    import triton

    return f"{digest.of_files('triton', 'union.py')}, Triton {triton.__version__}, {arch(call.q.device)}"


def supports(call: Call, backward: bool) -> str | None:
    """See ``Kernel``."""
    device = call.q.device
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device}, not on a CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install dilcompile[triton])"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if call.q.dtype not in _DTYPES and not (call.q.dtype == torch.float64 and interpreting()):
        return f"dtype {call.q.dtype}"
    largest = max(call.problem.head_dim, call.problem.v_dim)
    if largest > _LARGEST_HEAD:
        return f"head size {largest}, more than {_LARGEST_HEAD}"
    if max(call.problem.batch, call.problem.heads) > _MOST_PROGRAMS:
        return f"{call.problem.batch} batch rows of {call.problem.heads} heads, more than {_MOST_PROGRAMS}"
    if call.bias is not None and call.bias.dtype not in (*_DTYPES, torch.float64):
        return f"a bias of dtype {call.bias.dtype}"
    if call.dropout_p >= 1:
        return f"dropout of {call.dropout_p}, which keeps nothing"
    return beyond_union(call, backward) or unplannable(call.relation, call.held)


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``; it needs all of it."""
    size, wide = call.problem, call.score_dtype
    taken = [(tuple(x.shape), x.dtype) for x in (call.q, call.k, call.v) if x.stride(-1) != 1]
    taken += mask_shapes(call)
    if not backward:
        if call.pages is None and (call.held is not None or not split.is_decode(size)):
            return bytes_of(*taken)
        taken += [(shape, wide) for shape in _parts(call, split.most_parts(call.relation, _programs_at_once(call.q.device)))]
        taken += [] if call.key_padding is None else [((size.batch, 2), torch.int32)]
        return bytes_of(*taken)
    by_row = ((size.batch, size.heads, size.q_len), wide)
    taken += [by_row] * (1 if call.bias is None else 2)
    if call.bias is not None and call.bias_grad and call.bias.dim() and call.bias.shape[-1] > 1:
        taken.append(_summed(call, call.bias))
    return bytes_of(*taken)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    from dilcompile.lowering.triton.attend import attention as kernel

    size = call.problem
    out, lse = output_of(call, 0, call.q, size.v_dim), lse_of(call)
    if lse.numel() == 0:
        return out, lse
    # Only the decode kernel reads pages, whatever the number of queries.
    if call.pages is not None or (call.held is None and split.is_decode(size)):
        return _decode(call, out, lse)
    space = call.space()
    bound = bind(call, space)
    tile = bound.tile("forward")
    plan = bound.plan(tile.own // bound.pack, tile.other)
    q, k, v = (space.dense_rows(x) for x in (call.q, call.k, call.v))
    strides, fold = folded(q, k, v, out)
    described = tile.described and bound.describable(plan, k, v)
    with _current(q.device), _scratch(described, q.device):
        kernel[bound.grid(plan.queries)](
            q, k, v, out, lse, None, *plan.tables, plan.queries.tiles, plan.patterns,
            *bound.masks, bound.bias, bound.seed, plan.part,
            *strides, *bound.mask_strides, *bound.bias_strides,
            *bound.sizes(plan, plan.queries), **bound.switches(plan), BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold,
            DESCRIBED=described, **tile.options,
        )  # fmt: skip
    return out, lse


def _decode(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The forward of few query rows: parts of the keys each on their own, then joined."""
    from dilcompile.lowering.triton.decode import decode, join

    size, space = call.problem, call.space()
    bound = bind(call, space)
    bound = bound if bound.by_head else replace(bound, pack=split.packed(size))
    tile = bound.tile("decode", split.rows_of_tile(size, bound.pack))
    plan = held(plan_of_few(call.relation, tile.own // bound.pack, call.documents is not None, call.q.device))
    parts = split.parts_of(call.relation, plan, tile, _programs_at_once(call.q.device))
    sums, tops, totals = (space.take(shape, lse.dtype, lse.device) for shape in _parts(call, parts))
    q, k, v = (space.dense_rows(x) for x in (call.q, call.k, call.v))
    pages = None if call.pages is None else space.contiguous(call.pages)
    tiles, heads, batch = bound.grid(plan.queries)
    strides, fold = folded(q, k, v)
    with _current(q.device):
        decode[(tiles * parts, heads, batch)](
            q, k, v, sums, tops, totals, *plan.tables, plan.queries.tiles, plan.patterns,
            *bound.masks, bound.bias, bound.seed, _kept(bound, space), pages,
            *strides, *bound.mask_strides, *bound.bias_strides,
            0 if pages is None else pages.stride(0), k.shape[0], *bound.sizes(plan, plan.queries), parts, **bound.switches(plan),
            PAGE_SIZE=1 if pages is None else k.shape[2], BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold,
            **tile.options,
        )  # fmt: skip
        tile = bound.tile("join")
        strides, fold = folded(out)
        join[(size.q_len, size.heads, size.batch)](
            sums, tops, totals, out, lse, *strides, parts, NATURAL=bound.bias is not None, V_DIM=size.v_dim,
            BLOCK_DV=head_block(size.v_dim), BLOCK_S=tile.own, FOLD=fold, **tile.options,
        )  # fmt: skip
    return out, lse


def _kept(bound: Bound, space: Space) -> Tensor | None:
    """int32 [B, 2]: where the keys that padding keeps begin and end."""
    from dilcompile.lowering.triton.decode import kept_range

    call = bound.call
    if call.key_padding is None:
        return None
    kept = space.take((call.problem.batch, 2), torch.int32, call.q.device)
    padding, tile = call.key_padding.view(torch.uint8), bound.tile("kept")
    with _current(kept.device):
        kept_range[(call.problem.batch,)](
            padding, kept, *padding.stride(), call.problem.k_len, BLOCK_N=tile.other, **tile.options
        )
    return kept


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    from dilcompile.lowering.triton.key_gradient import gradient_of_keys
    from dilcompile.lowering.triton.query_gradient import gradient_of_queries
    from dilcompile.lowering.triton.softmax import row_sums

    grad_q, grad_k, grad_v = (output_of(call, number, x, x.shape[-1]) for number, x in enumerate((call.q, call.k, call.v)))
    if lse.numel() == 0 or call.k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), None if call.bias is None else torch.zeros_like(call.bias)
    space, size = call.space(), call.problem
    bound = bind(call, space)
    q, k, v, out, grad_out = (space.dense_rows(x) for x in (call.q, call.k, call.v, out, grad_out))
    lse, delta = space.contiguous(lse), space.like(lse)
    grad_lse = None if grad_lse is None else space.contiguous(grad_lse)
    block, tile = head_block(size.v_dim), bound.tile("sums")
    strides, fold = folded(out, grad_out)
    with _current(q.device):
        row_sums[(-(-size.q_len // tile.own), size.heads, size.batch)](
            out, grad_out, grad_lse, delta, *strides,
            size.q_len, size.heads, V_DIM=size.v_dim, BLOCK_DV=block, BLOCK_M=tile.own, FOLD=fold, **tile.options,
        )  # fmt: skip
        rest = _rest_of_lse(bound, q, k, v, out, lse, space)
        tile = bound.tile("queries")
        strides, fold = folded(q, k, v, grad_out, grad_q)
        plan = bound.plan(tile.own // bound.pack, tile.other)
        described = tile.described and bound.describable(plan, k, v)
        with _scratch(described, q.device):
            gradient_of_queries[bound.grid(plan.queries)](
                q, k, v, grad_out, lse, rest, delta, grad_q, *plan.tables, plan.queries.tiles, plan.patterns,
                *bound.masks, bound.bias, bound.seed, plan.part,
                *strides, *bound.mask_strides, *bound.bias_strides, *bound.sizes(plan, plan.queries),
                call.scale, **bound.switches(plan), BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold, DESCRIBED=described,
                **tile.options,
            )  # fmt: skip
        tile = bound.tile("keys")
        strides, fold = folded(q, k, v, grad_out, grad_k, grad_v)
        plan = bound.plan(tile.other // bound.pack, tile.own, transposed=True)
        gradient_of_keys[(plan.keys.tiles.shape[1], size.kv_heads, size.batch)](
            q, k, v, grad_out, lse, rest, delta, grad_k, grad_v, *plan.tables, plan.keys.tiles,
            plan.patterns, *bound.masks, bound.bias, bound.seed, plan.part,
            *strides, *bound.mask_strides, *bound.bias_strides,
            *bound.sizes(plan, plan.keys), call.scale, **bound.switches(plan), BLOCK_M=tile.other, BLOCK_N=tile.own, FOLD=fold,
            **tile.options,
        )  # fmt: skip
        grad_bias = None if rest is None else _gradient_of_bias(bound, (q, k, v, grad_out, lse, rest, delta), grad_lse, space)
    return grad_q, grad_k, grad_v, grad_bias


def _rest_of_lse(bound: Bound, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, space: Space) -> Tensor | None:
    """[B, H, Sq] to be added to the LSE of rows that a bias hides whole with a large finite number; None without a bias."""
    from dilcompile.lowering.triton.attend import attention as kernel

    if bound.bias is None:
        return None
    rest, tile = space.like(lse).zero_(), bound.tile("forward")
    plan = bound.plan(tile.own // bound.pack, tile.other)
    strides, fold = folded(q, k, v, out)
    kernel[bound.grid(plan.queries)](
        q, k, v, out, lse, rest, *plan.tables, plan.queries.tiles, plan.patterns, *bound.masks, bound.bias, bound.seed, plan.part,
        *strides, *bound.mask_strides, *bound.bias_strides,
        *bound.sizes(plan, plan.queries), **bound.switches(plan), BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold,
        DESCRIBED=False, **tile.options,
    )  # fmt: skip
    return rest


def _gradient_of_bias(bound: Bound, operands: tuple[Tensor, ...], grad_lse: Tensor | None, space: Space) -> Tensor | None:
    """The gradient of the bias, None where it is not asked for; operands: q, k, v, grad_out, lse, rest, delta."""
    from dilcompile.lowering.triton.bias_gradient import gradient_of_bias

    call, size, (q, k, v, grad_out, lse, rest, delta) = bound.call, bound.call.problem, operands
    if call.bias is None or not call.bias_grad:
        return None
    shape = (1,) * (4 - call.bias.dim()) + tuple(call.bias.shape)
    if shape[3] == 1:
        # A number of a row moves its LSE and nothing else.
        of_rows = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0)
        return of_rows[..., None].sum_to_size(call.bias.shape).to(call.bias.dtype)
    (batch, heads, rows, _), dtype = _summed(call, call.bias)
    grad = space.take((batch, heads, rows, size.k_len), dtype, q.device)
    tile, tiles, there, first_row = bound.tile("bias"), None, None, 0
    if bound.blocks is not None and rows == 1:
        tile = tile.along(bound.blocks.grid.k_block, bound.blocks.grid.q_block)
    plan = bound.plan(16, tile.own, transposed=True)
    if bound.blocks is not None and rows == 1:
        tiles = plan.keys.tiles
    elif bound.blocks is not None:
        there, first_row = held(map_of(call.relation, bound.masks[0] is not None, q.device))
    switches = bound.switches(plan) | {"BIAS_BY": bound.bias_by(1), "ALL_QUERIES": rows == 1}
    del switches["PACK"], switches["COUNTED"]
    blocks = -(-size.k_len // tile.own) * (1 if rows == 1 else -(-size.q_len // tile.other))
    blocks = blocks if tiles is None else tiles.shape[1]
    counts = (size.q_len, size.k_len, size.q_offset, len(call.relation.terms), size.kv_heads)
    strides, fold = folded(q, k, v, grad_out)
    map_strides = (0, 0) if there is None else (there.stride(0) if there.shape[0] > 1 else 0, there.stride(1))
    gradient_of_bias[(blocks, heads, batch)](
        q, k, v, grad_out, lse, rest, delta, grad, *plan.tables, tiles, there, *bound.masks, bound.bias, bound.seed,
        *strides, *bound.mask_strides, *bound.bias_strides,
        *counts, size.heads // heads, size.batch // batch, *bound.factors(), *plan.places, *map_strides, first_row, **switches,
        BLOCK_M=tile.other, BLOCK_N=tile.own, FOLD=fold, **tile.options,
    )  # fmt: skip
    found = grad.sum_to_size(shape).view(call.bias.shape).to(call.bias.dtype)
    # Results never lie in a workspace.
    return found.clone() if found.data_ptr() == grad.data_ptr() and call.room is not None else found


def _summed(call: Call, bias: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the sums of the gradient of a bias with more than one column.

    With a number a key each head and batch row is by itself, and then summed where the bias is shared.
    """
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if shape[2] > 1:
        return (*shape[:3], call.problem.k_len), bias.dtype
    return (call.problem.batch, call.problem.heads, 1, call.problem.k_len), call.score_dtype


def _parts(call: Call, parts: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of the sums, maxima and totals of so many parts of the keys."""
    size = call.problem
    rows = (parts, size.batch, size.heads, size.q_len)
    return (*rows, size.v_dim), rows, rows


def tune(call: Call, backward: bool) -> None:
    """Find the fastest tiles for calls of this kind, where the user asks for it (``tiles.OPTION``)."""
    if tiles.is_off() or call.pages is not None or (call.held is None and split.is_decode(call.problem)):
        return
    bound = bind(call, NOWHERE)
    kinds = [bound.kind(step) for step in (_BACKWARD if backward else _FORWARD)]
    made_from = fingerprint(call) or "interpreted"
    tiles.tune(sys.modules[__name__], call, backward, {kind: bound.table(kind) for kind in kinds}, made_from)


@lru_cache(maxsize=16)
def _programs_at_once(device: torch.device) -> int:
    """How many programs of few rows fill the device: 2 a multiprocessor."""
    return 8 if interpreting() else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _scratch(needed: bool, device: torch.device) -> Iterator[None]:
    """Memory in which a launch makes its descriptors, from torch's allocator; what the user told Triton is there again behind."""
    if not needed or device.type != "cuda":
        yield
        return
    from triton.runtime import _allocation

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    token = _allocation._allocator.set(allocate)
    try:
        yield
    finally:
        _allocation._allocator.reset(token)
