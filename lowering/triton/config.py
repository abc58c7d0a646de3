"""Tile sizes, proven by compiling ahead of time (``compiled.txt``): no register spills, tensor cores used.

Nothing here imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Pass = Literal["forward", "sums", "queries", "keys", "bias", "decode", "join", "kept"]
Masks = Literal["none", "some", "pairs", "counted", "counted pairs"]


@dataclass(frozen=True)
class Tile:
    """Rows of the tile's own side and of a block of the other side, and how a program is run.

    Args:
        described: keys and values are loaded by descriptors of their rows (TMA) where a call allows that. No tile of the table
            is: only the clock finds out where it pays.
    """

    own: int
    other: int
    warps: int
    stages: int
    described: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton's compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def along(self, own: int, other: int, pack: int = 1) -> Tile:
        """The tile of a walk along lists of blocks.

        Args:
            own: rows of its own side that a line of blocks has; more would be for nobody.
            other: positions in a block of the other side. A large tile takes a part of one block at a time: pieces of several
                take a pointer a row.
            pack: rows that stand at a position of the other side.
        """
        rows, visit = min(self.own, max(16, 1 << (own - 1).bit_length())), self.other
        while rows > 32 and visit > 16 and other % (visit // pack):
            visit //= 2
        return replace(self, own=rows, other=visit)


INTERPRETED = Tile(16, 16, 4, 1)


def tile_of(
    step: Pass,
    arch: str,
    head: int,
    dtype: torch.dtype,
    masks: Masks,
    rows: int = 64,
    listed: bool = False,
    part: bool = False,
) -> Tile:
    """The tile sizes of a pass.

    Args:
        step: the forward, the sums by row that the backward starts from, the gradient of the queries, that of keys and values,
            that of the bias, few queries whose keys are split, the join of the parts (``own`` at a time), the range of the
            keys that padding keeps.
        arch: ``sm80``, ``sm90``, ..., or ``gfx942`` and the like.
        head: the larger head size, a power of two.
        masks: ``counted``: documents; ``some``: a softcap, dropout, padding, limits by row, a bias by key or by row, or keys
            that count only once; ``pairs``: a bias by pair. They take registers.
        rows: of few queries, 16, 32 or 64.
        listed: tiles walk lists of blocks; see ``Tile.along``.
        part: rows are a part of their sequence, whose places take registers.
    """
    if step in ("sums", "join"):
        return Tile(16, 1, 4, 1)
    if step == "kept":
        return Tile(1, 4096, 8, 1)
    size = max(64, head)
    if step == "decode":
        family = "float32" if dtype == torch.float32 else _family(arch) if size <= 128 else "sm90"
        tiles = _DECODE if masks in ("none", "counted") else _DECODE_MASKED
        return replace(next(tile for tile in tiles[family, size] if rows <= tile.own), own=rows)
    if dtype == torch.float32:
        return _FLOAT32[step, size]
    if size > 128:
        return _LARGE[step]
    if step == "bias":
        return _OF_BIAS[_family(arch), size]
    if masks == "pairs":
        return _PAIRS[_family(arch), step, size]
    if masks != "none":
        return {"counted": _COUNTED, "counted pairs": _COUNTED_PAIRS, "some": _MASKED}[masks][step, size]
    found = _PLAIN[_family(arch), step, size]
    special = _LISTED if listed else _PART if part else {}
    return special.get((_family(arch), step, size), found)


def _family(arch: str) -> str:
    """The architecture whose tensor cores and shared memory are most alike."""
    if arch.startswith("gfx"):
        return "gfx942"
    return {"sm90": "sm90", "sm100": "sm100", "sm103": "sm100"}.get(arch, "sm80")


_FLOAT32: dict[tuple[Pass, int], Tile] = {
    ("forward", 64): Tile(32, 32, 4, 1),
    ("forward", 128): Tile(16, 32, 8, 1),
    ("queries", 64): Tile(32, 32, 4, 1),
    ("queries", 128): Tile(32, 32, 8, 1),
    ("keys", 64): Tile(32, 32, 8, 1),
    ("keys", 128): Tile(16, 16, 8, 1),
    ("forward", 256): Tile(16, 16, 4, 1),
    ("queries", 256): Tile(16, 16, 4, 1),
    ("keys", 256): Tile(16, 16, 4, 1),
    ("bias", 64): Tile(32, 32, 8, 1),
    ("bias", 128): Tile(16, 16, 8, 1),
    ("bias", 256): Tile(16, 16, 4, 1),
}

# Head sizes over 128, whatever the masks and the architecture.
_LARGE: dict[Pass, Tile] = {
    "forward": Tile(64, 32, 8, 2),
    "queries": Tile(32, 32, 8, 1),
    "keys": Tile(32, 32, 8, 1),
    "bias": Tile(32, 16, 8, 1),
}

_MASKED: dict[tuple[Pass, int], Tile] = {
    ("forward", 64): Tile(128, 64, 8, 3),
    ("forward", 128): Tile(128, 32, 8, 3),
    ("queries", 64): Tile(64, 64, 8, 2),
    ("queries", 128): Tile(64, 32, 8, 2),
    ("keys", 64): Tile(64, 32, 4, 2),
    ("keys", 128): Tile(64, 16, 8, 2),
}

_COUNTED: dict[tuple[Pass, int], Tile] = {
    ("forward", 64): Tile(128, 32, 8, 3),
    ("forward", 128): Tile(128, 32, 8, 3),
    ("queries", 64): Tile(64, 64, 8, 2),
    ("queries", 128): Tile(64, 32, 8, 2),
    ("keys", 64): Tile(64, 32, 4, 2),
    ("keys", 128): Tile(32, 32, 4, 1),
}

_COUNTED_PAIRS: dict[tuple[Pass, int], Tile] = {
    ("forward", 64): Tile(64, 32, 8, 3),
    ("forward", 128): Tile(64, 32, 8, 3),
    ("queries", 64): Tile(64, 64, 8, 2),
    ("queries", 128): Tile(64, 16, 8, 2),
    ("keys", 64): Tile(64, 32, 8, 2),
    ("keys", 128): Tile(32, 32, 4, 1),
}

_PAIRS: dict[tuple[str, Pass, int], Tile] = {
    ("sm80", "forward", 64): Tile(64, 64, 8, 3),
    ("sm80", "forward", 128): Tile(64, 32, 8, 3),
    ("sm80", "queries", 64): Tile(64, 32, 8, 2),
    ("sm80", "queries", 128): Tile(64, 32, 8, 2),
    ("sm80", "keys", 64): Tile(64, 16, 8, 2),
    ("sm80", "keys", 128): Tile(64, 16, 8, 2),
    ("sm90", "forward", 64): Tile(128, 64, 8, 3),
    ("sm90", "forward", 128): Tile(64, 32, 8, 3),
    ("sm90", "queries", 64): Tile(64, 64, 8, 2),
    ("sm90", "queries", 128): Tile(64, 32, 8, 2),
    ("sm90", "keys", 64): Tile(64, 32, 4, 2),
    ("sm90", "keys", 128): Tile(64, 16, 8, 2),
    ("sm100", "forward", 64): Tile(128, 64, 8, 3),
    ("sm100", "forward", 128): Tile(64, 32, 8, 3),
    ("sm100", "queries", 64): Tile(64, 64, 8, 2),
    ("sm100", "queries", 128): Tile(64, 32, 8, 2),
    ("sm100", "keys", 64): Tile(64, 32, 8, 2),
    ("sm100", "keys", 128): Tile(64, 16, 8, 2),
    ("gfx942", "forward", 64): Tile(64, 32, 4, 2),
    ("gfx942", "forward", 128): Tile(64, 32, 4, 2),
    ("gfx942", "queries", 64): Tile(64, 64, 4, 2),
    ("gfx942", "queries", 128): Tile(64, 32, 4, 2),
    ("gfx942", "keys", 64): Tile(64, 32, 4, 2),
    ("gfx942", "keys", 128): Tile(64, 16, 8, 2),
}

_OF_BIAS: dict[tuple[str, int], Tile] = {
    ("sm80", 64): Tile(64, 32, 8, 2),
    ("sm80", 128): Tile(64, 16, 8, 2),
    ("sm90", 64): Tile(64, 64, 8, 2),
    ("sm90", 128): Tile(64, 32, 8, 2),
    ("sm100", 64): Tile(64, 64, 8, 2),
    ("sm100", 128): Tile(64, 32, 8, 2),
    ("gfx942", 64): Tile(64, 32, 4, 2),
    ("gfx942", 128): Tile(64, 16, 8, 2),
}

_PLAIN: dict[tuple[str, Pass, int], Tile] = {
    ("sm80", "forward", 64): Tile(128, 64, 8, 3),
    ("sm80", "forward", 128): Tile(128, 32, 8, 3),
    ("sm80", "queries", 64): Tile(64, 64, 8, 2),
    ("sm80", "queries", 128): Tile(64, 64, 8, 2),
    ("sm80", "keys", 64): Tile(64, 32, 4, 2),
    ("sm80", "keys", 128): Tile(64, 64, 8, 2),
    ("sm90", "forward", 64): Tile(128, 64, 8, 3),
    ("sm90", "forward", 128): Tile(128, 64, 8, 2),
    ("sm90", "queries", 64): Tile(64, 64, 4, 2),
    ("sm90", "queries", 128): Tile(64, 64, 8, 2),
    ("sm90", "keys", 64): Tile(64, 64, 4, 2),
    ("sm90", "keys", 128): Tile(64, 32, 8, 2),
    ("sm100", "forward", 64): Tile(128, 64, 8, 3),
    ("sm100", "forward", 128): Tile(128, 32, 8, 3),
    ("sm100", "queries", 64): Tile(64, 64, 8, 2),
    ("sm100", "queries", 128): Tile(64, 64, 8, 2),
    ("sm100", "keys", 64): Tile(64, 64, 4, 2),
    ("sm100", "keys", 128): Tile(64, 64, 8, 2),
    ("gfx942", "forward", 64): Tile(128, 64, 8, 3),
    ("gfx942", "forward", 128): Tile(128, 32, 8, 3),
    ("gfx942", "queries", 64): Tile(64, 64, 4, 2),
    ("gfx942", "queries", 128): Tile(64, 32, 4, 2),
    ("gfx942", "keys", 64): Tile(64, 32, 4, 2),
    ("gfx942", "keys", 128): Tile(64, 32, 4, 2),
}

# Where ``_PLAIN`` would spill, of lists of blocks and of parts of a sequence.
_LISTED: dict[tuple[str, Pass, int], Tile] = {
    ("sm80", "forward", 128): Tile(128, 32, 8, 2),
    ("sm80", "keys", 128): Tile(64, 32, 8, 2),
    ("gfx942", "keys", 128): Tile(64, 16, 4, 2),
}

_PART: dict[tuple[str, Pass, int], Tile] = {
    ("sm80", "forward", 128): Tile(128, 32, 8, 2),
    ("sm100", "queries", 64): Tile(64, 32, 8, 2),
    ("sm100", "keys", 128): Tile(64, 32, 8, 2),
    ("gfx942", "keys", 128): Tile(64, 16, 4, 2),
}

# By architecture and head size; ``own`` is the largest that a tile is used for. Documents take the tiles of no mask.
_DECODE: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("sm80", 64): (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)),
    ("sm80", 128): (Tile(64, 64, 8, 3),),
    ("sm90", 64): (Tile(64, 64, 4, 3),),
    ("sm90", 128): (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)),
    ("sm90", 256): (Tile(16, 32, 4, 1), Tile(64, 32, 8, 2)),
    ("sm100", 64): (Tile(16, 64, 4, 3), Tile(64, 64, 8, 3)),
    ("sm100", 128): (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)),
    ("gfx942", 64): (Tile(64, 64, 4, 3),),
    ("gfx942", 128): (Tile(64, 32, 4, 3),),
    ("float32", 64): (Tile(64, 16, 4, 1),),
    ("float32", 128): (Tile(16, 16, 4, 1), Tile(64, 16, 8, 1)),
    ("float32", 256): (Tile(64, 16, 8, 1),),
}

_DECODE_MASKED: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("sm80", 64): (Tile(64, 32, 8, 3),),
    ("sm80", 128): (Tile(16, 64, 8, 3), Tile(64, 32, 8, 3)),
    ("sm90", 64): (Tile(16, 32, 8, 3), Tile(64, 32, 4, 3)),
    ("sm90", 128): (Tile(16, 64, 4, 2), Tile(64, 32, 8, 3)),
    ("sm90", 256): (Tile(16, 16, 4, 1), Tile(64, 16, 8, 1)),
    ("sm100", 64): (Tile(64, 32, 8, 3),),
    ("sm100", 128): (Tile(16, 32, 8, 3), Tile(64, 32, 8, 1)),
    ("gfx942", 64): (Tile(64, 64, 4, 3),),
    ("gfx942", 128): (Tile(64, 32, 4, 3),),
    ("float32", 64): (Tile(64, 16, 4, 1),),
    ("float32", 128): (Tile(16, 16, 4, 1), Tile(64, 16, 8, 1)),
    ("float32", 256): (Tile(64, 16, 8, 1),),
}
