"""Triton's interpreter without work of its own that changes no number (two thirds of the time), and with products that don't depend
on the BLAS that numpy was built with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def leave_out_what_changes_nothing() -> None:
    """A launch patches Triton's language for its time; calls of functions inside would look through all of it again, each time.

    And each sum of int32 is made again in int64, compared, and the outcome thrown away, because no debugging is asked for.
    """
    assert not interpreter.interpreter_builder.options.debug, "overflows are reported where debugging is asked for"
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call


def round_products_once() -> None:
    """A product of tiles is rounded once. numpy's own has an error of its BLAS and the processor's, some of them over the bound."""
    of_numpy = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if d.data.dtype != np.float32:
            return of_numpy(self, a, b, d, input_precision, max_num_imprecise_acc)
        wide = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(wide.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls; what it raises is wrapped by the launch."""
    if any(tl.core.is_builtin(language.arange) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


@cache
def _languages(fn: Any) -> tuple[Any, ...]:
    """Those that are patched for a function: Triton's own functions see another module than kernels do."""
    return tuple(language for language in (tl, tl.core) if any(seen is language for seen in fn.__globals__.values()))
