"""Direct use: one attention in a given form, without a policy or a graph. Layout [B, H, S, D] as in SDPA.

Query row i stands at key position ``i + q_offset``. The default is ``Sk - Sq``: the last query is the last key, so a decode
step (Sq = 1) is the last row of the prefill. (SDPA's ``is_causal`` counts from the top left; the two agree for Sq = Sk.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dilcompile.errors import DilcompileError
from dilcompile.forms import Dilated, Form, make_form, parse_form
from dilcompile.lowering import ops

__all__ = ["attention", "dilated_attention"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form | str | Mapping[str, Any],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_padding: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    q_offset: int | None = None,
    kernel: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs that ``form`` lets through.

    Args:
        q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv]; one float dtype, one device, H a multiple of Hkv.
        form: a Form, its text, or ``{"form": name, option: value, ...}``.
        is_causal: keys up to the query's own position only.
        scale: factor on q . k; ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        key_padding: bool [B, Sk], True keeps a key.
        cu_seqlens: int [documents + 1], where packed documents begin, from 0 to Sk; attention stays inside a document.
        bias: float, broadcastable to [B, H, Sq, Sk], added to the scores.
        dropout_p: probability to drop a pair, drawn by torch's generator and by position.
        q_offset: key position of the first query; ``Sk - Sq`` by default.
        kernel: name of a kernel; the fastest by default.
        return_lse: return (out, lse) with lse [B, H, Sq], natural log, float32 (float64 for float64), differentiable.

    Returns:
        out [B, H, Sq, Dv]; 0 (lse -inf) for a query that sees no key.

    Raises:
        DilcompileError: for operands that don't fit; FormError, KernelError: for the form or kernel.
    """
    _check_operands(q, k, v)
    _check_numbers(scale, softcap, dropout_p)
    _check_padding(key_padding, k)
    _check_bias(bias, q, k)
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    documents = None if cu_seqlens is None else _documents(cu_seqlens, q.shape[2], k.shape[2], offset, k.device)
    seed = torch.randint(0, 2**62, (1,), device=q.device) if dropout_p > 0 else None
    out, lse = ops.attention(
        q,
        k,
        v,
        key_padding,
        documents,
        bias,
        seed,
        _text(form),
        is_causal,
        None,
        None,
        offset,
        q.shape[3] ** -0.5 if scale is None else scale,
        softcap,
        dropout_p,
        kernel,
    )
    return (out, lse) if return_lse else out


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int | str] | str,
    dilation_rates: Sequence[int] | str,
    *,
    is_causal: bool = False,
    offset: str = "head_mod",
    union: str = "multiset",
    heads: str = "all",
    sinks: int = 0,
    local: int = 0,
    coverage: str = "require",
    merge_grad: str = "exact",
    scale: float | None = None,
    softcap: float | None = None,
    key_padding: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kernel: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention (LongNet, arXiv 2307.02486): branch i has segments of ``segment_lengths[i]`` and ``dilation_rates[i]``.

    The options of the form are those of ``dilcompile.forms.Dilated``; the operands, what is returned and what is raised are
    those of ``attention``.
    """
    segments = segment_lengths if isinstance(segment_lengths, str) else tuple(segment_lengths)
    rates = dilation_rates if isinstance(dilation_rates, str) else tuple(dilation_rates)
    return attention(
        q,
        k,
        v,
        _dilated_text(segments, rates, offset, union, heads, sinks, local, coverage, merge_grad),
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        key_padding=key_padding,
        cu_seqlens=cu_seqlens,
        kernel=kernel,
        return_lse=return_lse,
    )


# Under torch.compile the form is a constant of the graph: it is built and checked while tracing.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _dilated_text(
    segments: Any,
    rates: Any,
    offset: Any,
    union: Any,
    heads: Any,
    sinks: Any,
    local: Any,
    coverage: Any,
    merge_grad: Any,
) -> str:
    return str(
        Dilated(
            segments=segments,
            rates=rates,
            offset=offset,
            union=union,
            heads=heads,
            sinks=sinks,
            local=local,
            coverage=coverage,
            merge_grad=merge_grad,
        )
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _checked_text(text: str) -> str:
    return str(parse_form(text))


def _text(form: Form | str | Mapping[str, Any]) -> str:
    if isinstance(form, Form):
        return str(form)
    if isinstance(form, str):
        checked: str = _checked_text(form)
        return checked
    if not isinstance(form, Mapping) or not isinstance(form.get("form"), str):
        raise DilcompileError(f"form must be a Form, its text, or a mapping such as {{'form': 'dense'}}, not {form!r}")
    return str(make_form(form["form"], {name: value for name, value in form.items() if name != "form"}))


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise DilcompileError(f"{name} must be [B, H, S, D], not {list(x.shape)}; add the missing dims")
        if x.dtype not in _DTYPES:
            raise DilcompileError(f"{name} has dtype {x.dtype}; attention needs float16, bfloat16, float32 or float64: cast it")
        if 0 in x.shape:
            raise DilcompileError(f"{name} is empty: {list(x.shape)}; every dim must be at least 1")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise DilcompileError(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; cast them to one")
    if not q.device == k.device == v.device:
        raise DilcompileError(f"q, k and v are on {q.device}, {k.device} and {v.device}; move them to one device")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise DilcompileError(f"q, k and v have batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]}; expand them")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise DilcompileError(f"k is {list(k.shape)} but v is {list(v.shape)}; they must agree in all dims but the last")
    if q.shape[3] != k.shape[3]:
        raise DilcompileError(f"q has head size {q.shape[3]} but k has {k.shape[3]}; they must be equal")
    if q.shape[1] % k.shape[1]:
        raise DilcompileError(
            f"q has {q.shape[1]} heads, which is not a multiple of the {k.shape[1]} heads of k and v; "
            f"each key head serves equally many query heads"
        )


def _check_numbers(scale: float | None, softcap: float | None, dropout_p: float) -> None:
    if scale is not None and not math.isfinite(scale):
        raise DilcompileError(f"scale must be a finite number, not {scale}; leave it out for D ** -0.5")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise DilcompileError(f"softcap must be a finite number above 0, not {softcap}; leave it out for no cap")
    if not 0 <= dropout_p < 1:
        raise DilcompileError(f"dropout_p must be at least 0 and below 1, not {dropout_p}")


def _check_padding(key_padding: Tensor | None, k: Tensor) -> None:
    if key_padding is None:
        return
    if key_padding.dtype != torch.bool:
        raise DilcompileError(f"key_padding must be bool (True keeps a key), not {key_padding.dtype}; compare it first")
    if key_padding.dim() != 2 or key_padding.shape[0] != k.shape[0] or key_padding.shape[1] != k.shape[2]:
        raise DilcompileError(f"key_padding must be [B, Sk] = [{k.shape[0]}, {k.shape[2]}], not {list(key_padding.shape)}")
    if key_padding.device != k.device:
        raise DilcompileError(f"key_padding is on {key_padding.device} but k is on {k.device}; move it there")


def _check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is None:
        return
    if not bias.is_floating_point():
        raise DilcompileError(f"bias must be a float tensor, not {bias.dtype}; a bool mask goes into key_padding or a form")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = bias.dim() <= 4 and all(size in (1, whole) for size, whole in zip(reversed(bias.shape), reversed(full), strict=False))
    if not fits:
        raise DilcompileError(f"bias of shape {list(bias.shape)} does not broadcast to [B, H, Sq, Sk] = {list(full)}")


def _documents(cu_seqlens: Tensor, q_len: int, k_len: int, offset: int, device: torch.device) -> Tensor:
    """The document number of each key position, int64 [1, Sk]."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        raise DilcompileError(
            f"cu_seqlens must be an int32 or int64 vector of at least 2 positions, "
            f"not {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if offset < 0 or offset + q_len > k_len:
        raise DilcompileError(
            f"cu_seqlens needs every query at a key position, but queries stand at {offset} to {offset + q_len - 1} "
            f"and there are {k_len} keys; set q_offset"
        )
    # The values are known only when running; inside a compiled graph they are the caller's promise.
    if not torch.compiler.is_compiling():
        _check_boundaries(cu_seqlens.tolist(), k_len)
    positions = torch.arange(k_len, device=device)
    return torch.searchsorted(cu_seqlens[1:].to(positions), positions, right=True)[None]


def _check_boundaries(boundaries: list[int], k_len: int) -> None:
    if boundaries[0] != 0:
        raise DilcompileError(f"cu_seqlens must start at 0, not {boundaries[0]}; it holds document starts and the end")
    if boundaries[-1] != k_len:
        raise DilcompileError(f"cu_seqlens must end at the number of keys, {k_len}, not {boundaries[-1]}")
    for index, (start, stop) in enumerate(pairwise(boundaries)):
        if stop < start:
            raise DilcompileError(f"cu_seqlens must not decrease, but cu_seqlens[{index + 1}]={stop} comes after {start}")
