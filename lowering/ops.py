"""The operators ``dilcompile::attention`` and ``dilcompile::attention_backward``: schema, fakes, autocast, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dilcompile.errors import FormError, KernelError
from dilcompile.lowering import operands, reference, token_order, transforms, triton
from dilcompile.lowering.call import (
    Call,
    Room,
    empty_output,
    form_of,
    merge_grad,
    output_scale,
    problem_of,
    relation_of,
)
from dilcompile.lowering.pairs import Pairs
from dilcompile.lowering.selection import Selection, adaptive_blocks, select_blocks, unchosen
from dilcompile.relation import Problem, Relation

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? documents, Tensor? bias, Tensor? dropout_seed, str form, "
    "bool is_causal, int? window_left, int? window_right, SymInt q_offset, float scale, float? softcap, float dropout_p, "
    "str? kernel, Tensor? q_start=None, Tensor? row_limits=None, Tensor? row_terms=None, Tensor? key_terms=None, "
    "str? pairs=None, bool flat=False, bool narrow=False, Tensor? pages=None, SymInt? k_len=None, bool exact_lse=True, "
    "Tensor? block_columns=None, Tensor? block_counts=None"
)


class Operands(NamedTuple):
    """The operands of ``dilcompile::attention``, in the order of its schema.

    Args:
        q: [B, H, Sq, D], k: [B, Hkv, Sk, D], v: [B, Hkv, Sk, Dv]; one float dtype; any strides.
        key_padding, documents, bias, dropout_seed: see ``Call``.
        form: the text of the form.
        is_causal, window_left, window_right: the site's own mask, intersected; query row i stands at ``i + q_offset``.
        scale: factor on q . k; softcap: ``c * tanh(s / c)`` on the scaled scores, before the bias.
        kernel: name of a kernel, or None for the fastest.
        q_start: int64 with one element, added to ``q_offset``: a position that is known when the model runs.
        row_limits: see ``Call``.
        row_terms, key_terms, pairs: the formula over pairs and its terms, see ``Pairs``.
        flat, narrow: see ``Call``.
        pages: see ``Call``; k_len: Sk, needed with pages and given with nothing else.
        exact_lse: see ``Call``; where gradients are recorded it is exact in any case.
        block_columns, block_counts: the lists of ``Selection`` that stand for ``given`` in the form's pattern.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None
    documents: Tensor | None
    bias: Tensor | None
    dropout_seed: Tensor | None
    form: str
    is_causal: bool
    window_left: int | None
    window_right: int | None
    q_offset: int
    scale: float
    softcap: float | None
    dropout_p: float
    kernel: str | None
    q_start: Tensor | None = None
    row_limits: Tensor | None = None
    row_terms: Tensor | None = None
    key_terms: Tensor | None = None
    pairs: str | None = None
    flat: bool = False
    narrow: bool = False
    pages: Tensor | None = None
    k_len: int | None = None
    exact_lse: bool = True
    block_columns: Tensor | None = None
    block_counts: Tensor | None = None


@torch.library.custom_op("dilcompile::attention", mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor out, Tensor lse)")
def attention(*operands: Any, **by_name: Any) -> tuple[Tensor, Tensor]:
    """Softmax over the relation that ``form`` means here; see ``Operands``.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, in memory [B, Sq, H, Dv]; lse [B, H, Sq], natural log, float32 (float64 for float64).
        Rows without keys: 0 and -inf.

    Raises:
        FormError, KernelError: if the form or the kernel can't be had at these operands.
    """
    return forward(Operands(*operands, **by_name))


def forward(given: Operands, room: Room | None = None) -> tuple[Tensor, Tensor]:
    """``dilcompile::attention``; into the results of the room, where there is one."""
    from dilcompile.lowering.select import select

    operands.check_products(given.q, given.k, given.v, given.pages is not None)
    operands.check_scores(given.softcap, given.dropout_p)
    scale, factor = positive_scale(given.scale, given.q.dtype)
    call = _call(given._replace(scale=scale, q=given.q if factor == 1.0 else given.q * factor))
    form = form_of(given.form)
    chosen = select(call, given.kernel)
    out, lse = token_order.forward(chosen, replace(call, room=room), form)
    of_output = output_scale(form, call.problem.k_len)
    results = (None, None) if room is None else room.results
    out = _laid_out(out, given.q, results[0])
    return (out if of_output == 1.0 else out.mul_(of_output)), lse if results[1] is None else _copied(lse, results[1])


@torch.library.custom_op(
    "dilcompile::attention_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_OPERANDS}, bool bias_grad=True) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)"
    ),
)
def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *operands: Any, bias_grad: bool = True, **by_name: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [as their operand, laid out [B, S, H, D]] and of the bias (an empty tensor without one)."""
    given, asked = backward_operands(operands, bias_grad, by_name)
    return backward((grad_out, grad_lse, out, lse), given, asked)


def backward_operands(operands: Sequence[Any], bias_grad: bool, by_name: Mapping[str, Any]) -> tuple[Operands, bool]:
    """What follows ``lse`` in the schema of ``attention_backward``: the operands, and whether the bias has a gradient."""
    last = len(Operands._fields)
    return Operands(*operands[:last], **by_name), bool(operands[last]) if len(operands) > last else bias_grad


def backward(
    upstream: tuple[Tensor, Tensor | None, Tensor, Tensor], given: Operands, bias_grad: bool, room: Room | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dilcompile::attention_backward`` of (grad_out, grad_lse, out, lse); into the results of the room, where there is one."""
    from dilcompile.lowering.select import select

    if given.pages is not None:
        raise KernelError(
            "keys and values in pages have no gradient: a cache is not trained; call under torch.no_grad(), or gather the pages "
            "(k[block_table].transpose(1, 2).flatten(2, 3)) and leave block_table out"
        )

    grad_out, grad_lse, out, lse = upstream
    operands.check_products(given.q, given.k, given.v, False)
    operands.check_scores(given.softcap, given.dropout_p)
    scale, factor = positive_scale(given.scale, given.q.dtype)
    scaled = given._replace(scale=scale, q=given.q if factor == 1.0 else given.q * factor, exact_lse=True)
    call, form = _call(scaled, bias_grad), form_of(given.form)
    of_output = output_scale(form, given.k.shape[2])
    if of_output != 1.0:
        grad_out, out = grad_out * of_output, out / of_output
    chosen = select(call, given.kernel, backward=True)
    if chosen is not triton and _swallows(call, lse):
        chosen = reference
    grads = token_order.backward(chosen, replace(call, room=room), out, lse, grad_out, grad_lse, form)
    results = (None,) * 4 if room is None else room.results
    likes = (given.q, given.k, given.v)
    shaped = [_laid_out(grad, like, result) for grad, like, result in zip(grads[:3], likes, results[:3], strict=True)]
    if factor != 1.0:
        shaped[0].mul_(factor)
    if given.bias is None or not bias_grad or grads[3] is None:
        grad_bias = given.q.new_empty(0) if results[3] is None else results[3]
    else:
        grad_bias = grads[3].contiguous() if results[3] is None else _copied(grads[3], results[3])
    return shaped[0], shaped[1], shaped[2], grad_bias


def _swallows(call: Call, lse: Tensor) -> bool:
    """Does a row see nothing but a fill so large that its LSE can't hold the logarithm of the number of keys?

    Weights made from such an LSE are 1 where they are 1 / n. The reference computes them anew, the Triton kernel what the LSE
    lacks. On a CUDA device nobody looks, because the answer would have to be waited for (docs/limits.md).
    """
    if call.bias is None or call.q.device.type != "cpu":
        return False
    digit = torch.finfo(lse.dtype).eps
    return bool(((lse.abs() > _LOST / digit) & lse.isfinite()).any())


# Of a weight: what a digit of the LSE may be worth.
_LOST = 1e-3


def positive_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """A scale above 0, and the factor on q that makes up for it.

    Flash ops fill hidden scores with -inf before they scale them, so a scale that is not above 0 in the dtype that they
    compute in gives NaN or shows the hidden pairs.
    """
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    if abs(scale) < least:
        return 1.0, scale
    return (-scale, -1.0) if scale < 0 else (scale, 1.0)


def _call(given: Operands, bias_grad: bool = True) -> Call:
    q, k = given.q, given.k
    first = given.q_offset if given.q_start is None else given.q_offset + int(given.q_start)
    keys = k.shape[2] if given.k_len is None else given.k_len
    operands.check_masks(q, keys, given.key_padding, given.documents, given.bias, given.row_limits)
    call, form = _bound(given, bias_grad, first), form_of(given.form)
    _refuse_to_select(call.relation, given.documents is not None, given.pages is not None)
    chooses = adaptive_blocks(call.relation) is not None
    along = token_order.chosen_from(form, q, k, given.key_padding) if chooses else (q, k, given.key_padding)
    lists = _given(given.block_columns, given.block_counts)
    return replace(call, selection=select_blocks(call.relation, *along, given.scale, given.softcap, lists))


def outline(given: Operands, bias_grad: bool) -> Call:
    """The call of operands that may hold no data, without what only data says: which blocks are chosen, and ``q_start``."""
    call = _bound(given._replace(scale=positive_scale(given.scale, given.q.dtype)[0]), bias_grad, given.q_offset)
    return call if adaptive_blocks(call.relation) is None else replace(call, selection=unchosen(given.q))


def _bound(given: Operands, bias_grad: bool, first: int) -> Call:
    """The operands and the relation, with the first query at this position; no blocks are chosen."""
    q, k, v, softcap, dropout_p = given.q, given.k, given.v, given.softcap, given.dropout_p
    pages, k_len = given.pages, given.k_len
    assert (pages is None) == (k_len is None), "pages and k_len, the length in positions, come together"
    assert pages is None or k_len is None or k_len <= pages.shape[1] * k.shape[2], "the pages hold fewer than k_len positions"
    problem = problem_of(q, k, v, given.is_causal, given.window_left, given.window_right, first, k_len)
    formula = None
    if given.pairs is not None:
        assert given.row_terms is not None, "a formula over pairs needs its rows' terms"
        assert given.key_terms is not None, "a formula over pairs needs its keys' terms"
        formula = Pairs(given.pairs, given.row_terms, given.key_terms)
    form = form_of(given.form)
    return Call(
        q, k, v, given.key_padding, given.documents, given.bias, given.dropout_seed, relation_of(form, problem), given.scale,
        softcap, dropout_p, merge_grad(form), given.row_limits, formula, given.flat, given.narrow, bias_grad, pages,
        # In q's own dtype is exact where scores are not wider.
        given.exact_lse or q.dtype in (torch.float32, torch.float64),
    )  # fmt: skip


def _given(columns: Tensor | None, counts: Tensor | None) -> Selection | None:
    assert (columns is None) == (counts is None), "block_columns and block_counts come together"
    return None if columns is None or counts is None else Selection(columns, counts)


def _refuse_to_select(relation: Relation, documents: bool, pages: bool) -> None:
    if (documents or pages) and adaptive_blocks(relation) is not None:
        came, cure = ("packed documents", "a pattern without data") if documents else ("pages", "k and v in one piece")
        raise FormError(f"{relation} chooses blocks from the data, over whole sequences, but {came} came; give {cure}")


def _laid_out(x: Tensor, like: Tensor, into: Tensor | None = None) -> Tensor:
    """``x`` in ``like``'s dtype, in the memory given for it or in the memory layout that the fake promises."""
    if into is not None:
        return _copied(x, into)
    _, heads, rows, dim = x.shape
    dense = (rows * heads * dim, dim, heads * dim, 1)
    if x.stride() == dense and x.dtype == like.dtype:
        return x
    return empty_output(like, dim).copy_(x)


def _copied(x: Tensor, into: Tensor) -> Tensor:
    """The numbers of ``x`` in ``into``, where a kernel may have written them already."""
    there = x.data_ptr() == into.data_ptr() and x.stride() == into.stride() and x.dtype == into.dtype
    return into if there else into.copy_(x)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_output(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
    bias_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = bias_grad and (len(rest) <= _BIAS_GRAD or rest[_BIAS_GRAD])
    grad_bias = q.new_empty(0) if bias is None or not asked else bias.new_empty(bias.shape)
    return empty_output(q, q.shape[3]), empty_output(k, k.shape[3]), empty_output(v, v.shape[3]), grad_bias


# Where the backward's last argument stands among those after the bias.
_BIAS_GRAD = 22


def _register_autocast() -> torch.library.Library:
    """Cast q, k and v as SDPA does: to the dtype that autocast has when the call runs.

    ``torch.library.register_autocast`` fixes the dtype at registration, so the kernel is written out here.
    """
    library = torch.library.Library("dilcompile", "FRAGMENT")  # type: ignore[no-untyped-call]

    def cast(device: str, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        eligible = [x.is_floating_point() and x.dtype != torch.float64 for x in args[:3]]
        cast_args = [x.to(dtype) if fits else x for x, fits in zip(args[:3], eligible, strict=True)]
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return torch.ops.dilcompile.attention.default(*cast_args, *args[3:], **kwargs)

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(  # type: ignore[no-untyped-call]
            "attention", lambda *a, _device=device, **k: cast(_device, *a, **k), key, with_keyset=True
        )
    return library


AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
_LIBRARY = _register_autocast()
transforms.register(_LIBRARY)


# Where k_len stands among the operands from the form on.
_K_LEN = 17


def _flops(shapes: Sequence[Any], options: Sequence[Any], backward: bool) -> int:
    q, k, v = shapes[:3]
    form, is_causal, window_left, window_right, q_offset = options[:5]
    keys = options[_K_LEN] if len(options) > _K_LEN else None
    keys = k[2] if keys is None else keys
    problem = Problem(q[0], q[1], k[1], q[2], keys, q[3], v[3], q_offset, is_causal, window_left, window_right)
    return relation_of(form_of(form), problem).flops(backward)


@register_flop_formula(torch.ops.dilcompile.attention)
def _attention_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of the relation's pairs; key padding and documents, known only at run time, are not taken off."""
    return _flops(args[:3], args[7:], backward=False)


@register_flop_formula(torch.ops.dilcompile.attention_backward)
def _attention_backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _flops(args[4:7], args[11:], backward=True)
