"""Forms of the operators that write into memory which was there before, for graphs whose buffers are planned.

``out`` forms take their results, and where an operator needs more a workspace, of the bytes that ``workspaces.py`` says;
``within`` forms take the workspace alone. None is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering import ops
from dilcompile.lowering.call import Room

_LIBRARIES: list[torch.library.Library] = []


@cache
def register() -> None:
    """Add the forms to the operators, once."""
    define(ops.attention, ("out", "lse"), _attention, workspace=True)
    define(ops.attention_backward, ("grad_q", "grad_k", "grad_v", "grad_bias"), _attention_backward, workspace=True)


def define(op: Any, names: Sequence[str], run: Callable[..., object], workspace: bool = False) -> None:
    """Add the overload ``out`` to an operator.

    Args:
        op: the operator, as ``torch.library.custom_op`` gives it.
        names: of the tensors that it returns, none a name of an operand.
        run: called with the operands, ``Room`` first, whose results it fills; returns what the operator does.
        workspace: a last operand ``workspace``, uint8 or None, and the form ``within``.
    """
    default = op._opoverload
    space, name = default._schema.name.split("::")
    given, _, returned = str(default._schema).partition("(")[2].rpartition(" -> ")
    given = given.rpartition(")")[0]
    marks = [f"Tensor({chr(ord('a') + number)}!)" for number in range(len(names))]
    outs = [f"{mark} {out}" for mark, out in zip(marks, names, strict=True)]
    memory = ["Tensor(z!)? workspace=None"] if workspace else []

    def into(*operands: Any, workspace: Tensor | None = None, **by_name: Any) -> Any:
        results = tuple(by_name.pop(out) for out in names)
        run(Room(results, workspace), *operands, **by_name)
        return results[0] if len(results) == 1 else results

    def within(*operands: Any, workspace: Tensor | None = None, **by_name: Any) -> Any:
        return run(Room((None,) * len(names), workspace), *operands, **by_name)

    library = torch.library.Library(space, "FRAGMENT")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)
    marked = marks[0] if len(marks) == 1 else f"({', '.join(marks)})"
    forms = {"out": (f"{', '.join([*outs, *memory])}) -> {marked}", into)}
    if workspace:
        forms["within"] = (f"{memory[0]}) -> {returned}", within)
    for form, (rest, kernel) in forms.items():
        library.define(f"{name}.{form}({given}, *, {rest}")  # type: ignore[no-untyped-call]
        for device in ("CPU", "CUDA"):
            library.impl(f"{name}.{form}", kernel, device)  # type: ignore[no-untyped-call]


def _attention(room: Room, *operands: Any, **by_name: Any) -> tuple[Tensor, Tensor]:
    return ops.forward(ops.Operands(*operands, **by_name), room)


def _attention_backward(
    room: Room, *operands: Any, bias_grad: bool = True, **by_name: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, asked = ops.backward_operands(operands[4:], bias_grad, by_name)
    return ops.backward(operands[:4], given, asked, room)
