"""What a grid of tokens asks of a form's options, of a site and of the sizes of a call."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from dilcompile.blocks.curve import Curve
from dilcompile.blocks.grid import LEAST_BLOCK, MOST_BLOCK
from dilcompile.blocks.spec import Spec, parts_of
from dilcompile.errors import OptionProblem
from dilcompile.forms.base import not_integer
from dilcompile.relation import Problem

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite


def wrong_grid(
    grid: tuple[int, ...] | None, order: str, lead: int, blocks: tuple[int, int], pattern: Spec
) -> list[OptionProblem]:
    """What is wrong with a grid and with what goes along it, where block sizes and pattern are right."""
    near = [dict(options)["radius"] for name, options in parts_of(pattern) if name == "near"]
    if grid is None:
        return _without_grid(order, lead, bool(near))
    if not isinstance(grid, tuple) or len(grid) not in (2, 3):
        shown = list(grid) if isinstance(grid, tuple) else grid
        return [OptionProblem(("grid",), f"must be the two or three sizes of the grid of tokens, not {shown!r}")]
    found = [problem for n, size in enumerate(grid) for problem in not_integer(("grid", n), size, 1)]
    if found:
        return found
    if order == "none" and not near:
        message = "is of no use without an order or the pattern `near`"
        found.append(OptionProblem(("grid",), message, about=(("order",), ("pattern",))))
    for radius in near:
        if isinstance(radius, tuple) and len(radius) != len(grid):
            message = f"near has {len(radius)} radii, the grid {list(grid)} has {len(grid)} axes"
            found.append(OptionProblem(("pattern",), message, about=(("grid",),)))
    return found + [problem for size in dict.fromkeys(blocks) for problem in _not_dividing(size, grid)]


def _without_grid(order: str, lead: int, near: bool) -> list[OptionProblem]:
    found = []
    if order != "none":
        found.append(OptionProblem(("order",), f"{order!r} is one of the tokens of a grid: give `grid`", about=(("grid",),)))
    if near:
        found.append(OptionProblem(("pattern",), "near is about places in a grid of tokens: give `grid`", about=(("grid",),)))
    if lead:
        found.append(OptionProblem(("lead",), f"{lead} tokens stand in front of a grid: give `grid`", about=(("grid",),)))
    return found


def _not_dividing(block: int, grid: tuple[int, ...]) -> list[OptionProblem]:
    tokens = prod(grid)
    if tokens % block == 0:
        return []
    fitting = [size for size in range(LEAST_BLOCK, MOST_BLOCK + 1) if tokens % size == 0]
    cure = f"sizes that do: {', '.join(map(str, fitting))}" if fitting else f"no size from {LEAST_BLOCK} to {MOST_BLOCK} does"
    larger = f"is larger than the grid {list(grid)} of {tokens} tokens" if block > tokens else ""
    message = larger or f"does not divide the {tokens} tokens of the grid {list(grid)}"
    return [OptionProblem(("block",), f"{block} {message}; {cure}", about=(("grid",),))]


def unfit_problem(curve: Curve, problem: Problem) -> str | None:
    """Why these sizes, or this mask, can't be those of the tokens along the curve, or None."""
    if problem.q_len != problem.k_len or problem.q_offset != 0:
        return (
            f"{problem.q_len} queries from position {problem.q_offset} on and {problem.k_len} keys are not the tokens of one "
            f"grid {list(curve.grid)}; a grid is for attention of all tokens to all of them"
        )
    if problem.q_len != len(curve):
        lead = f" and the {curve.lead} in front of it" if curve.lead else ""
        return (
            f"the sequence has {problem.q_len} tokens, the grid {list(curve.grid)}{lead} {len(curve)}; give the grid of the "
            "model's tokens, and `lead` for those in front of it"
        )
    if curve.moves and (problem.left is not None or problem.right is not None):
        return f"a causal mask or a window runs along the sequence, which order {curve.order!r} leaves; take order 'none'"
    return None


def unfit_site(curve: Curve, site: AttentionSite) -> str | None:
    """Why no call of this site can be one of the tokens along the curve, or None."""
    mask = site.mask
    if mask.documents:
        return f"its sequences are packed documents, not one grid {list(curve.grid)} of tokens"
    if mask.runtime_offset or not (isinstance(mask.q_offset, int) and mask.q_offset == 0):
        return f"its queries do not stand beside the first keys, as the tokens of one grid {list(curve.grid)} do"
    if not curve.moves:
        return None
    words = [word for word in mask.words if word != "padding"]
    if words:
        return f"its mask ({', '.join(words)}) runs along the sequence, which order {curve.order!r} leaves; take order 'none'"
    return None
