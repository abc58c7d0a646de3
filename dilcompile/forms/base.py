"""What every form is: a frozen set of options that names a relation."""

from __future__ import annotations

import ast
import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dilcompile.relation import Problem, Relation

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite


@dataclass(frozen=True)
class Form(ABC):
    """A family of relations. Its fields are its options, its text (``str``) parses back with ``parse_form``."""

    name: ClassVar[str]

    @abstractmethod
    def relation(self, problem: Problem) -> Relation:
        """The relation this form means at these sizes, with the problem's own mask intersected.

        Raises:
            FormError: if the options can't be met at these sizes.
        """

    @abstractmethod
    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """``exact`` if and only if the relation is the site's own mask at every length that it may run at."""

    @abstractmethod
    def reject(self, site: AttentionSite) -> str | None:
        """Why this form can't be given to the site, or None."""

    def notes(self, site: AttentionSite) -> tuple[str, ...]:
        """What a user should know about this form on this site, though it is allowed."""
        return ()

    def __str__(self) -> str:
        changed = [
            f"{option.name}={getattr(self, option.name)!r}"
            for option in dataclasses.fields(self)
            if getattr(self, option.name) != option.default
        ]
        return f"{self.name}({', '.join(changed)})"


def parse_options(text: str) -> tuple[str, dict[str, object]]:
    """Split ``name(key=literal, ...)`` into its name and options; the inverse of ``Form.__str__``."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"not the text of a form: {text!r}")
    return call.func.id, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
