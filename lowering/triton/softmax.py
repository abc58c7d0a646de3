"""What the backward kernels know of the softmax: each row's sum with its gradient, and weights made again from the LSE."""

import triton
import triton.language as tl

from dilcompile.lowering.triton.scores import LOG2_E, load_rows, power, unfolded
from dilcompile.lowering.triton.walk import VARYING


@triton.jit(do_not_specialize=VARYING)
def row_sums(
    OUT, GRAD_OUT, GRAD_LSE, DELTA,
    out_batch: tl.int64, out_head, out_row, grad_batch: tl.int64, grad_head, grad_row,
    q_len, heads, V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """DELTA = sum over dims of out * grad_out, less the gradient of the LSE; a row each of [B, H, Sq]."""
    out_batch, out_head, out_row = unfolded(out_batch, out_head, out_row, FOLD)
    grad_batch, grad_head, grad_row = unfolded(grad_batch, grad_head, grad_row, FOLD)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dims, there = tl.arange(0, BLOCK_DV), row < q_len
    at, grad_at = batch * out_batch + head * out_head, batch * grad_batch + head * grad_head
    out = load_rows(OUT + at, row * out_row, there, dims, V_DIM, BLOCK_DV, True).to(DELTA.dtype.element_ty)
    grad = load_rows(GRAD_OUT + grad_at, row * grad_row, there, dims, V_DIM, BLOCK_DV, True).to(DELTA.dtype.element_ty)
    delta = tl.sum(out * grad, 1)
    place = (batch * heads + head) * q_len + row
    if GRAD_LSE is not None:
        delta -= tl.load(GRAD_LSE + place, mask=there, other=0.0)
    tl.store(DELTA + place, delta, mask=there)


@triton.jit
def load_lse(LSE, REST, place, there):
    """(LSE in the base of scores, rest: see ``weights_of``). Rows without keys, and rows that are none, get an LSE of infinity,
    which makes every weight 0."""
    lse = tl.load(LSE + place, mask=there, other=float("inf"))
    rest = lse
    if REST is not None:
        rest = tl.load(REST + place, mask=there, other=0.0)
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E if REST is None else lse), rest


@triton.jit
def weights_of(s, lse, rest, NATURAL: tl.constexpr):
    """Weights of scores; with a bias (``NATURAL``) rest is what the LSE has no digits for, 0 in most rows."""
    s -= lse
    if NATURAL:
        s -= rest
    return power(s, NATURAL)
