"""The Triton kernel: the whole relation in one launch, forward and backward, straight from the model's layout.

Tiles of queries of one residue class walk the keys of term after term with strided loads, under one running softmax. See
README.md beside it. Triton itself is imported when a call is first computed.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Gradients, empty_output
from dilcompile.lowering.triton.config import INTERPRETED, Masks, Pass, Tile, tile_of
from dilcompile.lowering.triton.plan import Plan, Rows, plan_of, unplannable
from dilcompile.lowering.union import beyond_union

TAKES_ROW_MASKS = True
# A tile of queries for one key head: with fewer rows most of it would be empty.
LEAST_ROWS = 16

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD = 256
_OLDEST = (8, 0)
# More query heads than this side by side would leave a tile few positions.
_MOST_PACKED = 16
# What a launch may have of the dims but the first.
_MOST_PROGRAMS = 65535
LOG2_E = math.log2(math.e)


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
    bound = _bind(call)
    tile = _tile(call, "forward")
    plan = bound.plan(tile.own // bound.pack, tile.other)
    q, k, v = (_dense_rows(x) for x in (call.q, call.k, call.v))
    with _current(q.device):
        kernel[bound.grid(plan.queries)](
            q, k, v, out, lse, plan.terms, plan.residues, plan.queries.tiles, plan.patterns, *bound.masks, bound.seed,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bound.mask_strides,
            *bound.sizes(plan.queries), **bound.switches(plan), BLOCK_M=tile.own, BLOCK_N=tile.other,
            **tile.options,
        )  # fmt: skip
    return out, lse


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    from dilcompile.lowering.triton.gradients import gradient_of_keys, gradient_of_queries, row_sums

    grad_q, grad_k, grad_v = (empty_output(x, x.shape[-1]) for x in (call.q, call.k, call.v))
    if lse.numel() == 0 or call.k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), None
    bound, size = _bind(call), call.problem
    q, k, v, out, grad_out = (_dense_rows(x) for x in (call.q, call.k, call.v, out, grad_out))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    block, tile = _block(size.v_dim), _tile(call, "sums")
    with _current(q.device):
        row_sums[(-(-size.q_len // tile.own), size.heads, size.batch)](
            out, grad_out, None if grad_lse is None else grad_lse.contiguous(), delta, *out.stride()[:3], *grad_out.stride()[:3],
            size.q_len, size.heads, V_DIM=size.v_dim, BLOCK_DV=block, BLOCK_M=tile.own, **tile.options,
        )  # fmt: skip
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
        tile = _tile(call, "queries")
        plan = bound.plan(tile.own // bound.pack, tile.other)
        gradient_of_queries[bound.grid(plan.queries)](
            q, k, v, grad_out, lse, delta, grad_q, plan.terms, plan.residues, plan.queries.tiles, plan.patterns,
            *bound.masks, bound.seed,
            *strides, *grad_q.stride()[:3], *bound.mask_strides, *bound.sizes(plan.queries), call.scale, **bound.switches(plan),
            BLOCK_M=tile.own, BLOCK_N=tile.other, **tile.options,
        )  # fmt: skip
        tile = _tile(call, "keys")
        plan = bound.plan(tile.other // bound.pack, tile.own)
        gradient_of_keys[(plan.keys.tiles.shape[1], size.kv_heads, size.batch)](
            q, k, v, grad_out, lse, delta, grad_k, grad_v, plan.terms, plan.residues, plan.keys.tiles,
            plan.patterns, *bound.masks, bound.seed,
            *strides, *grad_k.stride()[:3], *grad_v.stride()[:3], *bound.mask_strides, *bound.sizes(plan.keys), call.scale,
            **bound.switches(plan), BLOCK_M=tile.other, BLOCK_N=tile.own, **tile.options,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, None


@dataclass(frozen=True)
class _Bound:
    """A call as the kernels take it.

    Args:
        pack: query heads side by side in a tile.
        masks: starts and ends of documents, limits by row, key padding; None for what is not there.
        mask_strides: of documents by batch row; of limits by batch row and from first to last key; of padding.
    """

    call: Call
    pack: int
    masks: tuple[Tensor | None, ...]
    mask_strides: tuple[int, ...]

    @property
    def seed(self) -> Tensor | None:
        """The seed of dropout, or None without."""
        if self.call.dropout_p == 0:
            return None
        assert self.call.dropout_seed is not None, "dropout needs a seed"
        return self.call.dropout_seed

    def plan(self, queries: int, keys: int) -> Plan:
        """The relation, with this many positions in the tiles of each side."""
        return plan_of(self.call.relation, queries, keys, self.masks[0] is not None, self.call.q.device)

    def grid(self, rows: Rows) -> tuple[int, int, int]:
        """Tiles, key heads (or parts of their query heads), batch rows."""
        size = self.call.problem
        return rows.tiles.shape[1], size.heads // self.pack, size.batch

    def sizes(self, rows: Rows) -> tuple[float, ...]:
        """What comes after the strides: lengths, counts, factors of the scores, the least draw kept (less 2**31), its factor."""
        size, scale, softcap, p = self.call.problem, self.call.scale, self.call.softcap, self.call.dropout_p
        factors = (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)
        counts = (size.q_len, size.k_len, size.q_offset, len(self.call.relation.terms), rows.tiles.shape[1], size.kv_heads)
        return (*counts, *factors, round(p * 2**32) - 2**31, 1 / (1 - p))

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
            "HEADS": plan.by_head, "DEDUPE": plan.dedupes, "COUNTED": plan.counted,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "PRODUCTS": dtypes[products], "SCORES": dtypes[self.call.score_dtype],
        }  # fmt: skip


def _bind(call: Call) -> _Bound:
    size = call.problem
    pack = max(n for n in range(1, _MOST_PACKED + 1) if size.group % n == 0)
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
    return _Bound(call, pack, (starts, ends, limits, padding), (document_batch, limit_batch, limit_stride, *padding_strides))


def _runs(documents: Tensor) -> tuple[Tensor, Tensor]:
    """For each key position the first of its document, and the first behind it: int32 [B or 1, Sk]."""
    count = documents.shape[1]
    position = torch.arange(count, dtype=torch.int32, device=documents.device).expand(documents.shape)
    changes = documents[:, 1:] != documents[:, :-1]
    edge = changes.new_ones((documents.shape[0], 1))
    starts = torch.where(torch.cat([edge, changes], 1), position, 0).cummax(1).values
    closes = torch.where(torch.cat([changes, edge], 1), position + 1, count)
    return starts.contiguous(), closes.flip(1).cummin(1).values.flip(1).contiguous()


def _tile(call: Call, step: Pass) -> Tile:
    if interpreting():
        return INTERPRETED
    head = max(_block(call.problem.head_dim), _block(call.problem.v_dim))
    return tile_of(step, _arch(call.q.device), head, call.q.dtype, _masks(call))


def _masks(call: Call) -> Masks:
    if call.documents is not None:
        return "counted"
    masked = any(mask is not None for mask in (call.softcap, call.key_padding, call.row_limits)) or call.dropout_p > 0
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


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
