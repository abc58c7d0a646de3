"""`dilcompile inspect`: find every attention of a model and say what a policy makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dilcompile.cli.model import Traceback, failed

if TYPE_CHECKING:
    from dilcompile.report import Report


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="A function that returns (model, inputs) or (model, args, kwargs).")
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="Default: what DILCOMPILE_POLICY names, else longnet.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, every site by itself.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page.")] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw which pairs are computed, one picture for each distinct pattern.")
    ] = False,
    fail_on_miss: Annotated[
        bool,
        typer.Option("--fail-on-miss", help="Exit code 1 if anything that looks like attention was missed, or a site refused."),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Show every attention of a model, what the policy makes of it, and why not where it can't. The model is not changed.

    Exit code 1 if the policy is wrong or the model can't be made or run.
    """
    from dilcompile.errors import DilcompileError

    try:
        report = _report(model, policy, html)
    except DilcompileError as error:
        raise failed(error, traceback) from None
    _show(report, json, pictures)
    failures = [*report.misses, *(rejection for rejection in report.rejections if not rejection.asked)]
    if fail_on_miss and failures:
        typer.echo(f"{model}: missed or refused: {len(failures)}", err=True)
        raise typer.Exit(1)


def _report(model: str, policy: str | None, html: Path | None) -> Report:
    from dilcompile.cli.model import load_example, users_code
    from dilcompile.cli.page import check_page
    from dilcompile.inspect import explain
    from dilcompile.policy import Policy

    check_page(html)
    loaded = Policy.load(policy)
    example = load_example(model, "MODULE:FUNCTION")
    with users_code(f"MODULE:FUNCTION {model}: calling the model"):
        report = explain(example.model, *example.args, policy=loaded, **example.kwargs)
    if html is not None:
        report.write(html)
    return report


def _show(report: Report, as_json: bool, pictures: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    typer.echo(str(report))
    for pattern in report.patterns if pictures else ():
        typer.echo(f"\n{pattern}")
