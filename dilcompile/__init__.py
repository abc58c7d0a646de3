"""A torch.compile backend that rewrites the attention of an unmodified model by policy.

``torch.compile(model, backend="dilated")`` finds the backend by its entry point; nothing here needs to be imported for it.
The names below are loaded when they are first used. The operators are registered at once, because a saved or exported program
that holds them can only be loaded after that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import dilcompile.lowering.ops as _registered  # noqa: F401

if TYPE_CHECKING:
    import dilcompile.distributed as distributed
    import dilcompile.forms as forms
    import dilcompile.functional as functional
    import dilcompile.nn as nn
    from dilcompile.convert import convert
    from dilcompile.errors import (
        DilcompileError,
        DilcompileWarning,
        FormError,
        KernelError,
        PlacementError,
        PolicyError,
        RewriteError,
    )
    from dilcompile.exported import rewrite_exported
    from dilcompile.inspect import explain
    from dilcompile.policy import Policy

__version__ = "0.1.0"

__all__ = [
    "DilcompileError",
    "DilcompileWarning",
    "FormError",
    "KernelError",
    "PlacementError",
    "Policy",
    "PolicyError",
    "RewriteError",
    "convert",
    "distributed",
    "explain",
    "forms",
    "functional",
    "nn",
    "rewrite_exported",
]

# name -> the module that holds it
_HOME = {
    "DilcompileError": "dilcompile.errors",
    "DilcompileWarning": "dilcompile.errors",
    "FormError": "dilcompile.errors",
    "KernelError": "dilcompile.errors",
    "PlacementError": "dilcompile.errors",
    "Policy": "dilcompile.policy",
    "PolicyError": "dilcompile.errors",
    "RewriteError": "dilcompile.errors",
    "convert": "dilcompile.convert",
    "explain": "dilcompile.inspect",
    "rewrite_exported": "dilcompile.exported",
}
_MODULES = ("distributed", "forms", "functional", "nn")


def __getattr__(name: str) -> object:
    if name in _HOME:
        found: object = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        found = importlib.import_module(f"dilcompile.{name}")
    else:
        raise AttributeError(f"module 'dilcompile' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
