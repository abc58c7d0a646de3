"""What an order of tokens gains: the blocks of a neighbourhood by it and by rows, beside each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape

from dilcompile.blocks.curve import Curve
from dilcompile.blocks.fullness import fullness
from dilcompile.blocks.patterns import Near
from dilcompile.blocks.spec import Spec, frozen, parts_of, pattern_of
from dilcompile.forms import BlockSparse, Form
from dilcompile.report import units

_LETTER, _LINE, _WIDE, _BAR = 6.6, 16, 320, 14


@dataclass(frozen=True)
class OrderCount:
    """The blocks that hold pairs of tokens at most a radius apart along every axis of their grid, by one order of the tokens.

    Args:
        order: ``row``, ``hilbert``, ``morton``.
        radius: along each axis.
        blocks: how many there are.
        full: of these, how many hold nothing but such pairs.
        partial: the others.
        density: the pairs in all of these blocks over all pairs of tokens.
    """

    order: str
    radius: tuple[int, ...]
    blocks: int
    full: int
    partial: int
    density: float


def orders_of(form: Form) -> tuple[OrderCount, ...]:
    """By the form's own order, then by rows. None without a curve or without a pattern ``near``."""
    curve = form.curve if isinstance(form, BlockSparse) else None
    if not isinstance(form, BlockSparse) or curve is None or curve.order not in ("hilbert", "morton"):
        return ()
    found = [pattern_of(part, curve) for part in parts_of(_spec(form)) if part[0] == "near"]
    radius = max((pattern.radius for pattern in found if isinstance(pattern, Near)), default=())
    # Of each token alone every order makes as many blocks.
    if not any(radius):
        return ()
    return tuple(_counted(each, radius, form.sizes) for each in (curve, replace(curve, order="row")))


def _spec(form: BlockSparse) -> Spec:
    spec = frozen(form.pattern)
    assert isinstance(spec, tuple), "options were checked"
    return spec


@lru_cache(maxsize=64)
def _counted(curve: Curve, radius: tuple[int, ...], sizes: tuple[int, int]) -> OrderCount:
    found = fullness(curve, radius, *sizes)
    return OrderCount(curve.order, radius, found.blocks, found.full, found.partial, found.density)


def words(orders: tuple[OrderCount, ...]) -> str:
    """One line; empty without orders."""
    if not orders:
        return ""
    own, by_rows = orders
    return (
        f"pairs of tokens {_radius(own)} are in {own.blocks:,} blocks by {own.order}, {own.full:,} of them full of such pairs; "
        f"by row in {by_rows.blocks:,}, {by_rows.full:,} full"
    )


def _radius(count: OrderCount) -> str:
    same = len(set(count.radius)) == 1
    return f"at most {count.radius[0] if same else ' x '.join(map(str, count.radius))} apart"


def figure(orders: tuple[OrderCount, ...], name: str) -> str:
    """A bar for each order, as SVG: full blocks, then partial ones. ``name``: unique in the page."""
    title = f"Blocks with pairs of tokens {_radius(orders[0])}, by order"
    lines = [_said(order) for order in orders]
    most, parts, y = max(1, *(order.blocks for order in orders)), [], _LINE + 10
    for order, line in zip(orders, lines, strict=True):
        full, whole = (round(_WIDE * number / most, 1) for number in (order.full, order.blocks))
        bar = f'y="{y + _LINE}" height="{_BAR}"'
        parts.append(f'<text x="6" y="{y + _LINE - 5}">{escape(line)}</text>')
        parts.append(f'<rect class="full" x="6" {bar} width="{full:g}"/>')
        parts.append(f'<rect class="partial" x="{6 + full:g}" {bar} width="{round(whole - full, 1):g}"/>')
        y += _LINE + _BAR + 8
    for kind, x, said in (("full", 6, "full of such pairs"), ("partial", 150, "other pairs beside")):
        parts.append(f'<rect class="{kind}" x="{x}" y="{y + 4}" width="11" height="11"/>')
        parts.append(f'<text x="{x + 15}" y="{y + 14}">{said}</text>')
    wide = max(_WIDE + 12, *(round(_LETTER * len(line)) + 12 for line in (title, *lines)))
    head = (
        f'<svg class="pairs" role="img" aria-labelledby="{name}-title {name}-desc" width="{wide}" height="{y + 22}" '
        f'viewBox="0 0 {wide} {y + 22}">',
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(words(orders))}</desc>',
        f'<text class="head" x="6" y="{_LINE}">{escape(title)}</text>',
    )
    return "\n".join([*head, *parts, "</svg>"])


def _said(order: OrderCount) -> str:
    share = units.percent(order.full / max(1, order.blocks))
    of_all = units.percent(order.density)
    return (
        f"{order.order}: {order.blocks:,} blocks, {order.full:,} full ({share}), {order.partial:,} partial; {of_all} of all pairs"
    )
