"""`module:function`: the model and the inputs that a command works on."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from dilcompile.errors import DilcompileError

if TYPE_CHECKING:
    import torch


class Example(NamedTuple):
    """A model and one call of it: ``model(*args, **kwargs)``."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_example(spec: str, argument: str = "--model") -> Example:
    """Call the function that ``spec`` (``package.module:function``) names; ``argument``: what errors call it.

    It returns ``(model, inputs)`` or ``(model, args, kwargs)``; inputs are a tuple of arguments, a dict of
    keyword arguments, or one tensor. Modules in the working directory are found.

    Raises:
        DilcompileError: if there is no such function, or it returns something else.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise DilcompileError(f"{argument} takes module:function, got {spec!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DilcompileError(f"{argument} {spec}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DilcompileError(f"{argument} {spec}: the module {module_name} has no function {name!r}")
    return _example(f"{argument} {spec}", function())


def _example(which: str, made: Any) -> Example:
    import torch

    wrong = f"{which}: the function must return (model, inputs) or (model, args, kwargs)"
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise DilcompileError(wrong)
    model, inputs = made[0], made[1]
    if len(made) == 3:
        if not isinstance(inputs, (tuple, list)) or not isinstance(made[2], dict):
            raise DilcompileError(wrong)
        return Example(model, tuple(inputs), made[2])
    if isinstance(inputs, torch.Tensor):
        return Example(model, (inputs,), {})
    # Tokenizers return mappings that aren't dicts.
    if hasattr(inputs, "keys"):
        return Example(model, (), {key: inputs[key] for key in inputs})
    if isinstance(inputs, (tuple, list)):
        return Example(model, tuple(inputs), {})
    raise DilcompileError(wrong)
