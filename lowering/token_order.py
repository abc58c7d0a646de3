"""Tokens along a curve: a kernel computes with rows in the order in which blocks count them, and nobody else sees it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from dilcompile.blocks.curve import Curve
from dilcompile.errors import FormError
from dilcompile.forms import BlockSparse, Form
from dilcompile.lowering.call import Call, Gradients, Kernel


def curve_of(form: Form) -> Curve | None:
    """The curve that moves the tokens of a call, or None."""
    curve = form.curve if isinstance(form, BlockSparse) else None
    return curve if curve is not None and curve.moves else None


def forward(kernel: Kernel, call: Call, form: Form) -> tuple[Tensor, Tensor]:
    """``kernel.forward`` of the tokens along the form's curve, with out and LSE in the order of the call's own tokens.

    Raises:
        FormError: if operands of the call know the sequence only.
    """
    _refuse(call, form)
    curve = curve_of(form)
    if curve is None:
        return kernel.forward(call)
    out, lse = kernel.forward(_along(curve, call))
    back = _indices(curve, call.q.device)[1]
    return _rows(out, back), lse.index_select(2, back)


def backward(
    kernel: Kernel, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, form: Form
) -> Gradients:
    """``kernel.backward`` in the same way."""
    curve = curve_of(form)
    if curve is None:
        return kernel.backward(call, out, lse, grad_out, grad_lse)
    tokens, back = _indices(curve, call.q.device)
    grad_lse = None if grad_lse is None else grad_lse.index_select(2, tokens)
    upstream = _rows(out, tokens), lse.index_select(2, tokens), _rows(grad_out, tokens), grad_lse
    grad_q, grad_k, grad_v, grad_bias = kernel.backward(_along(curve, call), *upstream)
    return _rows(grad_q, back), _rows(grad_k, back), _rows(grad_v, back), None if grad_bias is None else _square(grad_bias, back)


def chosen_from(form: Form, q: Tensor, k: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The queries, keys and padding from which the blocks of a call are chosen: along the form's curve, as blocks count them."""
    curve = curve_of(form)
    if curve is None:
        return q, k, keep
    tokens = _indices(curve, q.device)[0]
    return _rows(q, tokens), _rows(k, tokens), None if keep is None else keep.index_select(1, tokens)


def _refuse(call: Call, form: Form) -> None:
    """Raise where operands say something of the sequence that the grid's tokens, or their order, leave no sense."""
    curve = form.curve if isinstance(form, BlockSparse) else None
    if curve is None:
        return
    if call.documents is not None:
        raise FormError(f"packed documents are not one grid {list(curve.grid)} of tokens; leave the documents or the grid out")
    held = {"a mask by row counts": (call.row_limits, call.pairs), "keys and values in pages count": (call.pages,)}
    for what, operands in held.items():
        if curve.moves and any(x is not None for x in operands):
            raise FormError(f"{what} along the sequence, which order {curve.order!r} leaves; take order 'none'")


def _along(curve: Curve, call: Call) -> Call:
    """The call with its tokens along the curve."""
    tokens = _indices(curve, call.q.device)[0]
    q, k, v = (_rows(x, tokens) for x in (call.q, call.k, call.v))
    padding = None if call.key_padding is None else call.key_padding.index_select(1, tokens)
    # A selection counts positions along the curve already. What comes out is moved once more.
    room = None if call.room is None else replace(call.room, results=())
    return replace(
        call, room=room, q=q, k=k, v=v, key_padding=padding, bias=None if call.bias is None else _square(call.bias, tokens)
    )


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of [B, H, S, D] in another order, in memory [B, S, H, D]: whole tokens are copied."""
    return x.transpose(1, 2).index_select(1, order).transpose(1, 2)


def _square(bias: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of what broadcasts to [B, H, S, S] in another order."""
    for dim in (-1, -2):
        if bias.dim() >= -dim and bias.shape[dim] > 1:
            bias = bias.index_select(dim, order)
    return bias


@lru_cache(maxsize=32)
def _indices(curve: Curve, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token at each position, and the position of each token, int64 [S]."""
    # Arrays that are not to be written have no tensor of their own.
    return torch.tensor(curve.tokens, device=device), torch.tensor(curve.positions, device=device)
