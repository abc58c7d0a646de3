"""Keep structure: what the model computes anyway, at the cost of the pairs that its own mask shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from dilcompile.errors import OptionProblem
from dilcompile.forms.base import Form, Positive, not_integer
from dilcompile.forms.dense import Dense
from dilcompile.generators import Segment
from dilcompile.relation import Problem, Relation, Term

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite, MaskSpec

_BY_ROW = {"prefix": "prefix", "rows": "one run of keys for each query"}
_BY_PAIR = {"label": "labels", "pairs": "comparisons of queries with keys", "other": "a mask that stays a tensor"}


@dataclass(frozen=True)
class KeepStructure(Form):
    """The pairs of the model's own mask: its window, its chunks, its packed documents are computed, and nothing around them.

    Args:
        chunk: positions in a chunk of the site's own mask, counted from the first key; ``site``: it has no chunks, or they are
            not known yet.

    Raises:
        FormError: if ``chunk`` is not a whole number of at least 1.
    """

    name: ClassVar[str] = "keep_structure"
    from_site: ClassVar[tuple[str, ...]] = ("chunk",)

    chunk: Positive | Literal["site"] = "site"

    def problems(self) -> list[OptionProblem]:
        """A chunk that is no whole number in its range."""
        return [] if self.chunk == "site" else not_integer(("chunk",), self.chunk, 1)

    def relation(self, problem: Problem) -> Relation:
        """The chunks if there are any, else everything or the problem's window."""
        if isinstance(self.chunk, str):
            return Dense().relation(problem)
        return Relation(problem, (Term(Segment(self.chunk, 1)),))

    def settled(self, site: AttentionSite) -> Form:
        """With the chunks of the site."""
        return self if site.mask.chunk is None else replace(self, chunk=site.mask.chunk)

    @property
    def holds_chunks(self) -> bool:
        """Where there are any."""
        return self.chunk != "site"

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Always exact."""
        return "exact"

    def reject(self, site: AttentionSite) -> str | None:
        """As for ``dense``: a mask that could not be read, or a result that only the model's own spelling has."""
        return Dense().reject(site)

    def notes(self, site: AttentionSite) -> tuple[str, ...]:
        """What is kept, and why that is exact."""
        mask = site.mask
        kept, asked = _kept(mask), [_BY_PAIR[word] for word in mask.words if word in _BY_PAIR]
        text = f"keeps {', '.join(kept)}" if kept else "keeps every key" if not asked else "keeps no structure"
        text += ": exact, because these are the pairs of the model's own mask"
        return (text + (f"; {' and '.join(asked)}: asked pair by pair, which saves no work" if asked else ""),)


def _kept(mask: MaskSpec) -> list[str]:
    found = ["causal"] if mask.causal else []
    if mask.causal and mask.left is not None:
        found.append(f"window {mask.left + 1}")
    elif "window" in mask.words:
        found.append(f"window of {_ends(mask.left)} before and {_ends(mask.right)} behind")
    if mask.chunk is not None:
        found.append(f"chunks of {mask.chunk}")
    elif "chunk" in mask.words:
        found.append("chunks")
    found += ["documents"] if mask.documents else []
    found += [_BY_ROW[word] for word in mask.words if word in _BY_ROW]
    return found + (["key padding"] if mask.key_padding else [])


def _ends(limit: int | None) -> str:
    return "all keys" if limit is None else f"{limit} keys"
