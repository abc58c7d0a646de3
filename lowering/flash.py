"""The CUDA flash kernel: strided views through ATen's flash op; pieces that it can't mask by explicit products.

The op masks nothing but windows, so padding, masks by row and shared keys go through matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dilcompile.lowering import aten_flash, digest
from dilcompile.lowering.aten_flash import AtenFlash
from dilcompile.lowering.band import Band
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.view_path import portions, views
from dilcompile.lowering.view_path.engines import (
    Downstream,
    MathEngine,
    Part,
    Result,
    Upstream,
    finite_for_backward,
    needs_math,
)
from dilcompile.lowering.view_path.pieces import Piece
from dilcompile.lowering.view_path.strided import Block, Operand
from dilcompile.lowering.whole import Laid

TAKES_ROW_MASKS = True
LEAST_ROWS = 1

# The gradient of the LSE takes eight more columns: Note [LSE gradient] in views.py.
_LARGEST_HEAD = aten_flash.LARGEST_HEAD - 8


class CudaFlashEngine:
    """ATen's flash op for CUDA on full, causal and windowed blocks; ``MathEngine`` on all others."""

    takes_grad_lse = False

    def forward(self, part: Part, block: Block) -> Iterator[Result]:
        """See ``Engine``."""
        laid = _laid(part, block)
        if laid is None:
            yield from MathEngine().forward(part, block)
            return
        out, lse = AtenFlash().forward(laid)
        yield Result(_whole(block), out.transpose(1, 2), lse)

    def backward(self, part: Part, block: Block, upstream: Upstream) -> Iterator[Downstream]:
        """See ``Engine``."""
        laid = _laid(part, block)
        if laid is None:
            yield from MathEngine().backward(part, block, upstream)
            return
        lse = finite_for_backward(block.view(upstream.lse)).contiguous()
        grads = AtenFlash().backward(laid, _rows(block, upstream.out), lse, _rows(block, upstream.grad_out))
        d_q, d_k, d_v = (grad.transpose(1, 2) for grad in grads)
        yield Downstream(_whole(block), d_q, d_k, d_v)


def _laid(part: Part, block: Block) -> Laid | None:
    """The block as the op takes it, or None if the op can't mask it."""
    if part.padding is not None or part.row_masks is not None or block.piece.exclusive:
        return None
    band = band_of_piece(block.piece)
    if band is None:
        return None
    q, k, v = (_rows(block, operand) for operand in (part.q, part.k, part.v))
    return Laid(q, k, v, band, None, part.call.scale, None)


def band_of_piece(piece: Piece) -> Band | None:
    """The op's window over the keys of a piece, see Note [window of an op] in band.py, or None if it has none for it."""
    if piece.is_full:
        return Band(0, piece.keys, -1, -1)
    diagonal = piece.keys - piece.rows
    left = -1 if piece.low is None else diagonal - piece.low
    right = -1 if piece.high is None else piece.high - diagonal
    if diagonal < 0 or (piece.low is not None and left < 0) or (piece.high is not None and right < 0):
        return None
    return Band(0, piece.keys, left, right)


def _rows(block: Block, operand: Operand) -> Tensor:
    return block.view(operand).transpose(1, 2)


def _whole(block: Block) -> tuple[slice, slice, slice, slice]:
    first, second = block.sizes
    return slice(0, first), slice(0, second), slice(0, block.piece.rows), slice(0, block.piece.keys)


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; torch's own op, but given views, offsets and merged results."""
    return f"{digest.of_files('flash.py', 'aten_flash.py', 'view_path', 'merge.py')}, {aten_flash.origin()}"


def supports(call: Call, backward: bool) -> str | None:
    """Half precision on CUDA without softcap, dropout or bias."""
    return aten_flash.refusal(call, backward, _LARGEST_HEAD) or needs_math(call)


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return portions.workspace_bytes(call, CudaFlashEngine(), backward, share, grad_lse)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return views.forward(call, CudaFlashEngine())


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return views.backward(call, CudaFlashEngine(), out, lse, grad_out, grad_lse)
