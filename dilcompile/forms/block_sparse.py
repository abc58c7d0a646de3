"""Block-sparse: the blocks of a pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dilcompile.blocks.adaptive import Scored, certain, is_adaptive, is_given, leaves
from dilcompile.blocks.coverage import first_without_keys
from dilcompile.blocks.curve import ORDER_NAMES, Curve, OrderName
from dilcompile.blocks.grid import LEAST_BLOCK, MOST_BLOCK, Grid
from dilcompile.blocks.heads import alike_in_heads, dealt, kind_of_head, most_parts
from dilcompile.blocks.impossible import first_unmet, holds_nothing, listed_beyond
from dilcompile.blocks.patterns import Pattern
from dilcompile.blocks.spec import Spec, frozen, has_lengths, pattern_of, plain, problems_of
from dilcompile.errors import FormError, OptionProblem
from dilcompile.forms.base import (
    Form,
    NotNegative,
    Positive,
    Says,
    Unmet,
    cross_site,
    not_integer,
    not_one_of,
    unread_mask,
)
from dilcompile.forms.token_grid import unfit_problem, unfit_site, wrong_grid
from dilcompile.generators import Blocks
from dilcompile.relation import Problem, Relation, Term, grid_of

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    from dilcompile.site import AttentionSite

Size = Annotated[int, Says("minimum", LEAST_BLOCK), Says("maximum", MOST_BLOCK)]


@dataclass(frozen=True)
class BlockSparse(Form):
    """One softmax over the blocks of queries and keys that a pattern names, with the site's own mask inside.

    Args:
        block: positions in a block, 16 to 256; or two numbers, queries and keys.
        pattern: ``{name: {option: value}}``, or a list of patterns under ``any``, ``all``, ``heads`` (one for each query head) or
            ``groups`` (one for each group of them); see ``dilcompile.blocks``.
            ``topk`` and ``mass`` choose blocks from the queries and keys of each call.
        coverage: ``require``: a pattern that leaves a query without keys is an error; ``zero``: such queries give 0.
        order: the order in which blocks count the tokens of a grid: ``none`` and ``row`` as the model does, ``hilbert`` and
            ``morton`` along a curve, so that a block is a patch of the grid.
        grid: the sizes of the grid of tokens, two or three of them, the last one running fastest.
        lead: tokens in front of the grid, such as a class token; blocks count them last, but for order ``none``.

    Raises:
        FormError: if an option is wrong.
    """

    name: ClassVar[str] = "block_sparse"

    block: Size | tuple[Size, ...]
    pattern: dict[str, Any]
    coverage: Literal["require", "zero"] = "require"
    order: OrderName = "none"
    grid: Annotated[tuple[Positive, ...], Says("minItems", 2), Says("maxItems", 3)] | None = None
    lead: NotNegative = 0

    def __post_init__(self) -> None:
        for option in ("block", "grid"):
            if isinstance(getattr(self, option), list):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        object.__setattr__(self, "pattern", frozen(self.pattern))
        super().__post_init__()

    def problems(self) -> list[OptionProblem]:
        """Sizes out of range, and what is wrong with the pattern or the grid."""
        found = problems_of(self.pattern, ("pattern",)) + not_one_of(("coverage",), self.coverage, ("require", "zero"))
        found += not_one_of(("order",), self.order, ORDER_NAMES) + not_integer(("lead",), self.lead, 0)
        sizes = self.block if isinstance(self.block, tuple) else (self.block,)
        if isinstance(self.block, tuple) and len(sizes) != 2:
            return [*found, OptionProblem(("block",), f"must be one number or two (queries, keys), not {list(sizes)!r}")]
        for size in dict.fromkeys(sizes):
            wrong = not_integer(("block",), size, LEAST_BLOCK)
            if not wrong and size > MOST_BLOCK:
                wrong = [OptionProblem(("block",), f"must be at most {MOST_BLOCK}, not {size}")]
            found += wrong
        pattern = frozen(self.pattern)
        if not found and isinstance(pattern, tuple):
            found += wrong_grid(self.grid, self.order, self.lead, self.sizes, pattern)
        if not found and self.curve is not None and self.curve.moves:
            found += self._lost_by_order()
        return found

    def _lost_by_order(self) -> list[OptionProblem]:
        if not any(isinstance(leaf, Scored) and leaf.estimator == "vertical_slash" for leaf in leaves(self._pattern())):
            return []
        text = (
            f"estimator vertical_slash looks at distances along the sequence, which order {self.order!r} leaves: estimate by "
            "pooled or antidiagonal, or take order 'none'"
        )
        return [OptionProblem(("order",), text)]

    @property
    def curve(self) -> Curve | None:
        """The tokens of the grid in the order in which blocks count them; None without a grid."""
        return None if self.grid is None else Curve(self.order, self.grid, self.lead)

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys in a block."""
        first, *others = self.block if isinstance(self.block, tuple) else (self.block,)
        return first, others[0] if others else first

    @property
    def is_adaptive(self) -> bool:
        """Whether blocks are chosen from the data of each call."""
        return is_adaptive(self._pattern())

    def relation(self, problem: Problem) -> Relation:
        """The blocks, with the problem's own mask inside.

        Raises:
            FormError: under ``coverage: require``, if the blocks hold no key of a query that may see some; if the tokens are not
                those of the grid, or the problem's own mask is one of the sequence that an order leaves.
        """
        unfit = None if self.curve is None else unfit_problem(self.curve, problem)
        if unfit is not None:
            raise FormError(f"form {self.name}: {unfit}")
        pattern = dealt(self._pattern(), problem.heads)
        blocks = Blocks(grid_of(problem, *self.sizes), pattern, problem.group)
        if self.coverage == "require":
            self._require_keys(blocks, problem)
        return Relation(problem, (Term(blocks),))

    def _require_keys(self, blocks: Blocks, problem: Problem) -> None:
        blocks = replace(blocks, pattern=certain(blocks.pattern))
        # Mostly each query sees itself in every head, and 32 heads need not be listed to know it.
        shared = replace(blocks, pattern=alike_in_heads(blocks.pattern))
        if first_without_keys(shared.lists(0, blocks.grid), blocks.grid) is None:
            return
        # The first head of each kind.
        for head in sorted({kind_of_head(blocks.pattern, head): head for head in reversed(range(problem.heads))}.values()):
            position = first_without_keys(blocks.lists(head, blocks.grid), blocks.grid)
            if position is None:
                continue
            place = f"block row {position // self.sizes[0]}" + (f", head {head}" if blocks.pattern.by_head else "")
            if self.curve is not None and self.curve.moves:
                place = f"along the curve; token {self.curve.tokens[position]}, {place}"
            raise FormError(
                f"form {self.name}: pattern {plain(self.pattern)!r} leaves the query at position {position} ({place}) without "
                f"any key, at {problem.q_len} queries and {problem.k_len} keys; add {{local: {{}}}} under `any`, so that each "
                "query sees itself, or accept zeros with coverage='zero'"
            )

    def block_mask(self, problem: Problem, device: torch.device | str = "cpu") -> BlockMask:
        """The pairs as FlexAttention's BlockMask, the problem's own mask among them; for one batch row.

        Raises:
            FormError: if query row 0 stands before key 0, or inside a block; if blocks depend on the data; if an order moves
                tokens.
        """
        from dilcompile.blocks.block_mask import to_block_mask

        if self.is_adaptive:
            raise FormError(
                f"pattern {plain(self.pattern)!r} chooses blocks from the data; dilcompile.functional.select_blocks says which"
            )
        if self.curve is not None and self.curve.moves:
            raise FormError(
                f"under order {self.order!r} blocks hold tokens along a curve, and a BlockMask has runs of the sequence; "
                "take order 'none'"
            )
        if self.curve is not None:
            self.relation(problem)
        if problem.q_offset < 0:
            raise FormError(f"query row 0 stands at position {problem.q_offset}: the queries before key 0 are in no block")
        return to_block_mask(dealt(self._pattern(), problem.heads), grid_of(problem, *self.sizes), problem.heads, device)

    @classmethod
    def from_block_mask(
        cls,
        mask: BlockMask,
        q_offset: int = 0,
        is_causal: bool = False,
        window_left: int | None = None,
        window_right: int | None = None,
    ) -> BlockSparse:
        """The form that, at a site whose own mask is the one described here, means the pairs of a BlockMask, at its lengths.

        Args:
            mask: from ``create_block_mask`` with any ``mask_mod``, or made of tables.
            q_offset, is_causal, window_left, window_right: the site's own mask, as in ``Problem``.

        Raises:
            FormError: if no pattern of whole blocks holds these pairs, with the block that does not fit.
        """
        from dilcompile.blocks.block_mask import explicit_of

        site = Problem(1, 1, 1, *mask.seq_lengths, 1, 1, q_offset, is_causal, window_left, window_right)
        found = explicit_of(mask, grid_of(site, *mask.BLOCK_SIZE))
        listed = [{"explicit": {"starts": list(one.starts), "columns": list(one.columns)}} for one in found]
        # A BlockMask may hide all keys of a query: FlexAttention gives 0 there too.
        return cls(mask.BLOCK_SIZE, listed[0] if len(listed) == 1 else {"heads": listed}, coverage="zero")

    def _pattern(self) -> Pattern:
        return pattern_of(self._spec(), self.curve)

    def _spec(self) -> Spec:
        spec = frozen(self.pattern)
        assert isinstance(spec, tuple), "options were checked"
        return spec

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Approximate: which blocks hold all that the site's mask lets through is not asked."""
        return "approximate"

    def reject(self, site: AttentionSite) -> str | None:
        """A mask that could not be read; cross attention, whose two axes have no common positions; documents said twice; patterns
        per head that are not as many; a mask of the sequence where an order leaves it; a pattern that shows no query any key."""
        if site.mask.documents and has_lengths(self._spec()):
            return (
                "its sequences are packed documents, each with blocks of its own: lengths in the pattern would cut every one of "
                "them anew; give `document: {}`, which takes the site's"
            )
        pattern = self._pattern()
        if is_given(pattern):
            return "the blocks of `given` come with a call of dilcompile.functional.attention; a model's own attention has none"
        if site.mask.documents and self.is_adaptive:
            return "its sequences are packed documents, but blocks are estimated over whole ones: give a pattern without data"
        first = cross_site(site) or unread_mask(site) or self._undealt(site.heads)
        first = first or (None if self.curve is None else unfit_site(self.curve, site))
        never = self.unmet(site.mask.causal) if first is None and self.coverage == "zero" else None
        return first or (None if never is None else never.reason)

    def unmet(self, causal: bool) -> Unmet | None:
        """A pattern without any block; under ``coverage: require`` one that leaves a query without keys wherever it exists."""
        sees = "that a causal query sees a key in" if causal else "at all"
        if holds_nothing(self._spec(), self.sizes, causal):
            return Unmet(
                0,
                f"its pattern {plain(self.pattern)!r} holds no block {sees}, so that every output would be 0; name blocks that "
                "are there, such as {local: {}} under `any`",
            )
        position = first_unmet(self._spec(), self.sizes, causal) if self.coverage == "require" else None
        if position is None:
            return None
        return Unmet(
            position,
            f"its pattern {plain(self.pattern)!r} leaves the query at position {position} (block row "
            f"{position // self.sizes[0]}) without any key; add {{local: {{}}}} under `any`, so that each query sees itself, or "
            "accept zeros with coverage: zero",
        )

    def notes(self, site: AttentionSite) -> tuple[str, ...]:
        """What is estimated, and that counts are bounds; blocks of a list that the site's lengths don't have; no pair there."""
        found = dict.fromkeys(leaf.estimator for leaf in leaves(self._pattern()) if isinstance(leaf, Scored))
        if found:
            return (
                f"the blocks are estimated from queries and keys in each call ({', '.join(found)}): pairs and FLOPs are what may "
                "be computed at most",
            )
        length, mask = site.k_len, site.mask
        if not isinstance(length, int) or site.phase == "decode" or mask.documents:
            return ()
        grid = Grid(*self.sizes, 0, length, length, mask.left, 0 if mask.causal else mask.right)
        return tuple(note for note in (self._beyond(grid), self._unseen(grid, site.heads)) if note is not None)

    def _beyond(self, grid: Grid) -> str | None:
        beyond = listed_beyond(self._spec(), len(grid.rows), grid.columns)
        if beyond is None:
            return None
        return (
            f"the pattern lists the block in row {beyond[0]}, column {beyond[1]}, but {grid.k_len} positions have "
            f"{len(grid.rows)} rows and {grid.columns} columns of blocks: what lies beyond is not computed; list blocks of this "
            "length"
        )

    def _unseen(self, grid: Grid, heads: int) -> str | None:
        blocks = Blocks(grid, dealt(self._pattern(), heads))
        if self.coverage == "require" or any(len(blocks.lists(h, grid)) for h in range(heads if blocks.pattern.by_head else 1)):
            return None
        return (
            f"no block of the pattern shows a query any key at {grid.k_len} positions: every output is 0; "
            "add {local: {}} under `any`"
        )

    @property
    def made_for(self) -> int | None:
        """As many as there are patterns per head."""
        return most_parts(self._pattern())

    def _undealt(self, heads: int) -> str | None:
        """Why patterns per head can't be dealt to the heads, or None."""
        try:
            dealt(self._pattern(), heads)
        except FormError as error:
            return str(error)
        return None

    def plain(self) -> dict[str, Any]:
        """See ``Form``."""
        return {**super().plain(), "pattern": plain(self.pattern)}
