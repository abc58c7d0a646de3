"""Attention of a sequence that ranks hold in shards, forward and backward, as it stands in graphs.

Order of a site's operators: the exchange for step i + 1 is started, step i is computed, then step i + 1 is waited for. Without
prefetch the exchange is started when step i is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilcompile.lowering import ops as local
from dilcompile.lowering.call import empty_output, form_of, output_scale
from dilcompile.lowering.distributed import heads, meshes, ops, plan, tree, whole
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.lowering.distributed.plan import Plan
from dilcompile.lowering.distributed.spec import Spec, parse_spec
from dilcompile.placements.parts import share_of

Rows = tuple[Tensor, Tensor]


# Dynamo leaves it whole; AOTAutograd traces through it.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor | None]:
    """Attention of this rank's queries to the keys of the whole sequence.

    Args:
        q: [B, H, n, D]; k: [B, Hkv, n, D]; v: [B, Hkv, n, Dv]; the places of this rank. For ``tree`` q is [B, H, Sq, D], the same
            on all ranks.
        key_padding: bool [B, n], True keeps a key; or [B, length], of the whole sequence.
        documents: int64 [B or 1, n] or [B or 1, length]: document numbers, different for all documents of the whole sequence.
        row_limits: int64 [2, B or 1, n]: global positions of the first key and of that behind the last that a row sees.
        dropout_seed: int64 with one element; that of the first rank counts.
        spec: text of a ``Spec``.

    Returns:
        out as ``dilcompile::attention``; lse [B, H, n], or None where it would have to be exchanged and ``spec.lse`` is not set.
        Places without a token: 0 and -inf.

    Raises:
        PlacementError: if the placement can't be had, or another rank is gone.
    """
    said = parse_spec(spec).within(heads=int(q.shape[1]), kv_heads=int(k.shape[1]), documents=documents is not None)
    q, k, v = (autocast(x) for x in (q, k, v))
    scale, factor = local.positive_scale(said.scale, q.dtype)
    said, q = said.within(scale=scale), q if factor == 1.0 else q * factor
    # What is computed here has its dtype from here on.
    with torch._C._ExcludeDispatchKeyGuard(local.AUTOCAST_KEYS):
        return _placed(q, k, v, key_padding, documents, row_limits, dropout_seed, said)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast has for products, as SDPA's operands."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _placed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    said: Spec,
) -> tuple[Tensor, Tensor | None]:
    """By the placement that the spec names."""
    if said.placement == "tree":
        return tree.attention(q, k, v, key_padding, documents, row_limits, dropout_seed, said)
    ready = plan.make_plan(str(said), plan.sizes_of(said, k, v, cut=True))
    size = ready.sizes
    if size.ranks * size.parts == 1 and ready.shards.length == size.places:
        return _alone(q, k, v, key_padding, documents, row_limits, dropout_seed, said)
    return _sharded(q, k, v, key_padding, documents, row_limits, dropout_seed, ready)


def _alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """One rank: the ordinary operator."""
    out, lse = local.attention(
        q, k, v, key_padding, documents, None, dropout_seed, spec.form, spec.is_causal, spec.window_left, spec.window_right, 0,
        spec.scale, spec.softcap, spec.dropout_p, spec.kernel, row_limits=row_limits,
    )  # fmt: skip
    return out, lse


def _sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    ready: Plan,
) -> tuple[Tensor, Tensor | None]:
    spec, shards, text = ready.spec, ready.shards, str(ready.spec)
    keys_axis, heads_axis = plan.keys_axis(spec), plan.heads_axis(spec)
    key_padding = whole.of_ranks(key_padding, spec, shards.length, "key_padding")
    documents = whole.of_ranks(documents, spec, shards.length, "documents")
    if dropout_seed is not None:
        for axis in (heads_axis, keys_axis):
            dropout_seed = dropout_seed if axis is None else whole.of_first(dropout_seed, axis, text, "dropout seed")
    if row_limits is not None and heads_axis is not None:
        row_limits = whole.of_all_parts(row_limits, spec, "row limits")
    out, lse = _Sharded.apply(q, k, v, key_padding, documents, row_limits, dropout_seed, text)  # type: ignore[no-untyped-call]
    factor = output_scale(form_of(spec.form), shards.length)
    out = out if factor == 1.0 else out * factor
    return out, (lse if heads_axis is None or spec.lse else None)


class _Sharded(torch.autograd.Function):
    """Heads to parts, steps over ranks, and back. Masks are of the whole sequence."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Out and LSE of this rank's places."""
        spec: str = rest[-1]
        said = parse_spec(spec)
        axis = plan.heads_axis(said)
        dealt = (q, k, v) if axis is None else _to_parts(q, k, v, axis, spec)
        ready = plan.plan_of(spec, dealt[1], dealt[2])
        out, lse, kept = _forward_steps(ready, dealt, rest[:-1], spec)
        out = out.to(q.dtype)
        ctx.save_for_backward(*dealt, out, lse, *rest[:-1], *kept)
        ctx.spec, ctx.keeps = spec, [x is not None for x in kept]
        ctx.set_materialize_grads(False)
        if axis is not None:
            out, lse = _from_parts(out, lse, axis, spec)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k and v."""
        q, k, v, out, lse, *rest = ctx.saved_tensors
        spec: str = ctx.spec
        said = parse_spec(spec)
        axis = plan.heads_axis(said)
        ready = plan.plan_of(spec, k, v)
        if axis is not None:
            grad_out, grad_lse = _upstream_to_parts(grad_out, grad_lse, axis, spec)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = _backward_steps(ready, (q, k, v), (grad_out, grad_lse, out, lse), rest[:4], rest[4:], spec)
        if axis is not None:
            grads = _gradients_from_parts(grads, axis, spec)
        return (*(empty_output(x, x.shape[3], q.dtype).copy_(x) for x in grads), *[None] * 5)


def _forward_steps(
    ready: Plan, operands: tuple[Tensor, ...], masks: tuple[Tensor | None, ...], spec: str
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Out and LSE over all steps in their wide dtype, and the rows to keep for the backward."""
    q, k, v = operands
    out, lse = None, None
    kept: list[Tensor | None] = []
    prefetch = ready.spec.prefetch
    started = _start(ready, k, v, None, spec, 0, False)
    for step in range(ready.num_steps):
        received = None if started is None else wait(started)
        started = _start(ready, k, v, None, spec, step + 1, False) if prefetch else None
        out, lse = ops.attend_step(out, lse, q, k, v, *masks, received, started, spec, step)
        kept.append(None if ready.resends else received)
        if not prefetch:
            # By its place in the graph: if it read the step's result, the partitioner would leave the step in the backward.
            started = _start(ready, k, v, None, spec, step + 1, False)
    assert out is not None, "a schedule has a step"
    assert lse is not None, "a schedule has a step"
    return out, lse, kept


def _start(ready: Plan, k: Tensor, v: Tensor, after: Tensor | None, spec: str, step: int, backward: bool) -> Tensor | None:
    if step >= ready.num_steps or not ready.receives(step):
        return None
    started: Tensor = ops.exchange(k, v, after, spec, step, backward)
    return started


def _backward_steps(
    ready: Plan,
    operands: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor | None, Tensor, Tensor],
    masks: list[Tensor | None],
    kept: list[Tensor | None],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their wide dtype.

    The first step, that of own keys, comes last: what others are given back travels meanwhile. Without prefetch nothing travels
    while a step computes.
    """
    q, k, v = operands
    prefetch = ready.spec.prefetch
    behind, wide = upstream[0], upstream[3].dtype
    grad_q: Tensor | None = None
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    coming: tuple[int, Tensor] | None = None
    order = (*range(1, ready.num_steps), 0)
    started = _start(ready, k, v, behind, spec, order[0], True) if ready.resends else None
    for step, following in zip(order, (*order[1:], ready.num_steps), strict=True):
        received = kept[step]
        if ready.resends:
            received = None if started is None else wait(started)
            started = _start(ready, k, v, behind, spec, following, True) if prefetch else None
        returning = None if coming is None else coming[1]
        part = ops.attend_step_backward(*upstream, returning, q, k, v, *masks, received, started, spec, step)
        grad_q = part[0] if grad_q is None else grad_q + part[0]
        if ready.attends_own(step):
            grad_k, grad_v = grad_k + part[1], grad_v + part[2]
        # Those of the step before came while this one computed.
        grad_k, grad_v = _arrived(grad_k, grad_v, coming, spec)
        coming = (step, ops.return_gradients(part[3], k, v, spec, step)) if received is not None else None
        if not prefetch:
            grad_k, grad_v = _arrived(grad_k, grad_v, coming, spec)
            coming = None
            if ready.resends:
                started = _start(ready, k, v, grad_k, spec, following, True)
    grad_k, grad_v = _arrived(grad_k, grad_v, coming, spec)
    assert grad_q is not None, "a schedule has a step"
    return grad_q, grad_k, grad_v


def _arrived(grad_k: Tensor, grad_v: Tensor, coming: tuple[int, Tensor] | None, spec: str) -> tuple[Tensor, Tensor]:
    if coming is None:
        return grad_k, grad_v
    step, returned = coming
    sums: tuple[Tensor, Tensor] = ops.add_returned(grad_k, grad_v, wait(returned), spec, step)
    return sums


def _to_parts(q: Tensor, k: Tensor, v: Tensor, axis: str, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    parts = meshes.size_of(axis)
    share = share_of(q.shape[1], k.shape[1], parts)
    sent = (q, heads.repeat(k, share), heads.repeat(v, share))
    started = [heads.start(x, parts, axis, spec, f"{what} by heads", False) for x, what in zip(sent, "qkv", strict=True)]
    order = plan.order_of_parts(parse_spec(spec))
    q, k, v = (heads.cut(x, order) for x in started)
    return q, k, v


def _from_parts(out: Tensor, lse: Tensor, axis: str, spec: str) -> tuple[Tensor, Tensor]:
    said, parts = parse_spec(spec), meshes.size_of(axis)
    order = plan.order_of_parts(said)
    started = heads.start_back(out, parts, order, axis, spec, "output by heads", False)
    started_lse = heads.start_back(lse[..., None], parts, order, axis, spec, "LSE by heads", False) if said.lse else None
    whole_out = heads.whole(started)
    whole_out = empty_output(whole_out, whole_out.shape[3]).copy_(whole_out)
    if started_lse is None:
        # Nobody looks at it.
        return whole_out, lse.new_empty(whole_out.shape[:3])
    return whole_out, heads.whole(started_lse)[..., 0].contiguous()


def _upstream_to_parts(
    grad_out: Tensor | None, grad_lse: Tensor | None, axis: str, spec: str
) -> tuple[Tensor | None, Tensor | None]:
    said, parts = parse_spec(spec), meshes.size_of(axis)
    order = plan.order_of_parts(said)
    out = None if grad_out is None else heads.start(grad_out, parts, axis, spec, "gradient of the output by heads", True)
    lse = None
    if grad_lse is not None and said.lse:
        lse = heads.start(grad_lse[..., None], parts, axis, spec, "gradient of the LSE by heads", True)
    cut_lse = None if lse is None else heads.cut(lse, order)[..., 0].contiguous()
    return None if out is None else heads.cut(out, order), cut_lse


def _gradients_from_parts(grads: tuple[Tensor, Tensor, Tensor], axis: str, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    said, parts = parse_spec(spec), meshes.size_of(axis)
    share = share_of(said.heads, said.kv_heads, parts)
    order = plan.order_of_parts(said)
    started = [
        heads.start_back(x, parts, order, axis, spec, f"gradient of {what}", True) for x, what in zip(grads, "qkv", strict=True)
    ]
    grad_q, grad_k, grad_v = (heads.whole(x) for x in started)
    return grad_q, heads.sum_repeated(grad_k, share), heads.sum_repeated(grad_v, share)
