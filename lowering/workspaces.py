"""What an operator needs besides its results: bytes, as a number or as an expression over the lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from dilcompile.lowering.native.workspace import workspace_bytes
from dilcompile.lowering.ops import Operands, backward_operands


def of_share(share: float) -> Callable[[object, Sequence[Any], Mapping[str, Any]], sympy.Expr]:
    """``bytes_of`` with this share."""
    return partial(bytes_of, share=share)


def bytes_of(target: object, args: Sequence[Any], kwargs: Mapping[str, Any], share: float = 1.0) -> sympy.Expr:
    """Of a call in a graph; 0 where it takes none.

    Args:
        target: the operator.
        args, kwargs: its operands; tensors may hold no data.
        share: see ``workspace_bytes``. A message is as large as it is.
    """
    if target is torch.ops.dilcompile.attention.default:
        return _of_attention(Operands(*args, **kwargs), backward=False, bias_grad=False, share=share)
    if target is torch.ops.dilcompile.attention_backward.default:
        by_name = {name: value for name, value in kwargs.items() if name != "bias_grad"}
        given, asked = backward_operands(args[4:], kwargs.get("bias_grad", True), by_name)
        return _of_attention(given, backward=True, bias_grad=asked, share=share)
    if getattr(target, "namespace", "") == "_c10d_functional":
        # Loaded for sharded graphs alone.
        from dilcompile.lowering.distributed.start import message_bytes

        return sympy.sympify(message_bytes(target, args))
    return sympy.Integer(0)


def _of_attention(given: Operands, backward: bool, bias_grad: bool, share: float) -> sympy.Expr:
    """That of the native kernel, which computes most calls on a CPU; other kernels take what they need from torch's allocator."""
    takes = isinstance(given.q, Tensor) and given.q.device.type == "cpu" and given.kernel in (None, "native")
    if not takes or given.pages is not None or given.pairs is not None or given.flat or given.narrow:
        return sympy.Integer(0)
    return workspace_bytes(given.q, given.k, given.v, given.bias, given.softcap, given.dropout_p, backward, bias_grad, share)
