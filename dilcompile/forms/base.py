"""What every form is: a frozen set of options that names a relation."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dilcompile.errors import FormError, OptionProblem, Place
from dilcompile.relation import Problem, Relation

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite


@dataclass(frozen=True, eq=False)  # by identity: annotations are hashed, and a schema's value may be a dict
class Says:
    """What the JSON schema of policies says of an option beyond its type; ``problems`` is what checks it.

    Args:
        keyword: of JSON Schema, such as ``minimum``.
        value: what the keyword says.
    """

    keyword: str
    value: Any

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        """What pydantic asks of annotations that describe themselves."""
        return {**handler(core), self.keyword: self.value}


@dataclass(frozen=True)
class Unmet:
    """Options that self-attention of more than ``above`` positions can't meet, whatever the model.

    Args:
        above: 0: no length can.
        reason: why, and the cure.
    """

    above: int
    reason: str


Positive = Annotated[int, Says("minimum", 1)]
NotNegative = Annotated[int, Says("minimum", 0)]


@dataclass(frozen=True)
class Form(ABC):
    """A family of relations. Its fields are its options, its text (``str``) parses back with ``parse_form``."""

    name: ClassVar[str]
    # Options that are lists of one entry a branch, all of them or none.
    paired: ClassVar[tuple[str, ...]] = ()
    # Fields that ``settled`` takes from the site; they are no keys of a policy.
    from_site: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        found = self.problems()
        if found:
            raise FormError(f"form {self.name}: {'; '.join(map(str, found))}", found)

    def problems(self) -> list[OptionProblem]:
        """Everything that is wrong with the options."""
        return []

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

    def unmet(self, causal: bool) -> Unmet | None:
        """What the options alone say about the lengths that they can't be met at; None where they say nothing."""
        return None

    def settled(self, site: AttentionSite) -> Form:
        """The form with what it takes from the site written out, for a site that it does not reject."""
        return self

    @property
    def made_for(self) -> int | None:
        """A number of query heads that it can be given to; None: any."""
        return None

    @property
    def holds_chunks(self) -> bool:
        """Whether no pair leaves the site's own chunks, so that its mask need not say them again."""
        return False

    def notes(self, site: AttentionSite) -> tuple[str, ...]:
        """What a user should know about this form on this site, though it is allowed."""
        return ()

    def plain(self) -> dict[str, Any]:
        """The options that are not their defaults, as a policy writes them."""
        # A default is an attribute of the class; read there because Dynamo can't trace dataclasses' MISSING.
        return {
            option: getattr(self, option)
            for option in self.__dataclass_fields__
            if getattr(self, option) != getattr(type(self), option, ...)
        }

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{option}={held!r}' for option, held in self.plain().items())})"


def parse_options(text: str) -> tuple[str, dict[str, object]]:
    """Split ``name(key=literal, ...)`` into its name and options; the inverse of ``Form.__str__``."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"not the text of a form: {text!r}")
    return call.func.id, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


# More than the length of any sequence; kernels compute with it in 64 bits.
_FAR = 2**48


def not_integer(at: Place, value: object, least: int) -> list[OptionProblem]:
    """The problem, unless ``value`` is an int (bool is not) of at least ``least`` and a length that a sequence may have."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        return [OptionProblem(at, f"must be a whole number of at least {least}, not {value!r}")]
    return [] if value <= _FAR else [OptionProblem(at, f"must be at most 2**48, longer than any sequence, not {value!r}")]


def not_one_of(at: Place, value: object, allowed: tuple[str, ...]) -> list[OptionProblem]:
    """The problem, unless ``value`` is one of ``allowed``."""
    return [] if value in allowed else [OptionProblem(at, f"must be one of {', '.join(allowed)}, not {value!r}")]


def unread_mask(site: AttentionSite) -> str | None:
    """The reason why a site with a mask known only as a tensor keeps its form, or None."""
    if site.mask.unread is None:
        return None
    return f"its mask could not be read ({site.mask.unread}): it stays a tensor over all pairs, which only `keep` can take"


def cross_site(site: AttentionSite) -> str | None:
    """The reason why a form of distances can't be given to cross attention, or None."""
    if site.kind == "self":
        return None
    return "it is cross attention: query and key positions are not those of one sequence"
