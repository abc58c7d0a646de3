"""What an operator needs besides its results: bytes, as a number or as an expression over the lengths.

The kernel that will compute is asked, with operands that hold no data. Lengths that are symbols must become numbers first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import sympy
import torch
from sympy.core.symbol import Str
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dilcompile.lowering.call import Call
from dilcompile.lowering.ops import Operands, backward_operands, outline

_OF_SHARDED = ("attend_step", "attend_step_backward", "attend_shard", "attend_shard_backward", "merge_parts")
# What stands for a size that is a symbol, in the text of a question.
_SYMBOL = "?"


class WorkspaceBytes(sympy.Function):  # type: ignore[misc]
    """Bytes of the workspace of a call: (text of the question, sizes that are symbols). A number as soon as all of them are."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, question: Str, *sizes: sympy.Expr) -> sympy.Integer | None:
        """What the kernel says, where every size is a number."""
        return sympy.Integer(_answer(question.name, *map(int, sizes))) if all(size.is_Integer for size in sizes) else None


def of_share(share: float) -> Callable[[object, Sequence[Any], Mapping[str, Any]], sympy.Expr]:
    """``bytes_of`` with this share."""
    return partial(bytes_of, share=share)


def bytes_of(target: object, args: Sequence[Any], kwargs: Mapping[str, Any], share: float = 1.0) -> sympy.Expr:
    """Of a call in a graph; 0 where it takes none.

    Args:
        target: the operator.
        args, kwargs: its operands; tensors may hold no data.
        share: see ``Kernel.workspace_bytes``. A message is as large as it is.
    """
    if target is torch.ops.dilcompile.attention.default:
        return _of_attention(Operands(*args, **kwargs), _Asked(backward=False, bias_grad=False, share=share))
    if target is torch.ops.dilcompile.attention_backward.default:
        by_name = {name: value for name, value in kwargs.items() if name != "bias_grad"}
        given, asked = backward_operands(args[4:], kwargs.get("bias_grad", True), by_name)
        return _of_attention(given, _Asked(backward=True, bias_grad=asked, share=share, grad_lse=args[1] is not None))
    if getattr(target, "namespace", "") == "_c10d_functional":
        # Loaded for sharded graphs alone.
        from dilcompile.lowering.distributed.start import message_bytes

        return sympy.sympify(message_bytes(target, args))
    if getattr(target, "_opname", "") in _OF_SHARDED:
        from dilcompile.lowering.distributed.needs import step_bytes

        return sympy.sympify(step_bytes(target, args, share))
    return sympy.Integer(0)


def of_call(call: Call, name: str | None, backward: bool, share: float, grad_lse: bool) -> int:
    """The most that a kernel takes of those of which one will compute.

    Args:
        call: operands that hold no data.
        name: of the kernel that is asked for.
    """
    from dilcompile.lowering.select import foreseen

    return max((kernel.workspace_bytes(call, backward, share, grad_lse) for kernel in foreseen(call, name, backward)), default=0)


@dataclass(frozen=True)
class _Asked:
    """What the need of a call depends on beside its operands; of other threads the same call may need something else."""

    backward: bool
    bias_grad: bool
    share: float
    grad_lse: bool = False
    threads: int = field(default_factory=torch.get_num_threads)


def _of_attention(given: Operands, asked: _Asked) -> sympy.Expr:
    if not isinstance(given.q, Tensor):
        return sympy.Integer(0)
    sizes: list[sympy.Expr] = []
    said = {name: _said(value, sizes) for name, value in given._asdict().items() if value is not None}
    return WorkspaceBytes(Str(json.dumps([asdict(asked), said])), *sizes)


def _said(value: Any, sizes: list[sympy.Expr]) -> Any:
    """A value as JSON has it; sizes that are symbols are added to ``sizes``."""
    if isinstance(value, torch.SymInt):
        if not value.node.expr.is_Integer:
            sizes.append(value.node.expr)
            return _SYMBOL
        return int(value)
    if isinstance(value, torch.SymFloat):
        # Of the numbers no need depends on one that is a symbol.
        return 1.0
    if isinstance(value, Tensor):
        dense = value.dim() == 0 or not isinstance(value.stride(-1), int) or value.stride(-1) == 1
        return {
            "dtype": str(value.dtype),
            "device": str(value.device),
            "dense": dense,
            "shape": [_said(n, sizes) for n in value.shape],
        }
    return value


@lru_cache(maxsize=1024)
def _answer(question: str, *sizes: int) -> int:
    about, said = json.loads(question)
    asked = _Asked(**about)
    numbers = iter(sizes)
    # A trace that is under way has nothing to do with these tensors.
    with unset_fake_temporarily(), FakeTensorMode():
        given = Operands(**dict.fromkeys(Operands._fields) | {name: _meant(value, numbers) for name, value in said.items()})
        return of_call(outline(given, asked.bias_grad), given.kernel, asked.backward, asked.share, asked.grad_lse)


def _meant(value: Any, numbers: Iterator[int]) -> Any:
    if isinstance(value, dict):
        shape = [next(numbers) if size == _SYMBOL else size for size in value["shape"]]
        dtype = getattr(torch, value["dtype"].removeprefix("torch."))
        made = torch.empty(shape if value["dense"] else (*shape, 2), dtype=dtype, device=value["device"])
        return made if value["dense"] else made[..., 0]
    return next(numbers) if value == _SYMBOL else value
