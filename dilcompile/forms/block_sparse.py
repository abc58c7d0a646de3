"""Block-sparse: the blocks of a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dilcompile.blocks.spec import frozen, pattern_of, plain, problems_of
from dilcompile.errors import OptionProblem
from dilcompile.forms.base import Form, Says, cross_site, not_integer, unread_mask
from dilcompile.generators import Blocks
from dilcompile.relation import Problem, Relation, Term, grid_of

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite

_LEAST, _MOST = 16, 256
Size = Annotated[int, Says("minimum", _LEAST), Says("maximum", _MOST)]


@dataclass(frozen=True)
class BlockSparse(Form):
    """One softmax over the blocks of queries and keys that a pattern names, with the site's own mask inside.

    Args:
        block: positions in a block, 16 to 256; or two numbers, queries and keys.
        pattern: ``{name: {option: value}}``, or ``{any: [...]}`` and ``{all: [...]}`` of patterns; see ``dilcompile.blocks``.

    Raises:
        FormError: if an option is wrong.
    """

    name: ClassVar[str] = "block_sparse"

    block: Size | tuple[Size, ...]
    pattern: dict[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        object.__setattr__(self, "pattern", frozen(self.pattern))
        super().__post_init__()

    def problems(self) -> list[OptionProblem]:
        """Sizes out of range, and what is wrong with the pattern."""
        found = problems_of(self.pattern, ("pattern",))
        sizes = self.block if isinstance(self.block, tuple) else (self.block,)
        if isinstance(self.block, tuple) and len(sizes) != 2:
            return [*found, OptionProblem(("block",), f"must be one number or two (queries, keys), not {list(sizes)!r}")]
        for size in sizes:
            wrong = not_integer(("block",), size, _LEAST)
            if not wrong and size > _MOST:
                wrong = [OptionProblem(("block",), f"must be at most {_MOST}, not {size}")]
            found += wrong
        return found

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys in a block."""
        first, *others = self.block if isinstance(self.block, tuple) else (self.block,)
        return first, others[0] if others else first

    def relation(self, problem: Problem) -> Relation:
        """The blocks, with the problem's own mask inside."""
        spec = frozen(self.pattern)
        assert isinstance(spec, tuple), "options were checked"
        return Relation(problem, (Term(Blocks(grid_of(problem, *self.sizes), pattern_of(spec), problem.group)),))

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Approximate: which blocks hold all that the site's mask lets through is not asked."""
        return "approximate"

    def reject(self, site: AttentionSite) -> str | None:
        """A mask that could not be read; cross attention, whose two axes have no common positions."""
        return cross_site(site) or unread_mask(site)

    def __str__(self) -> str:
        return f"{self.name}(block={self.block!r}, pattern={plain(self.pattern)!r})"
