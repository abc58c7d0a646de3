"""The Triton kernels with the tiles that GPUs get, run by Triton's interpreter on a CPU. Run by ``test_triton`` in a process of its own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_kernels import SCALE, assert_grads, drawn, operands_of, setting_of

from dilcompile.forms import Dense, Dilated
from dilcompile.lowering.call import Call, problem_of
from dilcompile.lowering.triton import bound
from dilcompile.lowering.triton.compiled import ARCHS
from dilcompile.lowering.triton.config import Masks, Pass, Tile, tile_of

STEPS: tuple[Pass, ...] = ("forward", "queries", "keys", "bias")
OPERANDS: dict[Masks, tuple[str, ...]] = {
    "none": (),
    "some": ("key_padding",),
    "pairs": ("bias",),
    "counted": ("documents",),
    "counted pairs": ("documents", "bias"),
}


def configurations() -> dict[str, tuple[Masks, dict[Pass, Tile]]]:
    """The tiles that calls of a kind get on some device, each combination once."""
    found: dict[str, tuple[Masks, dict[Pass, Tile]]] = {}
    kinds = itertools.product(ARCHS, (64, 128, 256), (torch.bfloat16, torch.float32), OPERANDS)
    for arch, head, dtype, masks in kinds:
        tiles = {step: tile_of(step, arch, head, dtype, masks) for step in STEPS if step != "bias" or "pairs" in masks}
        shapes = (f"{step} {tile.own}x{tile.other}" for step, tile in tiles.items())
        found.setdefault(f"{masks}: {', '.join(shapes)}", (masks, tiles))
    return found


CONFIGURATIONS = configurations()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_tile_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles and more of both sides, blocks with and without masks, ragged ends."""
    masks, tiles = CONFIGURATIONS[name]
    right = bound.Bound.tile
    monkeypatch.setattr(bound.Bound, "tile", lambda self, step, rows=16: tiles.get(step) or right(self, step, rows))
    length = max(max(tile.own, tile.other) for tile in tiles.values()) + 22
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=length, k_len=length)
    asked: dict[str, Any] = {"key_padding": True, "documents": "own", "bias": (1, 2, length, length)}
    operands = operands_of({word: asked[word] for word in OPERANDS[masks]}, batch=1, length=length)
    at = setting_of(q, k, causal=True)
    assert_grads("triton", Dilated([length * 2 // 3, length], [1, 2]), at, q, k, v, **operands)
    # Calls of this kind are those that have these tiles.
    relation = Dense().relation(problem_of(q, k, v, True, None, None, 0))
    call = Call(q, k, v, *map(operands.get, ("key_padding", "documents", "bias")), None, relation, SCALE)
    assert bound._masks(call, bound.bind(call).bias_by(1)) == masks
