"""The command line: one file a command, one line a registration."""

from __future__ import annotations

import typer

from dilcompile.cli import bench, inspect, plan, policy

app = typer.Typer(
    help="Rewrite the attention of unmodified models by policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(inspect.inspect)
app.command()(bench.bench)
app.command()(plan.plan)
app.add_typer(policy.app, name="policy")


def main() -> None:
    """The console script ``dilcompile``."""
    app()
