"""Masks of integers, ``(1 - m) * c``, are read as padding because m holds 0 and 1; the rewritten graph checks it when it runs."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.masks.read import ReadMask

_CHECKED = "dilcompile_holds_0_and_1"


def assert_binary(emit: Emitter, mask: ReadMask, module: str, bring_in: Callable[[Node], Node]) -> None:
    """Emit one check for each tensor of integers that was read so.

    The check does not wait for the device. A mask with other numbers would be a bias: it becomes an error, not a wrong result.
    """
    for node in sorted(mask.binary, key=lambda node: node.name):
        if _CHECKED in node.meta:
            continue
        node.meta[_CHECKED] = True
        held = bring_in(node)
        either = emit(aten.bitwise_or.Tensor, emit(aten.eq.Scalar, held, 0), emit(aten.eq.Scalar, held, 1))
        emit(
            aten._assert_async.msg,
            emit(aten.all.default, either),
            f"dilcompile: the padding mask {node.name} of {module or 'the model'} holds other numbers than 0 and 1, which "
            "scale or shift and don't hide; give it zeros and ones, or keep this attention as it is by a rule with form: keep",
        )
