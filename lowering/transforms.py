"""The operators under torch's transforms: backward, forward-mode AD, and the transforms of ``torch.func``.

The autograd kernels that ``torch.library.custom_op`` makes drop forward-mode tangents without a word and refuse ``torch.func``.
The ones here are functions of a single level of transforms, which is all that a dispatcher kernel ever sees of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from dilcompile.errors import DilcompileError

# Among the operands of ``attention``: where the tensors end, where the ones with a default begin and end, the bias, dropout_p.
TENSORS, MORE, LAST, BIAS, DROPOUT = 7, 16, 20, 5, 14
# Where ``exact_lse`` stands, and where the lists of blocks begin, which end the operands.
EXACT_LSE, LISTS = 25, 26
# The operands of ``attention_backward`` that come before those of ``attention``.
UPSTREAM = 4

_DEVICES = ("CPU", "CUDA", "XPU", "MPS", "Meta", "PrivateUse1")


class _Attention(torch.autograd.Function):
    """``dilcompile::attention`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """See ``attention``."""
        # The gradient is made from the LSE.
        lists = inputs[LISTS:]
        exact = (True, *lists) if lists else ()
        out, lse = _next_level(torch.ops.dilcompile.attention.default, keyset, (*inputs[:EXACT_LSE], *exact))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*lists, *inputs[:TENSORS], *inputs[MORE:LAST], out, lse)
        ctx.options, ctx.last, ctx.num_lists = inputs[TENSORS:MORE], inputs[LAST:LISTS], len(lists)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the bias."""
        *operands, out, lse = ctx.saved_tensors
        lists, operands = operands[: ctx.num_lists], operands[ctx.num_lists :]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        operands, more = operands[:TENSORS], operands[TENSORS:]
        # The keyset stands before the inputs.
        bias_grad = ctx.needs_input_grad[1 + BIAS]
        grads = torch.ops.dilcompile.attention_backward(
            grad_out, grad_lse, out, lse, *operands, *ctx.options, *more, *ctx.last, *lists, bias_grad=bias_grad
        )
        without = [None] * (len(ctx.options) + len(more) + len(ctx.last) + len(lists))
        return (None, *grads[:3], None, None, grads[3] if bias_grad else None, None, *without)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """There is none."""
        _no_forward_mode()


class _AttentionBackward(torch.autograd.Function):
    """``dilcompile::attention_backward``, which has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See ``attention_backward``."""
        grads: tuple[Tensor, Tensor, Tensor, Tensor] = _next_level(
            torch.ops.dilcompile.attention_backward.default, keyset, inputs
        )
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        """There is none."""
        raise DilcompileError(
            "the gradient of dilcompile's attention has no gradient of its own: there are no second derivatives; "
            "keep this attention as it is (`keep` in a policy), or call scaled_dot_product_attention with SDPBackend.MATH"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """There is none."""
        _no_forward_mode()


def _no_forward_mode() -> NoReturn:
    raise DilcompileError(
        "dilcompile's attention has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, dual tensors); use reverse mode "
        "(torch.func.grad, vjp, jacrev), or leave this attention as it is"
    )


def _below_autograd(op: Any, keyset: Any, inputs: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _next_level(op: Any, keyset: Any, inputs: tuple[Any, ...]) -> Any:
    """The op for the next transform, or for no more: what a function's forward switches off is that transform's to decide."""
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(op, keyset, inputs)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(op, keyset, inputs)


def _autograd_kernel(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def kernel(keyset: Any, *inputs: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if not recorded and forward_ad._current_level < 0:
            return _below_autograd(op, keyset, inputs)
        if not torch._C._are_functorch_transforms_active():
            return function.apply(keyset, *inputs)  # type: ignore[no-untyped-call]
        # ``Function.apply`` would start over with the outermost transform; the dispatcher is at this one.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(keyset, *inputs)  # type: ignore[misc]

    return kernel


def _attention_over_batches(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """The rule of ``vmap`` for ``attention``: the mapped dim becomes part of the batch."""
    op = torch.ops.dilcompile.attention.default
    if not _folds(in_dims, inputs, 0):
        return _one_by_one(op, info.batch_size, in_dims, inputs)
    outputs = op(*_folded(info.batch_size, in_dims, inputs, 0))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)


def _backward_over_batches(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """The rule of ``vmap`` for ``attention_backward``."""
    op = torch.ops.dilcompile.attention_backward.default
    if not _folds(in_dims, inputs, UPSTREAM):
        return _one_by_one(op, info.batch_size, in_dims, inputs)
    *grads, grad_bias = op(*_folded(info.batch_size, in_dims, inputs, UPSTREAM))
    unfolded = [x.unflatten(0, (info.batch_size, -1)) for x in grads]
    bias, dim = inputs[UPSTREAM + BIAS], in_dims[UPSTREAM + BIAS]
    if bias is None or grad_bias.numel() == 0:
        return (*unfolded, grad_bias), (0, 0, 0, None)
    shape = list(bias.shape)
    if dim is not None:
        del shape[dim]
    by_sample = grad_bias.unflatten(0, (info.batch_size, -1))
    if len(shape) < 4 or shape[0] == 1:
        by_sample = by_sample.sum(1)
    return (*unfolded, by_sample.reshape(info.batch_size, *shape)), (0, 0, 0, 0)


def _folds(in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], before: int) -> bool:
    """Only operands whose first dim is the batch are mapped, and nothing is drawn by position in the batch."""
    rest = slice(before + BIAS + 1, None)
    masked_by_row = any(isinstance(x, Tensor) for x in inputs[before + MORE :])
    return not masked_by_row and inputs[before + DROPOUT] == 0 and all(dim is None for dim in in_dims[rest])


def _folded(size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], before: int) -> list[Any]:
    """The operands with the mapped dim, of this size, folded into the batch."""
    batch = inputs[before].shape[0 if in_dims[before] is None else (1 if in_dims[before] == 0 else 0)]
    found = list(inputs)
    for index, (x, dim) in enumerate(zip(inputs[: before + BIAS + 1], in_dims, strict=False)):
        if not isinstance(x, Tensor):
            continue
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        if index == before + BIAS:
            x = x.reshape(size, *([1] * (5 - x.dim())), *x.shape[1:])
        found[index] = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
    return found


def _one_by_one(op: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    def at(index: int) -> list[Any]:
        return [x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)]

    outputs = [op(*at(index)) for index in range(size)]
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def register(library: torch.library.Library) -> None:
    """Give the two operators, already defined, their rules."""
    for name, function in (("attention", _Attention), ("attention_backward", _AttentionBackward)):
        op = getattr(torch.ops.dilcompile, name).default
        # By device: the alias key of all of them holds the kernels of ``custom_op``.
        kernel = _autograd_kernel(op, function)
        for device in _DEVICES:
            library.impl(name, kernel, f"Autograd{device}", with_keyset=True)  # type: ignore[no-untyped-call]
    torch.library.register_vmap("dilcompile::attention", _attention_over_batches)
    torch.library.register_vmap("dilcompile::attention_backward", _backward_over_batches)
