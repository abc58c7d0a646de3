"""The CUDA flash kernel: strided views through ATen's flash op; masked pieces by explicit products.

The op masks nothing but the causal triangle, so window tiles, padding and shared keys go through matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dilcompile.lowering import views
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.engines import (
    Downstream,
    MathEngine,
    Part,
    Result,
    Upstream,
    finite_for_backward,
    needs_math,
)
from dilcompile.lowering.strided import Block

TAKES_ROW_MASKS = True
LEAST_ROWS = 1

_LARGEST_HEAD = 248


class CudaFlashEngine:
    """ATen's flash op for CUDA on full and causal blocks; ``MathEngine`` on all others."""

    takes_grad_lse = False

    def forward(self, part: Part, block: Block) -> Iterator[Result]:
        """See ``Engine``."""
        if not _unmasked(part, block):
            yield from MathEngine().forward(part, block)
            return
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            block.view(part.q),
            block.view(part.k),
            block.view(part.v),
            0.0,
            block.piece.is_causal,
            return_debug_mask=False,
            scale=part.call.scale,
        )
        yield Result(_whole(block), out, lse)

    def backward(self, part: Part, block: Block, upstream: Upstream) -> Iterator[Downstream]:
        """See ``Engine``."""
        if not _unmasked(part, block):
            yield from MathEngine().backward(part, block, upstream)
            return
        # Without dropout the op doesn't read its random state.
        state = torch.zeros(2, dtype=torch.uint64, device=part.call.q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            block.view(upstream.grad_out),
            block.view(part.q),
            block.view(part.k),
            block.view(part.v),
            block.view(upstream.out),
            finite_for_backward(block.view(upstream.lse)).contiguous(),
            None,
            None,
            block.piece.rows,
            block.piece.keys,
            0.0,
            block.piece.is_causal,
            state,
            state[:0],
            scale=part.call.scale,
        )
        yield Downstream(_whole(block), *grads)


def _unmasked(part: Part, block: Block) -> bool:
    piece = block.piece
    return part.padding is None and part.row_masks is None and not piece.exclusive and (piece.is_full or piece.is_causal)


def _whole(block: Block) -> tuple[slice, slice, slice, slice]:
    first, second = block.sizes
    return slice(0, first), slice(0, second), slice(0, block.piece.rows), slice(0, block.piece.keys)


def supports(call: Call, backward: bool) -> str | None:
    """Half precision on CUDA without softcap, dropout or bias."""
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}, not on a CUDA device"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {call.q.dtype}, not float16 or bfloat16"
    if call.problem.head_dim % 8 or call.problem.head_dim > _LARGEST_HEAD:
        return f"the head size {call.problem.head_dim} is not a multiple of 8 up to {_LARGEST_HEAD}"
    return needs_math(call)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return views.forward(call, CudaFlashEngine())


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return views.backward(call, CudaFlashEngine(), out, lse, grad_out, grad_lse)
