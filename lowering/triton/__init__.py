"""The Triton kernel: the whole relation in one launch, forward and backward, straight from the model's layout.

Tiles of queries of one residue class walk the keys of term after term with strided loads, under one running softmax. See
README.md beside it. Triton itself is imported when a call is first computed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from dilcompile.generators import Blocks
from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Gradients, empty_output
from dilcompile.lowering.triton import split, tiles
from dilcompile.lowering.triton.config import INTERPRETED, Masks, Pass, Tile, tile_of
from dilcompile.lowering.triton.lists import blocks_of
from dilcompile.lowering.triton.plan import Plan, Rows, held, map_of, plan_of, plan_of_blocks, plan_of_few, unplannable
from dilcompile.lowering.triton.tiles import Kind
from dilcompile.lowering.union import beyond_union
from dilcompile.relation import Problem

TAKES_ROW_MASKS = True
LEAST_ROWS = 1

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD = 256
_OLDEST = (8, 0)
# More query heads than this side by side would leave a tile few positions.
_MOST_PACKED = 16
# What a launch may have of the dims but the first.
_MOST_PROGRAMS = 65535
LOG2_E = math.log2(math.e)

# The passes whose tiles can be tuned.
_FORWARD: tuple[Pass, ...] = ("forward",)
_BACKWARD: tuple[Pass, ...] = ("queries", "keys")

BiasBy = Literal["none", "keys", "rows", "pairs"]


def interpreting() -> bool:
    """Triton runs kernels as Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; nothing is compiled where Triton interprets."""
    if interpreting():
        return None
    import triton

    return f"{digest.of_files('triton', 'union.py')}, Triton {triton.__version__}, {_arch(call.q.device)}"


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
    return beyond_union(call, backward) or unplannable(call.relation)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    from dilcompile.lowering.triton.attend import attention as kernel

    size = call.problem
    out = empty_output(call.q, size.v_dim)
    lse = call.q.new_empty((size.batch, size.heads, size.q_len), dtype=call.score_dtype)
    if lse.numel() == 0:
        return out, lse
    # Only the decode kernel reads pages, whatever the number of queries.
    if call.pages is not None or split.is_decode(size):
        return _decode(call, out, lse)
    bound = _bind(call)
    tile = bound.tile("forward")
    plan = bound.plan(tile.own // bound.pack, tile.other)
    q, k, v = (_dense_rows(x) for x in (call.q, call.k, call.v))
    strides, fold = _folded(q, k, v, out)
    described = tile.described and bound.describable(plan, k, v)
    with _current(q.device), _scratch(described, q.device):
        kernel[bound.grid(plan.queries)](
            q, k, v, out, lse, *plan.tables, plan.queries.tiles, plan.patterns,
            *bound.masks, bound.bias, bound.seed,
            *strides, *bound.mask_strides, *bound.bias_strides,
            *bound.sizes(plan, plan.queries), **bound.switches(plan), BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold,
            DESCRIBED=described, **tile.options,
        )  # fmt: skip
    return out, lse


def _decode(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The forward of few query rows: parts of the keys each on their own, then joined."""
    from dilcompile.lowering.triton.decode import decode, join

    size = call.problem
    bound = _bind(call)
    bound = bound if bound.by_head else replace(bound, pack=split.packed(size))
    tile = bound.tile("decode", split.rows_of_tile(size, bound.pack))
    plan = held(plan_of_few(call.relation, tile.own // bound.pack, call.documents is not None, call.q.device))
    parts = split.parts_of(call.relation, plan, tile, _programs_at_once(call.q.device))
    sums, tops, totals = (lse.new_empty((parts, *lse.shape, *last)) for last in ((size.v_dim,), (), ()))
    q, k, v = (_dense_rows(x) for x in (call.q, call.k, call.v))
    pages = None if call.pages is None else call.pages.contiguous()
    tiles, heads, batch = bound.grid(plan.queries)
    strides, fold = _folded(q, k, v)
    with _current(q.device):
        decode[(tiles * parts, heads, batch)](
            q, k, v, sums, tops, totals, *plan.tables, plan.queries.tiles, plan.patterns,
            *bound.masks, bound.bias, bound.seed, _kept(bound), pages,
            *strides, *bound.mask_strides, *bound.bias_strides,
            0 if pages is None else pages.stride(0), k.shape[0], *bound.sizes(plan, plan.queries), parts, **bound.switches(plan),
            PAGE_SIZE=1 if pages is None else k.shape[2], BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold,
            **tile.options,
        )  # fmt: skip
        tile = bound.tile("join")
        strides, fold = _folded(out)
        join[(size.q_len, size.heads, size.batch)](
            sums, tops, totals, out, lse, *strides, parts, NATURAL=bound.bias is not None, V_DIM=size.v_dim,
            BLOCK_DV=_block(size.v_dim), BLOCK_S=tile.own, FOLD=fold, **tile.options,
        )  # fmt: skip
    return out, lse


def _kept(bound: _Bound) -> Tensor | None:
    """int32 [B, 2]: where the keys that padding keeps begin and end."""
    from dilcompile.lowering.triton.decode import kept_range

    call = bound.call
    if call.key_padding is None:
        return None
    kept = call.key_padding.new_empty((call.problem.batch, 2), dtype=torch.int32)
    padding, tile = call.key_padding.view(torch.uint8), bound.tile("kept")
    with _current(kept.device):
        kept_range[(call.problem.batch,)](
            padding, kept, *padding.stride(), call.problem.k_len, BLOCK_N=tile.other, **tile.options
        )
    return kept


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    from dilcompile.lowering.triton.gradients import gradient_of_keys, gradient_of_queries, row_sums

    grad_q, grad_k, grad_v = (empty_output(x, x.shape[-1]) for x in (call.q, call.k, call.v))
    if lse.numel() == 0 or call.k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), None if call.bias is None else torch.zeros_like(call.bias)
    bound, size = _bind(call), call.problem
    q, k, v, out, grad_out = (_dense_rows(x) for x in (call.q, call.k, call.v, out, grad_out))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    block, tile = _block(size.v_dim), bound.tile("sums")
    strides, fold = _folded(out, grad_out)
    with _current(q.device):
        row_sums[(-(-size.q_len // tile.own), size.heads, size.batch)](
            out, grad_out, None if grad_lse is None else grad_lse.contiguous(), delta, *strides,
            size.q_len, size.heads, V_DIM=size.v_dim, BLOCK_DV=block, BLOCK_M=tile.own, FOLD=fold, **tile.options,
        )  # fmt: skip
        tile = bound.tile("queries")
        strides, fold = _folded(q, k, v, grad_out, grad_q)
        plan = bound.plan(tile.own // bound.pack, tile.other)
        described = tile.described and bound.describable(plan, k, v)
        with _scratch(described, q.device):
            gradient_of_queries[bound.grid(plan.queries)](
                q, k, v, grad_out, lse, delta, grad_q, *plan.tables, plan.queries.tiles, plan.patterns,
                *bound.masks, bound.bias, bound.seed,
                *strides, *bound.mask_strides, *bound.bias_strides, *bound.sizes(plan, plan.queries),
                call.scale, **bound.switches(plan), BLOCK_M=tile.own, BLOCK_N=tile.other, FOLD=fold, DESCRIBED=described,
                **tile.options,
            )  # fmt: skip
        tile = bound.tile("keys")
        strides, fold = _folded(q, k, v, grad_out, grad_k, grad_v)
        plan = bound.plan(tile.other // bound.pack, tile.own, transposed=True)
        gradient_of_keys[(plan.keys.tiles.shape[1], size.kv_heads, size.batch)](
            q, k, v, grad_out, lse, delta, grad_k, grad_v, *plan.tables, plan.keys.tiles,
            plan.patterns, *bound.masks, bound.bias, bound.seed,
            *strides, *bound.mask_strides, *bound.bias_strides,
            *bound.sizes(plan, plan.keys), call.scale, **bound.switches(plan), BLOCK_M=tile.other, BLOCK_N=tile.own, FOLD=fold,
            **tile.options,
        )  # fmt: skip
        grad_bias = _gradient_of_bias(bound, (q, k, v, grad_out, lse, delta), grad_lse)
    return grad_q, grad_k, grad_v, grad_bias


def _gradient_of_bias(bound: _Bound, operands: tuple[Tensor, ...], grad_lse: Tensor | None) -> Tensor | None:
    """The gradient of the bias, None where it is not asked for; operands: q, k, v, grad_out, lse, delta."""
    from dilcompile.lowering.triton.bias_gradient import gradient_of_bias

    call, size, (q, k, v, grad_out, lse, delta) = bound.call, bound.call.problem, operands
    if call.bias is None or not call.bias_grad:
        return None
    shape = (1,) * (4 - call.bias.dim()) + tuple(call.bias.shape)
    batch, heads, rows, columns = shape
    if columns == 1:
        # A number of a row moves its LSE and nothing else.
        of_rows = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0)
        return of_rows[..., None].sum_to_size(call.bias.shape).to(call.bias.dtype)
    if rows == 1:
        # Each head and batch row by itself: a number a key, which then is summed where the bias is shared.
        batch, heads = size.batch, size.heads
    grad = q.new_empty((batch, heads, rows, size.k_len), dtype=call.score_dtype if rows == 1 else call.bias.dtype)
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
    strides, fold = _folded(q, k, v, grad_out)
    map_strides = (0, 0) if there is None else (there.stride(0) if there.shape[0] > 1 else 0, there.stride(1))
    gradient_of_bias[(blocks, heads, batch)](
        q, k, v, grad_out, lse, delta, grad, *plan.tables, tiles, there, *bound.masks, bound.bias, bound.seed,
        *strides, *bound.mask_strides, *bound.bias_strides,
        *counts, size.heads // heads, size.batch // batch, *bound.factors(), *plan.places, *map_strides, first_row, **switches,
        BLOCK_M=tile.other, BLOCK_N=tile.own, FOLD=fold, **tile.options,
    )  # fmt: skip
    return grad.sum_to_size(shape).view(call.bias.shape).to(call.bias.dtype)


def tune(call: Call, backward: bool) -> None:
    """Find the fastest tiles for calls of this kind, where the user asks for it (``tiles.OPTION``)."""
    if tiles.is_off() or call.pages is not None or split.is_decode(call.problem):
        return
    bound = _bind(call)
    kinds = [bound.kind(step) for step in (_BACKWARD if backward else _FORWARD)]
    made_from = fingerprint(call) or "interpreted"
    tiles.tune(sys.modules[__name__], call, backward, {kind: bound.table(kind) for kind in kinds}, made_from)


@dataclass(frozen=True)
class _Bound:
    """A call as the kernels take it.

    Args:
        pack: query heads side by side in a tile.
        masks: starts and ends of documents, limits by row, key padding; None for what is not there.
        mask_strides: of documents by batch row; of limits by batch row and from first to last key; of padding.
        bias: as the call has it, or None; bias_strides: by batch row, query head, query and key, 0 where it is shared.
    """

    call: Call
    pack: int
    masks: tuple[Tensor | None, ...]
    mask_strides: tuple[int, ...]
    bias: Tensor | None
    bias_strides: tuple[int, ...]

    @property
    def blocks(self) -> Blocks | None:
        """Those that the relation is made of."""
        return blocks_of(self.call.relation)

    @property
    def by_head(self) -> bool:
        """Whether query heads have lists of blocks of their own: those of one tile walk one list."""
        return self.blocks is not None and self.blocks.pattern.by_head

    @property
    def seed(self) -> Tensor | None:
        """The seed of dropout, or None without."""
        if self.call.dropout_p == 0:
            return None
        assert self.call.dropout_seed is not None, "dropout needs a seed"
        return self.call.dropout_seed

    def plan(self, queries: int, keys: int, transposed: bool = False) -> Plan:
        """The relation, with this many positions in the tiles of each side; of blocks only the side that walks."""
        relation, by_document, device = self.call.relation, self.masks[0] is not None, self.call.q.device
        if self.blocks is not None:
            return held(plan_of_blocks(relation, keys if transposed else queries, transposed, by_document, device))
        return held(plan_of(relation, queries, keys, by_document, device))

    def grid(self, rows: Rows) -> tuple[int, int, int]:
        """Tiles, key heads (or parts of their query heads), batch rows."""
        size = self.call.problem
        return rows.tiles.shape[1], size.heads // self.pack, size.batch

    def bias_by(self, pack: int) -> BiasBy:
        """What the numbers of the bias in a tile of ``pack`` query heads are for."""
        if self.bias is None:
            return "none"
        _, head, row, key = self.bias_strides
        if row == 0 and (head == 0 or pack == 1):
            return "keys"
        return "rows" if key == 0 else "pairs"

    def tile(self, step: Pass, rows: int = INTERPRETED.own) -> Tile:
        """The tile sizes of a pass; ``rows``: of few queries."""
        kind, blocks = self.kind(step), self.blocks
        tile = tiles.tile(kind, self.table(kind, rows))
        if blocks is None or interpreting() or step not in ("forward", "queries", "keys"):
            return tile
        own, other = blocks.grid.q_block * self.pack, blocks.grid.k_block
        return tile.along(other, blocks.grid.q_block, self.pack) if step == "keys" else tile.along(own, other)

    def kind(self, step: Pass) -> Kind:
        """What the tile of a pass depends on."""
        size, q = self.call.problem, self.call.q
        head = max(_block(size.head_dim), _block(size.v_dim))
        return Kind(step, q.device, head, q.dtype, _masks(self.call, self.bias_by(self.pack)), self.blocks is not None)

    def table(self, kind: Kind, rows: int = INTERPRETED.own) -> Tile:
        """The tile that was proven without a device."""
        if interpreting():
            return replace(INTERPRETED, own=rows)
        return tile_of(kind.step, _arch(kind.device), kind.head, kind.dtype, kind.masks, rows, kind.listed)

    def describable(self, plan: Plan, *operands: Tensor) -> bool:
        """Whether rows can be loaded by descriptors: the walk goes along terms one by one, and each row begins at 16 bytes."""
        if plan.counted or plan.lists is not None or self.call.q.dtype == torch.float32:
            return False
        bytes_of = [x.stride(dim) * x.element_size() for x in operands for dim in range(3) if x.shape[dim] > 1]
        return not any(number % 16 for number in (*bytes_of, *(x.data_ptr() for x in operands)))

    def sizes(self, plan: Plan, rows: Rows) -> tuple[float, ...]:
        """What comes after the strides: lengths, counts, factors."""
        size = self.call.problem
        counts = (size.q_len, size.k_len, size.q_offset, len(self.call.relation.terms), rows.tiles.shape[1], size.kv_heads)
        return (*counts, *plan.places, *self.factors())

    def factors(self) -> tuple[float, ...]:
        """Those of the scores, in base e with a bias, else 2; the least draw kept (less 2**31) and its factor."""
        scale, softcap, p = self.call.scale, self.call.softcap, self.call.dropout_p
        base = LOG2_E if self.bias is None else 1.0
        factors = (scale * base, 0.0) if softcap is None else (scale / softcap, softcap * base)
        return (*factors, round(p * 2**32) - 2**31, 1 / (1 - p))

    def switches(self, plan: Plan) -> dict[str, object]:
        """The kernels' compile-time arguments but the tile sizes."""
        import triton.language as tl

        size = self.call.problem
        dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
        element = self.call.q.dtype
        # Triton's interpreter keeps bfloat16 as bits, which it can't multiply; their products are exact in float32.
        products = torch.float32 if element == torch.bfloat16 and interpreting() else element
        return {
            "GROUP": size.group, "PACK": self.pack, "HEAD_DIM": size.head_dim, "V_DIM": size.v_dim,
            "BLOCK_D": _block(size.head_dim), "BLOCK_DV": _block(size.v_dim), "CAPPED": self.call.softcap is not None,
            "BIAS_BY": self.bias_by(self.pack), "HEADS": plan.by_head, "DEDUPE": plan.dedupes, "COUNTED": plan.counted,
            "Q_BLOCK": 0 if self.blocks is None else self.blocks.grid.q_block,
            "K_BLOCK": 0 if self.blocks is None else self.blocks.grid.k_block,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "PRODUCTS": dtypes[products], "SCORES": dtypes[self.call.score_dtype],
        }  # fmt: skip


def _bind(call: Call) -> _Bound:
    size = call.problem
    blocks = blocks_of(call.relation)
    # Query heads of one tile walk one list.
    most = 1 if blocks is not None and blocks.pattern.by_head else _MOST_PACKED
    pack = max(n for n in range(1, most + 1) if size.group % n == 0)
    starts = ends = limits = padding = None
    document_batch = limit_batch = 0
    if call.documents is not None and size.k_len:
        starts, ends = _runs(call.documents)
        document_batch = size.k_len if starts.shape[0] > 1 else 0
    if call.row_limits is not None:
        limits = call.row_limits.clamp(0, size.k_len).to(torch.int32).contiguous()
        limit_batch = size.q_len if limits.shape[1] > 1 else 0
    if call.key_padding is not None:
        padding = call.key_padding.view(torch.uint8)
    limit_stride = 0 if limits is None else limits.stride(0)
    padding_strides = (0, 0) if padding is None else padding.stride()
    mask_strides = (document_batch, limit_batch, limit_stride, *padding_strides)
    bias_strides = (0, 0, 0, 0) if call.bias is None else _strides_over_pairs(call.bias, size)
    return _Bound(call, pack, (starts, ends, limits, padding), mask_strides, call.bias, bias_strides)


def _strides_over_pairs(bias: Tensor, size: Problem) -> tuple[int, ...]:
    """Strides by batch row, query head, query and key, 0 where all have the same number."""
    over = bias.expand(size.batch, size.heads, size.q_len, size.k_len)
    return tuple(0 if count == 1 else stride for count, stride in zip(over.shape, over.stride(), strict=True))


def _runs(documents: Tensor) -> tuple[Tensor, Tensor]:
    """For each key position the first of its document, and the first behind it: int32 [B or 1, Sk]."""
    count = documents.shape[1]
    position = torch.arange(count, dtype=torch.int32, device=documents.device).expand(documents.shape)
    changes = documents[:, 1:] != documents[:, :-1]
    edge = changes.new_ones((documents.shape[0], 1))
    starts = torch.where(torch.cat([edge, changes], 1), position, 0).cummax(1).values
    closes = torch.where(torch.cat([changes, edge], 1), position + 1, count)
    return starts.contiguous(), closes.flip(1).cummin(1).values.flip(1).contiguous()


@lru_cache(maxsize=16)
def _programs_at_once(device: torch.device) -> int:
    """How many programs of few rows fill the device: 2 a multiprocessor."""
    return 8 if interpreting() else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _masks(call: Call, bias_by: BiasBy) -> Masks:
    if call.documents is not None:
        return "counted pairs" if bias_by == "pairs" else "counted"
    if bias_by == "pairs":
        return "pairs"
    masked = any(mask is not None for mask in (call.softcap, call.key_padding, call.row_limits, call.bias)) or call.dropout_p > 0
    return "some" if masked or any(term.dedupe for term in call.relation.terms[1:]) else "none"


@lru_cache(maxsize=16)
def _arch(device: torch.device) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _block(dim: int) -> int:
    """The power of two, at least 16, that holds a head of this size."""
    return max(16, 1 << (dim - 1).bit_length())


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


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _folded(*operands: Tensor) -> tuple[tuple[int, ...], int]:
    """(strides of operands [B, H, S, D] of one dtype by batch row, head and row, times FOLD; FOLD), see ``scores.unfolded``.

    FOLD is 1 where all of them are multiples of 16, else the least that leaves what 16 bytes hold known, or else 16.
    """
    strides = [0 if x.shape[dim] == 1 else x.stride(dim) for x in operands for dim in range(3)]
    whole = (16, 16 // operands[0].element_size(), 1)
    fold = 16 // next(unit for unit in whole if not any(stride % unit for stride in strides))
    return tuple(stride * fold for stride in strides), fold
