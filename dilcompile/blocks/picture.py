"""Pictures of which pairs are computed, as SVG and as text. An SVG holds no script and reads nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from dilcompile.blocks.cells import Cells, Shares
from dilcompile.progression import Positions

# For a page that holds pictures; a picture that stands alone carries it in itself.
STYLE = """
.pairs { --full: #2a56c6; --partial: #ee9d3d; --empty: #eef0f4; --edge: #9aa3ad; --ink: #1b1f24; --soft: #5c6670; --back: #fff; }
@media (prefers-color-scheme: dark) { .pairs { --full: #86abff; --partial: #d98324; --empty: #262b31; --edge: #5d6771;
  --ink: #e6e9ec; --soft: #98a2ac; --back: #1c2024; } }
.pairs text { font: 11px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: var(--soft); }
.pairs .head { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
.pairs .full { fill: var(--full); } .pairs .partial { fill: var(--partial); } .pairs .empty { fill: var(--empty); }
.pairs .back { fill: var(--back); } .pairs .edge { fill: none; stroke: var(--edge); }
""".strip()

_SPAN = 320
_LEAST_SPAN = 14
# A share is drawn as the halving that it reaches: all, 1/2, 1/4, ... and at last anything that is there.
_HALVINGS = 8
_MIXES = 4
_LETTER = 6.6
_LINE = 16


def svg(cells: Cells, title: str, lines: Sequence[str], name: str, alone: bool = False) -> str:
    """The picture: rows of queries down, columns of keys across.

    Args:
        cells: what is drawn.
        title: the line above the picture, and its name for a screen reader.
        lines: more lines below the title; a screen reader reads them as the description.
        name: unique in the page, of letters, digits and ``-``.
        alone: a file of its own, which needs its style inside.
    """
    down, across = _scale(cells)
    height, width = down * _extent(cells.q_edges), across * _extent(cells.k_edges)
    labels = _ticks(cells.q_edges)
    left = round(_LETTER * max(len(str(position)) for position, _ in labels)) + 26
    top = _LINE * (1 + len(lines)) + 38
    legend = _legend(cells)
    wide = max(left + width + 24, *(round(_LETTER * len(line)) + 12 for line in (title, *lines)), _legend_width(legend))
    tall = top + height + 2 * _LINE + 4
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    described = f"Queries down, keys across. {' '.join(lines)}"
    parts = [
        f'<svg{space} class="pairs" role="img" aria-labelledby="{name}-title {name}-desc" width="{wide:g}" height="{tall:g}" '
        f'viewBox="0 0 {wide:g} {tall:g}">',
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(described)}</desc>',
        *([f'<style>{STYLE}</style>\n<rect class="back" width="{wide:g}" height="{tall:g}"/>'] if alone else []),
        f'<text class="head" x="6" y="{_LINE}">{escape(title)}</text>',
        *(f'<text x="6" y="{_LINE * (2 + n)}">{escape(line)}</text>' for n, line in enumerate(lines)),
        *_axes(cells, (left, top), (across, down)),
        f'<rect class="empty" x="{left}" y="{top}" width="{width:g}" height="{height:g}"/>',
        f'<g transform="translate({left} {top}) scale({across:g} {down:g})" shape-rendering="crispEdges">',
        *_shapes(cells),
        "</g>",
        f'<rect class="edge" x="{left - 0.5:g}" y="{top - 0.5:g}" width="{width + 1:g}" height="{height + 1:g}"/>',
        *_legend_shapes(legend, top + height + _LINE + 4),
        "</svg>",
    ]
    return "\n".join(parts)


def text(cells: Cells) -> str:
    """The picture in characters, two a cell."""
    marks = [
        [_mark(full, partial) for full, partial in zip(*rows, strict=True)]
        for rows in zip(cells.full, cells.partial, strict=True)
    ]
    return "\n".join("".join(2 * mark for mark in row) for row in marks)


TEXT_LEGEND = "██ all of a cell, without a mask   ▓▓ half and more   ▒▒ an eighth and more   ░░ less   ·· nothing"


def _mark(full: float, partial: float) -> str:
    share = full + partial
    return "█" if full == 1 else "▓" if share >= 1 / 2 else "▒" if share >= 1 / 8 else "░" if share else "·"


def _cell(edges: Positions) -> int:
    """Positions in a whole cell: the first and the last of a line may be cut short."""
    return int(max(edges[1:] - edges[:-1], default=1)) or 1


def _places(edges: Positions) -> list[float]:
    """Where each edge is, in whole cells."""
    found: list[float] = ((edges - edges[0]) / _cell(edges)).round(3).tolist()
    return found


def _extent(edges: Positions) -> float:
    """The length of a line in whole cells."""
    return _places(edges)[-1]


def _scale(cells: Cells) -> tuple[float, float]:
    """Pixels of a cell, down and across: a position is as long down as it is across, unless that would be too thin to see."""
    q_cell, k_cell = _cell(cells.q_edges), _cell(cells.k_edges)
    longest = max(_extent(cells.q_edges) * q_cell, _extent(cells.k_edges) * k_cell, 1)
    # Whole pixels for the finer side, so that cells are alike.
    finer = min(q_cell, k_cell)
    pixels = _SPAN * finer / longest
    position = (math.floor(pixels + 0.5) if pixels >= 1 else pixels) / finer
    down, across = position * q_cell, position * k_cell
    down = max(down, _LEAST_SPAN / max(1e-9, _extent(cells.q_edges)))
    across = max(across, _LEAST_SPAN / max(1e-9, _extent(cells.k_edges)))
    return round(down, 3), round(across, 3)


def _ticks(edges: Positions) -> list[tuple[int, float]]:
    """Positions worth a label, each with its place in whole cells: multiples of a power of two, and the end."""
    start, stop, cell = int(edges[0]), int(edges[-1]), _cell(edges)
    step = 1 << max(0, math.ceil(math.log2(max(1, stop - start) / 4)))
    found = [start, *range((start // step + 1) * step, stop, step)]
    if len(found) > 1 and found[1] - start < step / 2:
        del found[1]
    if stop - found[-1] < step / 2 and len(found) > 1:
        found.pop()
    found.append(stop)
    return [(position, (position - start) / cell) for position in dict.fromkeys(found)]


def _axes(cells: Cells, at: tuple[int, int], scale: tuple[float, float]) -> Iterable[str]:
    (left, top), (across, down) = at, scale
    yield f'<text x="{left}" y="{top - 20}">keys \N{RIGHTWARDS ARROW}</text>'
    middle = top + down * _extent(cells.q_edges) / 2
    if down * _extent(cells.q_edges) > 6 * _LETTER:
        yield (f'<text transform="translate(13 {middle:g}) rotate(-90)" text-anchor="middle">\N{LEFTWARDS ARROW} queries</text>')
    free = -math.inf
    for position, place in _ticks(cells.k_edges):
        x, half = left + across * place, _LETTER * len(str(position)) / 2
        if x - half > free:
            yield f'<path class="edge" d="M{x:g} {top - 4}v4"/>'
            yield f'<text x="{x:g}" y="{top - 7}" text-anchor="middle">{position}</text>'
            free = x + half + 4
    free = -math.inf
    for position, place in _ticks(cells.q_edges):
        y = top + down * place
        if y - 5 > free:
            yield f'<path class="edge" d="M{left - 4} {y:g}h4"/>'
            yield f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{position}</text>'
            free = y + 6


def _halving(share: float) -> int:
    return min(_HALVINGS, math.ceil(-math.log2(min(1.0, share))))


def _opacity(halving: int) -> float:
    return round(1 - 0.1 * halving, 3)


def _shapes(cells: Cells) -> Iterable[str]:
    """One path for each shade: the full colour over the partial one, so that a cell of both shows their mean."""
    runs: dict[tuple[int, int], list[str]] = {}
    lines, columns = _places(cells.q_edges), _places(cells.k_edges)
    for y, row in enumerate(_shades(cells)):
        start = 0
        for x in range(1, len(row) + 1):
            if x < len(row) and row[x] == row[start]:
                continue
            if (shade := row[start]) is not None:
                width, height = columns[x] - columns[start], lines[y + 1] - lines[y]
                runs.setdefault(shade, []).append(f"M{columns[start]:g} {lines[y]:g}h{width:g}v{height:g}h-{width:g}z")
            start = x
    for (halving, mix), paths in sorted(runs.items()):
        opacity, full, shape = _opacity(halving), mix / _MIXES, "".join(paths)
        above = opacity * full
        below = opacity * (1 - full) / (1 - above) if above < 1 else 0.0
        for kind, strength in (("partial", below), ("full", above)):
            if strength:
                faint = "" if strength == 1 else f' fill-opacity="{strength:.3g}"'
                yield f'<path class="{kind}"{faint} d="{shape}"/>'


def _shades(cells: Cells) -> list[list[tuple[int, int] | None]]:
    """Of each cell the halving of its share, and how many fourths of that are full (not none, if any is, and not all, if not)."""
    return [[_shade(full, partial) for full, partial in zip(*rows, strict=True)] for rows in _rows(cells.full, cells.partial)]


def _rows(full: Shares, partial: Shares) -> Iterable[tuple[list[float], list[float]]]:
    return zip(full.tolist(), partial.tolist(), strict=True)


def _shade(full: float, partial: float) -> tuple[int, int] | None:
    share = full + partial
    if not share:
        return None
    if not full or not partial:
        return _halving(share), _MIXES if full else 0
    return _halving(share), min(_MIXES - 1, max(1, round(_MIXES * full / share)))


def _legend(cells: Cells) -> list[tuple[str, float, str]]:
    """Kind, opacity and words of each entry."""
    shades = [shade for row in _shades(cells) for shade in row if shade is not None]
    found = [("full", 1.0, f"full {cells.unit}s"), ("partial", 1.0, f"{cells.unit}s with a mask inside")]
    if cells.unit == "pair":
        found = [("full", 1.0, "all pairs"), ("partial", 1.0, "some pairs")]
    most = max((halving for halving, _ in shades), default=0)
    shaded = "full" if any(mix for halving, mix in shades if halving) else "partial"
    for halving in sorted({halving for halving in (1, 2, 4, 6, _HALVINGS) if halving <= most} | ({most} if most else set())):
        words = f"1/{1 << halving}" if halving < _HALVINGS else f"under 1/{1 << (_HALVINGS - 1)}"
        found.append((shaded, _opacity(halving), words))
    if most:
        found.append(("", 0.0, "of a cell"))
    return found


def _legend_width(legend: Sequence[tuple[str, float, str]]) -> int:
    return round(sum(_LETTER * len(words) + 26 for _, _, words in legend)) + 6


def _legend_shapes(legend: Sequence[tuple[str, float, str]], y: float) -> Iterable[str]:
    x = 6.0
    for kind, opacity, words in legend:
        if kind:
            faint = "" if opacity == 1 else f' fill-opacity="{opacity:g}"'
            yield f'<rect class="{kind}"{faint} x="{x:g}" y="{y:g}" width="11" height="11"/>'
        offset = 15 if kind else 0
        yield f'<text x="{x + offset:g}" y="{y + 10:g}">{escape(words)}</text>'
        x += offset + _LETTER * len(words) + 11
