"""`dilcompile bench`: measure dilated against dense attention on this machine."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Heading, key, format; the words of a heading may stand below each other, numbers are never cut.
COLUMNS = (
    ("case", "case", "{}"),
    ("pairs / all", "density", "{:.0%}"),
    ("fwd ms", "forward_ms", "{:.1f}"),
    ("fwd / ideal", "forward_over_ideal", "{:.2f}"),
    ("dense / fwd", "dense_over_forward", "{:.1f}"),
    ("gather / fwd", "gather_over_forward", "{:.1f}"),
    ("both / ideal", "both_over_ideal", "{:.2f}"),
    ("memory / out", "extra_over_one_tensor", "{:.2f}"),
    ("error / dense", "error_over_dense", "{:.2f}"),
    ("verdict", "verdict", "{}"),
)


def bench(
    lengths: Annotated[str, typer.Option(metavar="N,N", help="Sequence lengths.")] = "4096,16384",
    dtypes: Annotated[str, typer.Option(metavar="NAME,NAME", help=f"Of {', '.join(DTYPES)}.")] = "float32,bfloat16",
    heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    backward: Annotated[bool, typer.Option("--backward", help="Measure the backward too.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; medians are reported.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line a row in place of the table.")] = False,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write rows, command and machine as JSON.")] = None,
) -> None:
    """Time dilated attention against dense SDPA on the CPU, in turns, each with its error against float64.

    Segments 2048, 4096, ... with rates 1, 2, ... ; ideal is the time of its FLOPs at dense SDPA's rate, gather the way of
    torchscale: each branch gathered, a dense attention, a merge. Exit code 1 if a result is wrong.
    """
    from dilcompile.errors import DilcompileError

    try:
        cases = [(length, dtype) for length in _lengths(lengths) for dtype in _dtypes(dtypes)]
    except DilcompileError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    from dilcompile import bench as measure

    rows: list[dict[str, Any]] = []
    for length, dtype in cases:
        typer.echo(f"measuring length {length}, {str(dtype).removeprefix('torch.')}", err=True)
        found = measure.run([length], [dtype], heads, head_dim, backward, repeats)
        rows += found
        for row in found if json else ():
            typer.echo(json_format.dumps(row))
    if not json:
        _print(rows)
    if save is not None:
        options = f"--lengths {lengths} --dtypes {dtypes} --heads {heads} --head-dim {head_dim} --repeats {repeats}"
        measure.save(save, rows, f"dilcompile bench {options}" + (" --backward" if backward else ""))
    if not all(row["correct"] for row in rows):
        raise typer.Exit(1)


def _lengths(text: str) -> list[int]:
    from dilcompile.errors import DilcompileError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DilcompileError(f"--lengths takes whole numbers of at least 1 with commas between, got {text!r}")
    return [int(part) for part in parts]


def _dtypes(text: str) -> list[torch.dtype]:
    from dilcompile.errors import DilcompileError

    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in DTYPES:
            raise DilcompileError(f"--dtypes takes {', '.join(DTYPES)} with commas between, got {part!r}")
    import torch

    return [getattr(torch, part) for part in parts]


def _print(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A figure that no row has: both passes where the forward alone was asked for, gathering where no segment divides a length.
    shown = [column for column in COLUMNS if any(column[1] in _cells(row) for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    texts = [[form.format(cells[key]) if key in cells else "-" for _, key, form in shown] for cells in map(_cells, rows)]
    for index, (heading, key, _) in enumerate(shown):
        lines = [line for cells in texts for line in cells[index].splitlines()]
        width = max(map(len, [*heading.split(), *lines]))
        table.add_column(heading, justify="left" if key == "case" else "right", width=width)
    for cells in texts:
        table.add_row(*cells)
    Console().print(table)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "case": f"{row['length']}\n{row['dtype']}\n{'causal' if row['causal'] else 'full'}",
        "forward_ms": row["forward_s"] * 1e3,
        "error_over_dense": row["error"] / max(row["dense_error"], 1e-300),
        "verdict": "correct" if row["correct"] else "WRONG",
    }
