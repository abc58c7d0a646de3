"""A problem in a policy: where it is and what it is."""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def parts(self) -> tuple[Misfit, ...]:
        """Each by itself, where there are several."""
        return (self,)


class Misfits(Misfit):
    """Several at once, inside one value."""

    def __init__(self, found: Sequence[Misfit]) -> None:
        super().__init__("; ".join(map(str, found)), near=True)
        self._found = tuple(found)

    @property
    def parts(self) -> tuple[Misfit, ...]:
        """Each by itself."""
        return self._found


def raise_all(found: Sequence[Misfit]) -> None:
    """Raise what was found, if anything."""
    if found:
        raise found[0] if len(found) == 1 else Misfits(found)


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
