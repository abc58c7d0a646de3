"""Triton's interpreter without work of its own that changes no number: two thirds of the time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def leave_out_what_changes_nothing() -> None:
    """A launch patches Triton's language for its time; calls of functions inside would look through all of it again, each time.

    And each sum of int32 is made again in int64, compared, and the outcome thrown away, because no debugging is asked for.
    """
    assert not interpreter.interpreter_builder.options.debug, "overflows are reported where debugging is asked for"
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls; what it raises is wrapped by the launch."""
    if any(tl.core.is_builtin(language.arange) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


@cache
def _languages(fn: Any) -> tuple[Any, ...]:
    """Those that are patched for a function: Triton's own functions see another module than kernels do."""
    return tuple(language for language in (tl, tl.core) if any(seen is language for seen in fn.__globals__.values()))
