"""A plan as a picture, offset against step. The SVG holds no script and reads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from dilcompile.memory.buffer import ROLES, Buffer
from dilcompile.memory.plan import Arena

# For a page that holds pictures; a picture that stands alone carries it in itself.
STYLE = (
    """
.arena { --workspace: #2a56c6; --output: #2f8f5b; --saved: #8a5cc2; --gradient: #d1495b; --send: #c98a1b; --receive: #ee9d3d;
  --edge: #9aa3ad; --ink: #1b1f24; --soft: #5c6670; --back: #fff; }
@media (prefers-color-scheme: dark) { .arena { --workspace: #86abff; --output: #6fcf97; --saved: #bb9af0; --gradient: #ff8a98;
  --send: #e0b050; --receive: #ffb866; --edge: #5d6771; --ink: #e6e9ec; --soft: #98a2ac; --back: #1c2024; } }
.arena text { font: 11px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: var(--soft); }
.arena .head { font-size: 12.5px; font-weight: 600; fill: var(--ink); }
.arena .back { fill: var(--back); } .arena .edge { fill: none; stroke: var(--edge); }
.arena .buffer { stroke: var(--back); stroke-width: 0.6; }
""".strip()
    + "".join(f"\n.arena .{role} {{ fill: var(--{role}); }}" for role in ROLES)
)

_WIDE, _TALL = 640, 240
_LEFT, _LINE = 92, 16
_LETTER = 7.8
_IN_A_ROW = 4
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size_text(size: int) -> str:
    """A number of bytes in words: ``1.5 MiB``."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def svg(arena: Arena, title: str, name: str, alone: bool = False) -> str:
    """The picture of one arena: steps to the right, offsets up, a rectangle for each buffer, coloured by its role.

    Args:
        title: the line above the picture, and its name for a screen reader.
        name: unique in the page, of letters, digits and ``-``.
        alone: a file of its own, which needs its style inside.
    """
    top, steps = 2 * _LINE + 14, max((buffer.end + 1 for buffer in arena.buffers), default=1)
    legend = _legend(arena)
    wide = max(_LEFT + _WIDE + 16, round(_LETTER * len(title)) + 12)
    tall = top + _TALL + (3 + -(-len(legend) // _IN_A_ROW)) * _LINE
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    said = f"{size_text(arena.peak)} for {len(arena.buffers)} buffers; {size_text(arena.without_reuse)} without reuse"
    return "\n".join(
        [
            f'<svg{space} class="arena" role="img" aria-labelledby="{name}-title {name}-desc" width="{wide}" height="{tall}" '
            f'viewBox="0 0 {wide} {tall}">',
            f'<title id="{name}-title">{escape(title)}</title>'
            f'<desc id="{name}-desc">Steps to the right, offsets up. {escape(said)}.</desc>',
            *([f'<style>{STYLE}</style>\n<rect class="back" width="{wide}" height="{tall}"/>'] if alone else []),
            f'<text class="head" x="6" y="{_LINE}">{escape(title)}</text>',
            f'<text x="6" y="{2 * _LINE}">{escape(said)}</text>',
            *_axes(arena, top, steps),
            *_rectangles(arena, top, steps),
            f'<rect class="edge" x="{_LEFT - 0.5}" y="{top - 0.5}" width="{_WIDE + 1}" height="{_TALL + 1}"/>',
            *_legend_shapes(legend, top + _TALL + 3 * _LINE + 6),
            "</svg>",
        ]
    )


def _axes(arena: Arena, top: int, steps: int) -> Iterator[str]:
    middle = f"translate(13 {top + _TALL / 2:g}) rotate(-90)"
    yield f'<text transform="{middle}" text-anchor="middle">offset \N{RIGHTWARDS ARROW}</text>'
    for quarter in range(5) if arena.peak else (0,):
        y = top + _TALL - quarter * _TALL / 4
        yield f'<path class="edge" d="M{_LEFT - 4} {y:g}h4"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{size_text(quarter * arena.peak // 4)}</text>'
    across, below = _WIDE / steps, top + _TALL
    for step in range(0, steps, _between(steps)):
        x = _LEFT + (step + 0.5) * across
        yield f'<path class="edge" d="M{x:.1f} {below}v4"/>'
        yield f'<text x="{x:.1f}" y="{below + _LINE}" text-anchor="middle">{step}</text>'
    yield f'<text x="{_LEFT + _WIDE / 2:g}" y="{below + 2 * _LINE}" text-anchor="middle">step \N{RIGHTWARDS ARROW}</text>'


def _between(steps: int) -> int:
    """Steps from one label to the next: 1, 2 or 5 times a power of ten, for a dozen labels at most."""
    power: int = 10 ** (len(str(steps)) - 1)
    return next((wide for wide in (power // 10, power // 5, power // 2) if wide and steps <= 12 * wide), power)


def _rectangles(arena: Arena, top: int, steps: int) -> Iterator[str]:
    across, up = _WIDE / steps, _TALL / max(1, arena.peak)
    for buffer, offset in zip(arena.buffers, arena.offsets, strict=True):
        height = buffer.hint * up
        if not height:
            continue
        x, y = _LEFT + buffer.begin * across, top + _TALL - offset * up - height
        width = (buffer.end - buffer.begin + 1) * across
        yield (
            f'<rect class="buffer {buffer.role}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{escape(buffer_text(buffer, offset))}</title></rect>"
        )


def buffer_text(buffer: Buffer, offset: int) -> str:
    """A buffer and its place in one line."""
    where = f" of {buffer.module}" if buffer.module else ""
    return f"{buffer.name}{where}: {size_text(buffer.hint)} at {offset}, steps {buffer.begin} to {buffer.end}, {buffer.role}"


def _legend(arena: Arena) -> list[tuple[str, str]]:
    """The roles of what has a place, each with its words."""
    totals = {role: sum(buffer.hint for buffer in arena.buffers if buffer.role == role) for role in ROLES}
    return [(role, f"{role} {size_text(total)}") for role, total in totals.items() if total]


def _legend_shapes(legend: list[tuple[str, str]], y: int) -> Iterator[str]:
    for number, (role, words) in enumerate(legend):
        left, down = _LEFT + number % _IN_A_ROW * (_WIDE // _IN_A_ROW), y + number // _IN_A_ROW * _LINE
        yield f'<rect class="{role}" x="{left}" y="{down - 9}" width="10" height="10"/>'
        yield f'<text x="{left + 14}" y="{down}">{words}</text>'
