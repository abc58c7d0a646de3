"""Direct use: one attention in a given form, without a policy or a graph. Layout [B, H, S, D] as in SDPA.

Query row i stands at key position ``i + q_offset``. The default is ``Sk - Sq``: the last query is the last key, so a decode
step (Sq = 1) is the last row of the prefill. (SDPA's ``is_causal`` counts from the top left; the two agree for Sq = Sk.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from dilcompile import arguments
from dilcompile.errors import DilcompileError, FormError
from dilcompile.forms import Form, make_form, parse_form
from dilcompile.lowering import ops, selection, token_order
from dilcompile.lowering.call import form_of, problem_of, relation_of
from dilcompile.lowering.selection import Selection

__all__ = ["Selection", "attention", "dilated_attention", "select_blocks"]


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
    block_table: Tensor | None = None,
    k_len: int | None = None,
    blocks: Selection | None = None,
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
        block_table: int32 [B, most pages], for keys and values in pages: k and v are then a pool [pages, Hkv, page size, D or Dv]
            and the key at position p of batch row b is in slot ``p % page_size`` of page ``block_table[b, p // page_size]``.
            There are no gradients then.
        k_len: with ``block_table``, the length in positions, Sk above; ``key_padding`` hides what a shorter batch row lacks.
        blocks: what stands for ``given`` in the pattern of a ``block_sparse`` form: int32 columns [B or 1, H or 1, block rows,
            capacity] and counts [B or 1, H or 1, block rows], from ``select_blocks``, ``dilcompile.nn.BlockGate`` or your own.
            Block row 0 is that of the first query. They have no gradient.

    Returns:
        out [B, H, Sq, Dv]; 0 (lse -inf) for a query that sees no key.

    Raises:
        DilcompileError: for operands that don't fit; FormError, KernelError: for the form or kernel.
    """
    scale, softcap, dropout_p, is_causal = (_fixed(x) for x in (scale, softcap, dropout_p, is_causal))
    arguments.check_operands(q, k, v, in_pages=block_table is not None)
    arguments.check_options(scale, softcap, dropout_p, is_causal, q_offset, kernel)
    arguments.check_pages(block_table, k_len, q, k)
    keys = k.shape[2] if k_len is None else k_len
    arguments.check_padding(key_padding, q, keys)
    arguments.check_bias(bias, q, keys)
    arguments.check_blocks(blocks, q)
    offset = keys - q.shape[2] if q_offset is None else q_offset
    documents = None if cu_seqlens is None else arguments.documents(cu_seqlens, q, keys, offset)
    seed = torch.randint(0, 2**62, (1,), device=q.device) if dropout_p > 0 else None
    out, lse = ops.attention(
        q,
        k,
        v,
        key_padding,
        documents,
        bias,
        seed,
        text_of(form),
        is_causal,
        None,
        None,
        offset,
        q.shape[3] ** -0.5 if scale is None else scale,
        softcap,
        dropout_p,
        kernel,
        pages=block_table,
        k_len=k_len,
        exact_lse=return_lse,
        block_columns=None if blocks is None else blocks[0],
        block_counts=None if blocks is None else blocks[1],
    )
    return (out, lse) if return_lse else out


def select_blocks(
    q: Tensor,
    k: Tensor,
    form: Form | str | Mapping[str, Any],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_padding: Tensor | None = None,
    q_offset: int | None = None,
) -> Selection:
    """The blocks that ``attention`` computes for these queries and keys, where the form leaves that to the data.

    ``Selection.pairs`` and ``Selection.density`` count what they hold. The operands are those of ``attention``. Under an order of
    tokens blocks count positions along its curve.

    Returns:
        int32 columns [B, H, block rows, capacity], ascending, and counts [B, H, block rows].

    Raises:
        DilcompileError: for operands that don't fit; FormError: if the form's blocks don't depend on queries and keys.
    """
    arguments.check_operands(q, k, k)
    arguments.check_options(scale, softcap, 0.0, is_causal, q_offset, None)
    arguments.check_padding(key_padding, q, k.shape[2])
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    problem = problem_of(q, k, k, is_causal, None, None, offset)
    whole = form_of(text_of(form))
    along = token_order.chosen_from(whole, q, k, key_padding)
    found = selection.select_blocks(relation_of(whole, problem), *along, scale, softcap)
    if found is None:
        raise FormError(f"the blocks of {text_of(form)} don't depend on the data; {{topk: ...}} and {{mass: ...}} choose them")
    return found


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
    form = {
        "form": "dilated",
        "segments": arguments.branches("segment_lengths", segment_lengths),
        "rates": arguments.branches("dilation_rates", dilation_rates),
        "offset": offset,
        "union": union,
        "heads": heads,
        "sinks": sinks,
        "local": local,
        "coverage": coverage,
        "merge_grad": merge_grad,
    }
    return attention(
        q,
        k,
        v,
        form,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        key_padding=key_padding,
        cu_seqlens=cu_seqlens,
        kernel=kernel,
        return_lse=return_lse,
    )


def text_of(form: Form | str | Mapping[str, Any]) -> str:
    """The text of what ``attention`` takes as a form."""
    text: str
    if isinstance(form, str):
        text = _parsed(form)
    elif isinstance(form, Form):
        names: tuple[str, ...] = form.__match_args__
        text = _made(form.name, tuple((name, _fixed(getattr(form, name))) for name in names))
    elif isinstance(form, Mapping) and isinstance(form.get("form"), str):
        text = _made(form["form"], tuple((option, _fixed(value)) for option, value in form.items() if option != "form"))
    else:
        raise DilcompileError(f"form must be a Form, its text, or a mapping such as {{'form': 'dense'}}, not {form!r}")
    return text


# Under torch.compile the form is a constant of the graph: it is built and checked while tracing.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> str:
    return str(make_form(name, dict(options)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _parsed(text: str) -> str:
    return str(parse_form(text))


_SCALARS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _fixed(value: Any) -> Any:
    """``value`` with the numbers that torch.compile traces as symbols made constants, by which the graph is then guarded."""
    if isinstance(value, (list, tuple)):
        return tuple([_fixed(one) for one in value])
    return guard_scalar(value) if isinstance(value, _SCALARS) else value
