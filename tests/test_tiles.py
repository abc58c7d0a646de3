"""Which tiles are tried beside that of the table: neighbours that may fit a program's shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dilcompile.lowering.triton import compiled, tiles
from dilcompile.lowering.triton.config import Tile
from dilcompile.lowering.triton.tiles import Kind

CUDA = torch.device("cuda", 0)


def rows() -> list[dict[str, str]]:
    """The table of compiled kernels."""
    lines = compiled.TABLE.read_text().splitlines()
    titles = lines[1].split()
    return [
        dict(zip(titles, line.split(), strict=False)) for line in lines[2:] if line.split()[0] in ("forward", "queries", "keys")
    ]


def of_row(row: dict[str, str]) -> tuple[Kind, Tile]:
    own, other = (int(side) for side in row["tile"].split("x"))
    head = max(16, *(1 << (int(row[size]) - 1).bit_length() for size in ("D", "Dv")))
    listed = row["switches"].endswith("blocks")
    kind = Kind(row["kernel"], CUDA, head, getattr(torch, row["dtype"]), "none", listed)  # type: ignore[arg-type]
    return kind, Tile(own, other, int(row["warps"]), int(row["stages"]))


def test_the_estimate_of_shared_memory_is_no_more_than_the_compilers() -> None:
    """Else a tile that fits would not be tried; what the compiler refuses is left out by itself."""
    checked = [(tiles._shared(*of_row(row)), int(row["shared"])) for row in rows()]
    assert len(checked) > 100
    assert all(estimate <= found for estimate, found in checked)
    assert any(2 * estimate >= found for estimate, found in checked)


@pytest.mark.parametrize("shared", [48 << 10, 99 << 10, 163 << 10, 227 << 10, None])
@pytest.mark.parametrize("head", [64, 128, 256])
def test_neighbours_differ_in_one_number_and_fit(head: int, shared: int | None) -> None:
    table = Tile(128, 64, 8, 3)
    kind = Kind("forward", CUDA, head, torch.bfloat16, "none")
    made = tiles.neighbours(kind, table, shared)
    assert next(iter(made.values())) == table
    for one in made.values():
        changed = [name for name in ("own", "other", "warps", "stages") if getattr(one, name) != getattr(table, name)]
        assert len(changed) == (0 if one == table else 1)
        assert one == table or shared is None or tiles._shared(kind, one) <= shared
    assert len(set(made.values())) == len(made)
    if shared is None:
        assert len(made) == 8


def test_descriptors_are_tried_where_a_device_has_them() -> None:
    """Never by the table, and not along lists or in documents, where the kernel would load by pointers all the same."""
    table = Tile(128, 64, 8, 3)

    def tried(*kind: Any, describes: bool = True) -> set[bool]:
        made = tiles.neighbours(Kind(*kind), table, None, describes)
        assert next(iter(made.values())) == table
        assert len(set(made.values())) == len(made)
        return {one.described for one in made.values()}

    assert (
        tried("forward", CUDA, 64, torch.bfloat16, "some") == tried("queries", CUDA, 128, torch.float16, "none") == {False, True}
    )
    assert tried("forward", CUDA, 64, torch.bfloat16, "none", describes=False) == {False}
    assert tried("keys", CUDA, 64, torch.bfloat16, "none") == tried("forward", CUDA, 64, torch.bfloat16, "none", True) == {False}
    assert tried("forward", CUDA, 64, torch.bfloat16, "counted") == {False}


def test_sides_stay_in_what_kernels_take() -> None:
    kind = Kind("queries", CUDA, 64, torch.bfloat16, "none")
    for table in (Tile(16, 16, 4, 1), Tile(256, 256, 8, 5)):
        for one in tiles.neighbours(kind, table, None).values():
            assert 16 <= one.own <= 256
            assert 16 <= one.other <= 256
            assert 1 <= one.stages <= 5
