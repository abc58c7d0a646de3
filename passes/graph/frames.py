"""Which module a graph belongs to, and which others may run it.

After a graph break torch.compile compiles inner modules as frames of their own, while the outer ones run and stand on the Python
stack. Weights are inputs of such a frame, so that one compiled frame serves every module that has the same code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator

_CALLS = frozenset(("_call_impl", "_wrapped_call_impl", "__call__"))
_COMPILED_CALL = "compile_wrapper"


@dataclass(frozen=True)
class Frame:
    """The frame that a graph was captured from.

    Args:
        prefix: path, in the compiled model, of the module whose frame it is; empty for the model's own.
        others: paths of the other modules that may run the same compiled frame.
        name: what the frame calls its module; empty if it doesn't hold it.
    """

    prefix: str = ""
    others: tuple[str, ...] = ()
    name: str = ""

    def hold(self) -> bool:
        """Let Dynamo compile the frame anew for each other module; False if nothing tells them apart in it."""
        if self.name:
            install_guard(LocalSource(self.name, is_input=True).make_guard(GuardBuilder.ID_MATCH))
        return bool(self.name)


def compiled_frame() -> Frame:
    """The frame that Dynamo is compiling; without a prefix where it compiles none, or the model's own."""
    running: list[nn.Module] = []  # inside out
    root: Any = None
    for frame in _stack():
        if frame.f_code.co_name == _COMPILED_CALL and "fn" in frame.f_locals:
            called = frame.f_locals["fn"]
            root = getattr(called, "__self__", called)
            break
        module = frame.f_locals.get("self")
        if frame.f_code.co_name in _CALLS and isinstance(module, nn.Module):
            running.append(module)
    else:
        return Frame()
    if not running:
        return Frame()
    inner, root = running[0], root if isinstance(root, nn.Module) else running[-1]
    paths: dict[str, nn.Module] = dict(root.named_modules())
    prefix = next((path for path, module in paths.items() if module is inner), "")
    if not prefix:
        return Frame()
    name = _name_of(inner)
    # A function that doesn't hold the module may be called by any.
    others = (path for path, module in paths.items() if module is not inner and (not name or type(module) is type(inner)))
    return Frame(prefix, tuple(others), name)


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _name_of(module: nn.Module) -> str:
    """The local variable of the frame being compiled that holds the module."""
    translator: Any = InstructionTranslator.current_tx()
    held = translator.output.root_tx.f_locals.items()
    return next((name for name, value in held if value is module), "")
