"""Do the operands of the operator belong together? Asked before a kernel is, because kernels read by address and stride."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dilcompile.errors import KernelError

_INTEGERS = (torch.int32, torch.int64)


def check_products(q: Tensor, k: Tensor, v: Tensor, in_pages: bool) -> None:
    """Raise KernelError unless q [B, H, Sq, D], k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv] are of one dtype and device; k and v in
    pages have as many pages each, whatever B is."""
    if not q.dtype == k.dtype == v.dtype:
        raise KernelError(f"{_named(q, k, v)} must have one dtype; cast them")
    if not q.device == k.device == v.device:
        raise KernelError(f"{_named(q, k, v)} are on {q.device}, {k.device} and {v.device}; move them to one device")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise KernelError(f"{_named(q, k, v)} must be [B, H, S, D]; add the missing dims")
    (batch, heads, _, dim), (k_batch, kv_heads, keys, k_dim), (v_batch, *of_v, _) = q.shape, k.shape, v.shape
    fits = k_batch == v_batch and (in_pages or batch == k_batch) and [kv_heads, keys] == of_v and dim == k_dim
    if not fits or kv_heads == 0 or heads % kv_heads:
        raise KernelError(
            f"{_named(q, k, v)} must be [B, H, Sq, D], [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv], H a multiple of Hkv; reshape them"
        )


def check_scores(softcap: float | None, dropout_p: float) -> None:
    """Raise KernelError for numbers that kernels would read differently."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise KernelError(f"softcap is a positive number, or None for none, not {softcap}")
    if not 0 <= dropout_p <= 1:
        raise KernelError(f"dropout_p is a probability from 0 to 1, not {dropout_p}")


def check_masks(
    q: Tensor, keys: int, key_padding: Tensor | None, documents: Tensor | None, bias: Tensor | None, row_limits: Tensor | None
) -> None:
    """Raise KernelError unless the masks of ``Call`` have numbers for all queries and keys."""
    batch, heads, rows, _ = q.shape
    for name, x, dtypes, wanted in (
        ("key_padding", key_padding, (torch.bool,), ((batch,), (keys,))),
        ("documents", documents, _INTEGERS, ((1, batch), (keys,))),
        ("bias", bias, (), ((1, batch), (1, heads), (1, rows), (1, keys))),
        ("row_limits", row_limits, _INTEGERS, ((2,), (1, batch), (rows,))),
    ):
        if x is None:
            continue
        # A bias may lack leading dims.
        sizes = wanted[len(wanted) - x.dim() :] if name == "bias" and x.dim() <= len(wanted) else wanted
        # Of a bias, each kernel says itself which dtypes it takes.
        typed = not dtypes or x.dtype in dtypes
        if not typed or len(sizes) != x.dim() or any(n not in of for n, of in zip(x.shape, sizes, strict=True)):
            dims = ", ".join(" or ".join(map(str, dict.fromkeys(of))) for of in wanted)
            of_dtype = f" of {' or '.join(str(one).removeprefix('torch.') for one in dtypes)}" if dtypes else ""
            raise KernelError(f"{name} {_shown(x)} must be [{dims}]{of_dtype}")
        if x.device != q.device:
            raise KernelError(f"{name} is on {x.device} but q is on {q.device}; move it there")


def _named(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {_shown(q)}, k {_shown(k)} and v {_shown(v)}"


def _shown(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
