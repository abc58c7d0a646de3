"""`module:function`: the model and the inputs that a command works on."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dilcompile.errors import DilcompileError

if TYPE_CHECKING:
    import torch


Traceback = Annotated[bool, typer.Option("--traceback", help="Where the user's own code fails, show the whole traceback.")]


class Example(NamedTuple):
    """A model and one call of it: ``model(*args, **kwargs)``."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def users_code(doing: str) -> Iterator[None]:
    """Whatever the user's own code raises inside becomes one line that says what it was doing; the cause has the traceback.

    Raises:
        DilcompileError: in place of the other error.
    """
    try:
        yield
    except DilcompileError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise DilcompileError(f"{doing} raised {type(error).__name__}{f': {text[0]}' if text else ''}") from error


def failed(error: DilcompileError, with_traceback: bool) -> typer.Exit:
    """Print the error's line, on request the traceback of what caused it, and give what ends the command."""
    typer.echo(str(error), err=True)
    if error.__cause__ is not None and with_traceback:
        typer.echo("".join(traceback.format_exception(error.__cause__)).rstrip(), err=True)
    elif error.__cause__ is not None:
        typer.echo("(--traceback shows where)", err=True)
    return typer.Exit(1)


def load_example(spec: str, argument: str = "--model") -> Example:
    """Call the function that ``spec`` (``package.module:function``) names; ``argument``: what errors call it.

    It returns ``(model, inputs)`` or ``(model, args, kwargs)``; inputs are a tuple of arguments, a dict of
    keyword arguments, or one tensor. Modules in the working directory are found.

    Raises:
        DilcompileError: if there is no such function, or it raises or returns something else.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise DilcompileError(f"{argument} takes module:function, got {spec!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    with users_code(f"{argument} {spec}: importing {module_name}"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Of a module of that name nothing ran; one that it imports is missing in the user's own code.
            cause = None if f"{module_name}.".startswith(f"{error.name}.") else error
            raise DilcompileError(f"{argument} {spec}: {error}") from cause
    function = getattr(module, name, None)
    if not callable(function):
        raise DilcompileError(f"{argument} {spec}: the module {module_name} has no function {name!r}")
    with users_code(f"{argument} {spec}: {name}()"):
        made = function()
    return _example(f"{argument} {spec}", made)


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
