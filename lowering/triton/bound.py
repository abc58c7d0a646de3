"""A call as the Triton kernels take it: operands, strides, masks, the tiles of each pass and the kernels' switches."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dilcompile.generators import Blocks
from dilcompile.lowering.call import Call, Held
from dilcompile.lowering.space import NOWHERE, Space
from dilcompile.lowering.triton import tiles
from dilcompile.lowering.triton.config import INTERPRETED, Masks, Pass, Tile, tile_of
from dilcompile.lowering.triton.lists import blocks_of
from dilcompile.lowering.triton.plan import Plan, Rows, held, plan_of, plan_of_blocks
from dilcompile.lowering.triton.tiles import Kind
from dilcompile.relation import Problem

# More query heads than this side by side would leave a tile few positions.
_MOST_PACKED = 16
_LOG2_E = math.log2(math.e)

BiasBy = Literal["none", "keys", "rows", "pairs"]


def interpreting() -> bool:
    """Triton runs kernels as Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Bound:
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
        return held(plan_of(relation, queries, keys, by_document, device, self.part))

    @property
    def part(self) -> Held | None:
        """Where the rows stand, if they are a part of their sequence."""
        return None if self.call.held is None else replace(self.call.held, queries=self.call.places[0], keys=self.call.places[1])

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
        head = max(head_block(size.head_dim), head_block(size.v_dim))
        masks = _masks(self.call, self.bias_by(self.pack))
        return Kind(step, q.device, head, q.dtype, masks, self.blocks is not None, self.part is not None)

    def table(self, kind: Kind, rows: int = INTERPRETED.own) -> Tile:
        """The tile that was proven without a device."""
        if interpreting():
            return replace(INTERPRETED, own=rows)
        return tile_of(kind.step, arch(kind.device), kind.head, kind.dtype, kind.masks, rows, kind.listed, kind.part)

    def describable(self, plan: Plan, *operands: Tensor) -> bool:
        """Whether rows can be loaded by descriptors: the walk goes along terms one by one, and each row begins at 16 bytes."""
        if plan.counted or plan.lists is not None or plan.part is not None or self.call.q.dtype == torch.float32:
            return False
        bytes_of = [x.stride(dim) * x.element_size() for x in operands for dim in range(3) if x.shape[dim] > 1]
        return not any(number % 16 for number in (*bytes_of, *(x.data_ptr() for x in operands)))

    def sizes(self, plan: Plan, rows: Rows) -> tuple[float, ...]:
        """What comes after the strides: lengths, counts, factors."""
        size = self.call.problem
        first = self.call.places[0].start
        counts = (size.q_len, size.k_len, first, len(self.call.relation.terms), rows.tiles.shape[1], size.kv_heads)
        return (*counts, *plan.places, *self.factors())

    def factors(self) -> tuple[float, ...]:
        """Those of the scores, in base e with a bias, else 2; the least draw kept (less 2**31) and its factor."""
        scale, softcap, p = self.call.scale, self.call.softcap, self.call.dropout_p
        base = _LOG2_E if self.bias is None else 1.0
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
            "BLOCK_D": head_block(size.head_dim), "BLOCK_DV": head_block(size.v_dim), "CAPPED": self.call.softcap is not None,
            "BIAS_BY": self.bias_by(self.pack), "HEADS": plan.by_head, "DEDUPE": plan.dedupes, "COUNTED": plan.counted,
            "Q_BLOCK": 0 if self.blocks is None else self.blocks.grid.q_block,
            "K_BLOCK": 0 if self.blocks is None else self.blocks.grid.k_block,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "PRODUCTS": dtypes[products], "SCORES": dtypes[self.call.score_dtype],
        }  # fmt: skip


def bind(call: Call, space: Space = NOWHERE) -> Bound:
    """The call with the operands of its masks as kernels read them, made in the space; nothing is planned yet."""
    size = call.problem
    blocks = blocks_of(call.relation)
    # Query heads of one tile walk one list.
    most = 1 if blocks is not None and blocks.pattern.by_head else _MOST_PACKED
    pack = max(n for n in range(1, most + 1) if size.group % n == 0)
    starts = ends = limits = padding = None
    document_batch = limit_batch = 0
    if call.documents is not None and size.k_len:
        starts, ends = _runs(call.documents, space)
        document_batch = size.k_len if starts.shape[0] > 1 else 0
    if call.row_limits is not None:
        limits = _limits(call.row_limits, size.k_len, space)
        limit_batch = size.q_len if limits.shape[1] > 1 else 0
    if call.key_padding is not None:
        padding = call.key_padding.view(torch.uint8)
    limit_stride = 0 if limits is None else limits.stride(0)
    padding_strides = (0, 0) if padding is None else padding.stride()
    mask_strides = (document_batch, limit_batch, limit_stride, *padding_strides)
    bias_strides = (0, 0, 0, 0) if call.bias is None else _strides_over_pairs(call.bias, size)
    return Bound(call, pack, (starts, ends, limits, padding), mask_strides, call.bias, bias_strides)


def _strides_over_pairs(bias: Tensor, size: Problem) -> tuple[int, ...]:
    """Strides by batch row, query head, query and key, 0 where all have the same number."""
    over = bias.expand(size.batch, size.heads, size.q_len, size.k_len)
    return tuple(0 if count == 1 else stride for count, stride in zip(over.shape, over.stride(), strict=True))


def mask_shapes(call: Call) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What ``bind`` takes of a space."""
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    if call.documents is not None and call.problem.k_len:
        shape = tuple(call.documents.shape)
        found += [(shape, torch.int32)] * 3 + [(shape, torch.int64), (shape, torch.bool), (shape[1:], torch.int32)]
    if call.row_limits is not None:
        found += [(tuple(call.row_limits.shape), dtype) for dtype in (torch.int32, call.row_limits.dtype)]
    return found


def _limits(limits: Tensor, k_len: int, space: Space) -> Tensor:
    found = space.like(limits, torch.int32)
    with space.again():
        return found.copy_(torch.clamp(limits, 0, k_len, out=space.like(limits)))


def _runs(documents: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """For each key position the first of its document, and the first behind it: int32 [B or 1, Sk]."""
    count, device = documents.shape[1], documents.device
    starts, ends = space.like(documents, torch.int32), space.like(documents, torch.int32)
    with space.again():
        inner, first = space.like(documents, torch.bool), space.like(documents, torch.int64)
        behind, position = space.like(documents, torch.int32), space.take((count,), torch.int32, device)
        torch.arange(count, out=position)
        inner[:, :1] = False
        torch.eq(documents[:, 1:], documents[:, :-1], out=inner[:, 1:])
        behind.copy_(position).masked_fill_(inner, 0)
        torch.cummax(behind, 1, out=(starts, first))
        # Where a document starts: the position behind its last one.
        first.copy_(starts)
        behind.zero_().scatter_reduce_(1, first, position.add_(1).expand(documents.shape), "amax")
        torch.gather(behind, 1, first, out=ends)
    return starts, ends


def _masks(call: Call, bias_by: BiasBy) -> Masks:
    if call.documents is not None:
        return "counted pairs" if bias_by == "pairs" else "counted"
    if bias_by == "pairs":
        return "pairs"
    masked = any(mask is not None for mask in (call.softcap, call.key_padding, call.row_limits, call.bias)) or call.dropout_p > 0
    return "some" if masked or any(term.dedupe for term in call.relation.terms[1:]) else "none"


@lru_cache(maxsize=16)
def arch(device: torch.device) -> str:
    """The architecture of a device as compilers name it: sm90, gfx942."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def head_block(dim: int) -> int:
    """The power of two, at least 16, that holds a head of this size."""
    return max(16, 1 << (dim - 1).bit_length())


def folded(*operands: Tensor) -> tuple[tuple[int, ...], int]:
    """(strides of operands [B, H, S, D] of one dtype by batch row, head and row, times FOLD; FOLD), see ``scores.unfolded``.

    FOLD is 1 where all of them are multiples of 16, else the least that leaves what 16 bytes hold known, or else 16.
    """
    strides = [0 if x.shape[dim] == 1 else x.stride(dim) for x in operands for dim in range(3)]
    whole = (16, 16 // operands[0].element_size(), 1)
    fold = 16 // next(unit for unit in whole if not any(stride % unit for stride in strides))
    return tuple(stride * fold for stride in strides), fold
