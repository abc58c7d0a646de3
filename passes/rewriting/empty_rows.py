"""Emit the attention call, and what rows become that see no key: what the model's own spelling makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from dilcompile.passes.finding.match import Match
from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.masks.operands import MaskOperands
from dilcompile.passes.masks.read import Others
from dilcompile.passes.rewriting.biases import Biases
from dilcompile.site import AttentionSite, MaskSpec


@dataclass(frozen=True)
class Inputs:
    """Operands of ``dilcompile::attention`` but for the mask: q, k, v [B, H or Hkv, S, D], biases, dropout seed, and whether
    the softmax is ``narrow`` (see ``Call``)."""

    q: Node
    k: Node
    v: Node
    biases: Biases
    seed: Node | None
    narrow: bool = False


def attend(
    emit: Emitter,
    inputs: Inputs,
    mask: MaskOperands,
    spec: MaskSpec,
    site: AttentionSite,
    form: str,
    kernel: str | None,
    flat: bool = False,
    exact_lse: bool = True,
) -> Node:
    """One call of the operator: (out, lse)."""
    return emit(
        torch.ops.dilcompile.attention.default,
        inputs.q,
        inputs.k,
        inputs.v,
        mask.key_padding,
        mask.documents,
        inputs.biases.total,
        inputs.seed,
        form,
        spec.causal,
        spec.left,
        spec.right,
        emit.offset(spec.q_offset, inputs.q, inputs.k),
        site.scale,
        site.softcap,
        site.dropout_p,
        kernel,
        mask.start,
        mask.limits,
        mask.row_terms,
        mask.key_terms,
        mask.pairs,
        *((flat, inputs.narrow) if flat or inputs.narrow else ()),
        **({} if exact_lse else {"exact_lse": False}),
    )


def rows_without_keys(emit: Emitter, out: Node, lse: Node, inputs: Inputs, match: Match, others: Sequence[MaskOperands]) -> Node:
    """The output with the rows that saw nothing as the model has them.

    Args:
        others: the keys that such rows see instead, in turn; none where they become NaN or the mean of all values.
    """
    site = match.site
    empty = emit(aten.eq.Scalar, lse, float("-inf"))
    stages: list[list[tuple[MaskOperands, Others]]] = []
    for mask, instead in zip(others, match.mask.others, strict=True):
        if not instead.joins:
            stages.append([])
        stages[-1].append((mask, instead))
    for stage in stages:
        out, empty = _by_others(emit, out, empty, inputs, site, stage)
    if others:
        if match.mask.others[-1].mask.spec.empty_rows != "nan":
            return out
        return emit(aten.masked_fill.Scalar, out, emit(aten.unsqueeze.default, empty, -1), float("nan"))
    empty = emit(aten.unsqueeze.default, empty, -1)
    if site.mask.empty_rows == "nan":
        return emit(aten.masked_fill.Scalar, out, empty, float("nan"))
    mean = _uniform_mean(emit, inputs, site)
    if site.group > 1:
        mean = emit(aten.repeat_interleave.self_int, mean, site.group, 1)
    if site.mask.empty_rows == "shifted":
        mean = emit(aten.add.Tensor, mean, _uniform_slope(emit, inputs.q, inputs.k, inputs.v, site))
    return emit(aten.where.self, empty, mean, out)


def _uniform_mean(emit: Emitter, inputs: Inputs, site: AttentionSite) -> Node:
    """The values [B, Hkv, 1, Dv] by weights that are all alike."""
    if not inputs.narrow:
        return emit(aten.mean.dim, inputs.v, [2], True)
    length = emit(aten.full.default, [], emit.size(site.k_len), dtype=torch.float32, device=site.device)
    weight = emit(aten.to.dtype, emit(aten.reciprocal.default, length), torch.float64)
    return emit(aten.mul.Tensor, emit(aten.sum.dim_IntList, inputs.v, [2], True), weight)


def _by_others(
    emit: Emitter,
    out: Node,
    empty: Node,
    inputs: Inputs,
    site: AttentionSite,
    stage: Sequence[tuple[MaskOperands, Others]],
) -> tuple[Node, Node]:
    """More calls in which all other rows see nothing, so that they cost nothing where no row is empty: (out, empty)."""
    calls = [_call_of_others(emit, empty, inputs, site, mask, instead) for mask, instead in stage]
    found, seen = calls[0] if len(calls) == 1 else _joined(emit, calls)
    still = emit(aten.logical_and.default, empty, emit(aten.eq.Scalar, seen, float("-inf")))
    return emit(aten.where.self, emit(aten.unsqueeze.default, empty, -1), found, out), still


def _joined(emit: Emitter, calls: Sequence[tuple[Node, Node]]) -> tuple[Node, Node]:
    """One softmax over the keys of several calls: (out, the largest lse), with gradients through the weights of each."""
    most = calls[0][1]
    for _, lse in calls[1:]:
        most = emit(aten.maximum.default, most, lse)
    most = emit(aten.detach.default, most)
    # exp(-inf - 0) is 0 and has a gradient, exp(-inf + inf) has none.
    base = emit(aten.masked_fill.Scalar, most, emit(aten.eq.Scalar, most, float("-inf")), 0.0)
    out = total = None
    for part, lse in calls:
        weight = emit(aten.exp.default, emit(aten.sub.Tensor, lse, base))
        part = emit(aten.mul.Tensor, part, emit(aten.to.dtype, emit(aten.unsqueeze.default, weight, -1), part.meta["val"].dtype))
        out = part if out is None else emit(aten.add.Tensor, out, part)
        total = weight if total is None else emit(aten.add.Tensor, total, weight)
    assert out is not None
    assert total is not None
    total = emit(aten.masked_fill.Scalar, total, emit(aten.eq.Scalar, total, 0.0), 1.0)
    total = emit(aten.to.dtype, emit(aten.unsqueeze.default, total, -1), out.meta["val"].dtype)
    return emit(aten.div.Tensor, out, total), most


def _call_of_others(
    emit: Emitter, empty: Node, inputs: Inputs, site: AttentionSite, mask: MaskOperands, instead: Others
) -> tuple[Node, Node]:
    """A call that only the rows without keys take part in: (out, lse)."""
    rows, ends = emit(aten.any.dim, empty, 1), []
    for number, limit in enumerate((0, emit.size(site.k_len))):
        if mask.limits is None:
            end = emit(aten.full.default, [1, 1], limit, dtype=torch.int64, device=site.device)
        else:
            end = emit(aten.select.int, mask.limits, 0, number)
        ends.append(emit(aten.mul.Tensor, end, rows))
    limited = replace(mask, limits=emit(aten.stack.default, ends))
    call = attend(emit, _kept(emit, inputs, instead), limited, instead.mask.spec, site, "dense()", None, instead.flat)
    return emit.item(call, 0), emit.item(call, 1)


def _kept(emit: Emitter, inputs: Inputs, instead: Others) -> Inputs:
    """The operands of the second call: those whose gradient the fills cut off are constants."""
    q, k, plain = inputs.q, inputs.k, inputs.biases.plain
    if instead.gradient not in ("all", "scores"):
        q, k = emit(aten.detach.default, q), emit(aten.detach.default, k)
    if not instead.flat:
        return replace(inputs, q=q, k=k, biases=Biases(plain))
    total = inputs.biases.levels
    if plain is not None and instead.gradient in ("all", "bias"):
        # It is swallowed like the scores; what is left of it is its gradient.
        slope = emit(aten.sub.Tensor, plain, emit(aten.detach.default, plain))
        total = slope if total is None else emit(aten.add.Tensor, total, slope)
    return replace(inputs, q=q, k=k, biases=Biases(total))


def _uniform_slope(emit: Emitter, q: Node, k: Node, v: Node, site: AttentionSite) -> Node:
    """Zero, with the gradient in q and k of a uniform softmax: ``scale * sum_k (q . (k - mean k)) v_k / Sk``."""
    centred = emit(aten.sub.Tensor, k, emit(aten.mean.dim, k, [2], True))
    mixed = emit(aten.matmul.default, emit(aten.transpose.int, centred, 2, 3), emit(aten.detach.default, v))
    slope = emit(aten.div.Tensor, mixed, emit.size(site.k_len))
    if site.group > 1:
        slope = emit(aten.repeat_interleave.self_int, slope, site.group, 1)
    value = emit(aten.mul.Scalar, emit(aten.matmul.default, q, slope), site.scale)
    return emit(aten.sub.Tensor, value, emit(aten.detach.default, value))
