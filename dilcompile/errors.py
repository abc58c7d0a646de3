"""Every error a user can see. Each says what came, where, and the cure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]


class DilcompileError(ValueError):
    """The base of all errors raised for bad input."""


class PolicyError(DilcompileError):
    """A policy that can't be read. ``problems`` holds every problem found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class OptionProblem:
    """One thing that is wrong with the options of a form.

    Args:
        at: the option, or an entry of it (``("segments", 1)``); empty: the options as a whole.
        message: what was expected and what came.
        held: what stands there, where the message doesn't say.
        about: the other places that it depends on.
    """

    at: Place
    message: str
    held: str = ""
    about: tuple[Place, ...] = ()

    def __str__(self) -> str:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.at).removeprefix(".")
        value = f"={self.held}" if self.held else ""
        return f"{place}{value} {self.message}" if place else self.message


class FormError(DilcompileError):
    """A form whose options don't fit together, or don't fit the tensors it was given.

    ``problems``: what is wrong with the options, one by one; empty where it is not about them alone.
    """

    def __init__(self, message: str, problems: Sequence[OptionProblem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message)


class KernelError(DilcompileError):
    """No kernel, or not the kernel that was asked for, can compute what was decided."""


class PlacementError(DilcompileError):
    """A sequence can't be held or moved over ranks as was asked for, or another rank is gone."""


class RewriteError(DilcompileError):
    """A site could not be rewritten and the policy says that this is an error."""


class BudgetError(DilcompileError):
    """No way to run a graph keeps the budget of memory that the policy gives it. It is raised before the graph runs.

    ``tried``: each way with what it is predicted to need (``dilcompile.memory.budget.Rung``); empty where none was.
    """

    def __init__(self, message: str, tried: Sequence[Any] = ()) -> None:
        self.tried = tuple(tried)
        super().__init__(message)


class ShardingError(DilcompileError):
    """A graph whose sequence is held by several ranks, and that would compute something else than on one.

    It is raised while the graph is compiled: the model's own graph is no way out, because it takes a shard for all there is.
    """


class DilcompileWarning(UserWarning):
    """Something was left as it was, and the policy says to tell; or a kernel was passed over because its numbers are wrong."""
