"""A relation by one launch of a flash op: operands laid out as such ops take them, and their results as a kernel gives them.

Note [LSE gradient of one launch]: an op's backward knows no gradient of the LSE. Where scores go into the softmax as they are,
that gradient adds ``g = scale * grad_lse`` times the weights to theirs. So dq gets ``g * (weights @ k)``, the output of a forward
with the keys as values, and dk gets ``weights.T @ (g * q)``, the values' gradient of its backward. No head size grows by that.
The weights of a part of a sequence are its own softmax times its share of the whole one, ``exp(own LSE - LSE)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dilcompile.lowering.band import Band, band_of, limits_of
from dilcompile.lowering.call import Call, Gradients, dense_rows
from dilcompile.lowering.packed import Packed, packed


@dataclass(frozen=True)
class Laid:
    """What an op computes.

    Args:
        q, k, v: [B, S, H, D] with dense rows; with packed documents [B * S, H, D].
        band: which keys a row sees, of those in k (in each document, with documents).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    band: Band
    packed: Packed | None
    scale: float
    softcap: float | None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return self.q, self.k, self.v

    def no_draws(self, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """What stands for the random state that an op's backward wants; without dropout it isn't read."""
        return torch.zeros(sizes, dtype=dtype, device=self.q.device)


class FlashOp(Protocol):
    """An op of torch or of a package."""

    def forward(self, laid: Laid) -> tuple[Tensor, Tensor]:
        """out, laid out as q, and lse: float32 [B, H, S], or [H, B * S] with packed documents."""

    def backward(self, laid: Laid, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, laid out as they are; out and grad_out are laid out as q, lse as the forward gives it."""


def beyond_whole(call: Call) -> str | None:
    """The part of a call that no single launch of a flash op computes, or None."""
    for held, name in (
        (call.key_padding, "key padding"),
        (call.bias, "a bias over all pairs"),
    ):
        if held is not None:
            return name
    if call.dropout_p > 0:
        return "dropout by position"
    if call.flat:
        return "flat scores"
    band = _band(call)
    if isinstance(band, str):
        return band
    if call.documents is None:
        return None
    if call.held is not None:
        return "documents over a part of a sequence"
    return _beyond_documents(call)


def _band(call: Call) -> Band | str:
    return band_of(call.relation, None if call.held is None else call.places)


def _beyond_documents(call: Call) -> str | None:
    """What of documents no launch computes: each has its own diagonal, in the corner of its last query and last key."""
    size, limits = call.problem, limits_of(call.relation)
    if limits[1] != 0 and limits != (None, None):
        return "documents under a window behind the query"
    if size.q_offset < 0 or size.q_offset + size.q_len > size.k_len:
        return f"{size.q_len} queries from position {size.q_offset} on, of which some are in no document"
    if call.q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "documents are counted on the CPU, which a CUDA graph that is being captured can't wait for"
    return None


def forward(call: Call, op: FlashOp) -> tuple[Tensor, Tensor]:
    """See ``Kernel.forward``."""
    laid = _laid(call)
    out, lse = op.forward(laid)
    return _unlaid(out, call.problem.batch).to(call.out_dtype), _lse_unlaid(lse, call.problem.batch)


def backward(call: Call, op: FlashOp, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel.backward``."""
    laid = _laid(call)
    lse = _lse_laid(lse, laid)
    grads = op.backward(laid, _rows(out, laid), lse, _rows(grad_out, laid))
    if grad_lse is not None:
        grads = _with_lse_gradient(laid, op, lse, _lse_laid(grad_lse, laid), grads, call.held is not None)
    d_q, d_k, d_v = (_unlaid(grad, call.problem.batch).to(call.out_dtype) for grad in grads)
    return d_q, _uncut(d_k, laid.band, call.k), _uncut(d_v, laid.band, call.v), None


def _with_lse_gradient(
    laid: Laid, op: FlashOp, lse: Tensor, grad_lse: Tensor, grads: tuple[Tensor, Tensor, Tensor], part: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See Note [LSE gradient of one launch]."""
    assert laid.softcap is None, "kernels with a softcap refuse the backward"
    of_keys = replace(laid, v=laid.k)
    mean, own_lse = op.forward(of_keys)
    factor = _by_row(grad_lse * laid.scale)
    _, _, more = op.backward(of_keys, mean, lse, (laid.q * factor).to(laid.q.dtype))
    mean = mean * _by_row((own_lse - lse).exp()) if part else mean
    return (grads[0] + mean * factor).to(laid.q.dtype), grads[1] + more, grads[2]


def _by_row(x: Tensor) -> Tensor:
    """[B, H, S] or [H, B * S], beside what is laid out as q."""
    return x.transpose(-1, -2).unsqueeze(-1)


def _laid(call: Call) -> Laid:
    band, size = _band(call), call.problem
    assert isinstance(band, Band), band
    k, v = (x.narrow(2, band.first, band.stop - band.first) for x in (call.k, call.v))
    q, k, v = (dense_rows(x).transpose(1, 2) for x in (call.q, k, v))
    documents = None
    if call.documents is not None:
        documents = packed(
            call.documents.narrow(1, band.first, band.stop - band.first), size.batch, size.q_len, size.q_offset - band.first
        )
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return Laid(q, k, v, band, documents, call.scale, call.softcap)


def _rows(x: Tensor, laid: Laid) -> Tensor:
    """[B, H, S, D] as the op's q is laid out."""
    x = dense_rows(x).transpose(1, 2)
    return x if laid.packed is None else x.flatten(0, 1)


def _unlaid(x: Tensor, batch: int) -> Tensor:
    """[B, H, S, D] of what is laid out as an op's operand."""
    return (x if x.dim() == 4 else x.view(batch, -1, *x.shape[1:])).transpose(1, 2)


def _lse_laid(lse: Tensor, laid: Laid) -> Tensor:
    """[B, H, S] as the op gives it."""
    return lse.contiguous() if laid.packed is None else lse.transpose(0, 1).flatten(1)


def _lse_unlaid(lse: Tensor, batch: int) -> Tensor:
    return (lse if lse.dim() == 3 else lse.view(lse.shape[0], batch, -1).transpose(0, 1)).contiguous()


def _uncut(grad: Tensor, band: Band, like: Tensor) -> Tensor:
    """The gradient of all keys, of those that the op got."""
    if grad.shape[2] == like.shape[2]:
        return grad
    whole = torch.zeros_like(like, dtype=grad.dtype)
    whole.narrow(2, band.first, band.stop - band.first).copy_(grad)
    return whole
