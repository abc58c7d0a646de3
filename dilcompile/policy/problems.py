"""A problem in a policy: where it is and what it is."""

from __future__ import annotations

from dataclasses import dataclass

Path = tuple[str | int, ...]


class Misfit(ValueError):
    """A value that isn't what its key takes.

    Args:
        message: what was expected and what came.
        path: where inside the value, if not the value as a whole.
        near: the value has the right type and fails a finer check, so this message beats "expected a or b".
    """

    def __init__(self, message: str, path: Path = (), near: bool = False) -> None:
        super().__init__(message)
        self.path = path
        self.near = near or bool(path)


@dataclass(frozen=True)
class Problem:
    """One line of a PolicyError, before it has a place.

    Args:
        path: keys and indices that lead to it; empty for the file as a whole.
        message: what is wrong, and the cure where it is known.
        on_key: the key itself is wrong, not its value.
        suffix: shown after the path (the form's name for what concerns a form as a whole).
    """

    path: Path
    message: str
    on_key: bool = False
    suffix: str = ""

    @property
    def text(self) -> str:
        """``path: message``, or the message alone where the file as a whole is meant."""
        shown = spell(self.path) + (f".{self.suffix}" if self.suffix else "")
        return f"{shown}: {self.message}" if shown else self.message


def spell(path: Path) -> str:
    """``("rules", 0, "match")`` as ``rules[0].match``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")
