"""Every error a user can see. Each says what came, where, and the cure."""

from __future__ import annotations


class DilcompileError(ValueError):
    """The base of all errors raised for bad input."""


class PolicyError(DilcompileError):
    """A policy that can't be read. ``problems`` holds every problem found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class FormError(DilcompileError):
    """A form whose options don't fit together, or don't fit the tensors it was given."""


class KernelError(DilcompileError):
    """No kernel, or not the kernel that was asked for, can compute what was decided."""


class RewriteError(DilcompileError):
    """A site could not be rewritten and the policy says that this is an error."""


class DilcompileWarning(UserWarning):
    """Something was left as it was, and the policy says to tell."""
