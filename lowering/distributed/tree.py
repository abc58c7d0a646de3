"""Tree decoding: every rank has the queries and a shard of the keys; partial results are gathered and merged (arXiv 2408.04093).

What moves is (out, lse) of the queries, in float32, however long the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dilcompile.lowering.call import empty_output, form_of, output_scale
from dilcompile.lowering.distributed import keys_shard, meshes, ops, whole
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.lowering.distributed.spec import Spec, parse_spec


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    documents: Tensor | None,
    row_limits: Tensor | None,
    dropout_seed: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Attention of queries that all ranks have; out and LSE are the same on all ranks, and so must be what comes back to them."""
    shards = keys_shard.shards_of(k, spec)
    text = str(spec)
    key_padding = whole.by_position(key_padding, shards, spec.axis, None, text, "key_padding")
    documents = whole.by_position(documents, shards, spec.axis, None, text, "documents")
    if dropout_seed is not None and shards.ranks > 1:
        dropout_seed = whole.of_first(dropout_seed, spec.axis, text, "dropout seed")
    out, lse = _Tree.apply(q, k, v, key_padding, documents, row_limits, dropout_seed, text)  # type: ignore[no-untyped-call]
    factor = output_scale(form_of(spec.form), shards.length)
    return (out if factor == 1.0 else out * factor), lse


class _Tree(torch.autograd.Function):
    """Own keys, then the merge over ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Out in q's dtype and the LSE."""
        spec: str = rest[-1]
        said = parse_spec(spec)
        out, lse = ops.attend_shard(q, k, v, *rest)
        if meshes.size_of(said.axis) > 1:
            started = [
                ops.gather(x, said.axis, spec, what, False) for x, what in ((out, "partial outputs"), (lse, "partial LSE"))
            ]
            out, lse = ops.merge_parts(*(wait(x) for x in started))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *rest[:-1])
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, summed over ranks, and of own keys and values."""
        q, k, v, out, lse, *masks = ctx.saved_tensors
        axis = parse_spec(ctx.spec).axis
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_q, grad_k, grad_v = ops.attend_shard_backward(grad_out, grad_lse, out, lse, q, k, v, *masks, ctx.spec)
        if meshes.size_of(axis) > 1:
            grad_q = wait(ops.gather(grad_q, axis, ctx.spec, "gradients of queries", True)).sum(0)
        grads = ((grad_q, q), (grad_k, k), (grad_v, v))
        return (*(empty_output(x, x.shape[3]).copy_(grad) for grad, x in grads), *[None] * 5)
