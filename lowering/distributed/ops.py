"""The operators that sharded attention is made of, as they stand in graphs: schemas, fakes, and who computes them.

None has a gradient of its own: ``attention.py`` writes the backward out. No number of theirs depends on the rank, so that all
ranks have one graph; what depends on it is looked up when they run. Rows lie in tensors as large as the rank with most of them
needs.

What a collective returns may be read only after ``_c10d_functional::wait_tensor``. Collectives are in that namespace because
autograd's partitioner knows them by it: it never computes one twice, and removes no wait without what it waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering.call import Room, empty_output
from dilcompile.lowering.distributed import compute, meshes, start
from dilcompile.lowering.distributed.plan import plan_of
from dilcompile.lowering.distributed.step import wide_dtype

_COLLECTIVE = "_c10d_functional::dilcompile"
# Nothing was there before.
_NOWHERE = Room()


@torch.library.custom_op(
    f"{_COLLECTIVE}_exchange",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor? after, str spec, int step, bool backward) -> Tensor",
)
def exchange(k: Tensor, v: Tensor, after: Tensor | None, spec: str, step: int, backward: bool) -> Tensor:
    """Start the transfers of a step.

    Args:
        k: [B, Hkv, n, D]; v: [B, Hkv, n, Dv]; the rank's places.
        after: what must be there before it starts, not read: in the backward what comes from behind, so that the forward has no
            part in it; without prefetch what the step before adds to.
        backward: the backward receives them again.

    Returns:
        flat, in k's dtype: what other ranks send, keys and values beside one another, see ``rows``.
    """
    return start.exchange(_NOWHERE, k, v, after, spec, step, backward)


@exchange.register_fake
def _(k: Tensor, v: Tensor, after: Tensor | None, spec: str, step: int, backward: bool) -> Tensor:
    return k.new_empty(plan_of(spec, k, v).receives(step))


@torch.library.custom_op(
    f"{_COLLECTIVE}_return_gradients", mutates_args=(), schema="(Tensor grads, Tensor k, Tensor v, str spec, int step) -> Tensor"
)
def return_gradients(grads: Tensor, k: Tensor, v: Tensor, spec: str, step: int) -> Tensor:
    """Start to send the gradients of received rows back to their owners.

    Args:
        grads: flat, laid out as what ``exchange`` returned, float32 (float64 for float64).
        k, v: as in ``exchange``, for their sizes.

    Returns:
        flat: the gradients of the rows that this rank sent in this step.
    """
    return start.return_gradients(_NOWHERE, grads, k, v, spec, step)


@return_gradients.register_fake
def _(grads: Tensor, k: Tensor, v: Tensor, spec: str, step: int) -> Tensor:
    return grads.new_empty(plan_of(spec, k, v).sends(step))


@torch.library.custom_op(
    "dilcompile::add_returned",
    mutates_args=(),
    schema="(Tensor grad_k, Tensor grad_v, Tensor returned, str spec, int step) -> (Tensor, Tensor)",
)
def add_returned(grad_k: Tensor, grad_v: Tensor, returned: Tensor, spec: str, step: int) -> tuple[Tensor, Tensor]:
    """The gradients of own keys and values with what has come back for the rows sent in a step."""
    return compute.sums(_NOWHERE, grad_k, grad_v, returned, spec, step)


@add_returned.register_fake
def _(grad_k: Tensor, grad_v: Tensor, returned: Tensor, spec: str, step: int) -> tuple[Tensor, Tensor]:
    return empty_output(grad_k, grad_k.shape[3]), empty_output(grad_v, grad_v.shape[3])


_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? documents, Tensor? row_limits, Tensor? dropout_seed, "
    "Tensor? received, Tensor? started, str spec, int step"
)


@torch.library.custom_op(
    "dilcompile::attend_step", mutates_args=(), schema=f"(Tensor? out, Tensor? lse, {_OPERANDS}) -> (Tensor, Tensor)"
)
def attend_step(*operands: Any) -> tuple[Tensor, Tensor]:
    """The rank's queries attend to the keys of a step, merged with the steps before.

    Args:
        out, lse: of the steps before, [B, H, n, Dv] and [B, H, n], float32 (float64 for float64); None in the first.
        q, k, v, key_padding, documents, row_limits, dropout_seed: see ``step.Operands``.
        received: what came for this step.
        started: the exchange for the next step, not read: it is started before this computes and waited for after that.

    Returns:
        out and lse up to this step.
    """
    return compute.step(_NOWHERE, *operands)


@attend_step.register_fake
def _(out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_output(q, v.shape[3], wide_dtype(q)), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@torch.library.custom_op(
    "dilcompile::attend_step_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? returning, {_OPERANDS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def attend_step_backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a step adds to the gradients, float32 (float64 for float64).

    Args:
        out, lse: of all steps.
        returning: gradients that are on their way since the step before, not read: they are waited for after this.

    Returns:
        gradients of q [B, H, n, D]; of k and v, empty where no rank attends to own keys in this step; of ``received``, flat,
        empty where nothing is received.
    """
    return compute.step_backward(_NOWHERE, *operands)


@attend_step_backward.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = operands[5:8]
    received, _, spec, step = operands[-4:]
    dtype = wide_dtype(q)
    own = plan_of(spec, k, v).attends_own(step)
    grad_k, grad_v = (empty_output(x, x.shape[3], dtype) if own else q.new_empty(0, dtype=dtype) for x in (k, v))
    grad_received = q.new_empty(0 if received is None else received.shape[0], dtype=dtype)
    return empty_output(q, q.shape[3], dtype), grad_k, grad_v, grad_received


@torch.library.custom_op(
    f"{_COLLECTIVE}_gather", mutates_args=(), schema="(Tensor x, str axis, str spec, str what, bool backward) -> Tensor"
)
def gather(x: Tensor, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """Start to gather equal tensors of the ranks of a mesh axis: [ranks, *x.shape]."""
    return start.gather(_NOWHERE, x, axis, spec, what, backward)


@gather.register_fake
def _(x: Tensor, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    return x.new_empty((meshes.size_of(axis), *x.shape))


@torch.library.custom_op(
    f"{_COLLECTIVE}_exchange_equal", mutates_args=(), schema="(Tensor x, str axis, str spec, str what, bool backward) -> Tensor"
)
def exchange_equal(x: Tensor, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    """Start an all-to-all over a mesh axis: ``x[i]`` goes to rank i, and what came from rank i is ``result[i]``."""
    return start.exchange_equal(_NOWHERE, x, axis, spec, what, backward)


@exchange_equal.register_fake
def _(x: Tensor, axis: str, spec: str, what: str, backward: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_SHARD = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? documents, Tensor? row_limits, Tensor? dropout_seed, str spec"
)


@torch.library.custom_op("dilcompile::attend_shard", mutates_args=(), schema=f"({_SHARD}) -> (Tensor, Tensor)")
def attend_shard(*operands: Any) -> tuple[Tensor, Tensor]:
    """Queries that all ranks have attend to the keys of this one: out and LSE, float32 (float64 for float64)."""
    return compute.shard(_NOWHERE, *operands)


@attend_shard.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_output(q, v.shape[3], wide_dtype(q)), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@torch.library.custom_op(
    "dilcompile::attend_shard_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SHARD}) -> (Tensor, Tensor, Tensor)",
)
def attend_shard_backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's summand of the gradient of q, and the gradients of its keys and values, all in the wide dtype."""
    return compute.shard_backward(_NOWHERE, *operands)


@attend_shard_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (empty_output(x, x.shape[3], wide_dtype(q)) for x in (q, k, v))
    return grad_q, grad_k, grad_v


@torch.library.custom_op("dilcompile::merge_parts", mutates_args=(), schema="(Tensor outs, Tensor lses) -> (Tensor, Tensor)")
def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One out and LSE from those over disjoint keys, [P, B, H, Sq, Dv] and [P, B, H, Sq]."""
    return compute.merge(_NOWHERE, outs, lses)


@merge_parts.register_fake
def _(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return empty_output(outs[0], outs.shape[4]), torch.empty_like(lses[0])
