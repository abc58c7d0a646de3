"""`dilcompile policy`: check a policy file, show what it says in the end, print its JSON schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dilcompile.cli.model import Traceback, failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dilcompile.policy import Policy
    from dilcompile.site import AttentionSite

app = typer.Typer(help="Check, show and describe policy files.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="FILE|PRESET", help="A policy file or the name of a preset.")]


@app.command("check")
def check_policy(
    source: Source,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function that returns (model, inputs): report the rules that match none of its attention.",
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Report everything that is wrong with a policy; exit code 1 if anything is."""
    from dilcompile.policy.check import check

    policy = _load(source)
    findings = check(policy, _sites(model, policy, traceback) if model is not None else None)
    typer.echo(str(policy))
    for finding in findings:
        typer.echo(str(finding), err=True)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
    typer.echo(f"{source}: rules: {len(policy.rules)}, errors: 0, warnings: {len(findings)}")


@app.command()
def show(source: Source) -> None:
    """Print the policy as YAML, with everything that it extends."""
    typer.echo(_load(source).to_yaml(), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of policy files, for editors."""
    import json

    from dilcompile.policy import Policy

    typer.echo(json.dumps(Policy.json_schema(), indent=2))


def _load(source: str) -> Policy:
    from dilcompile.errors import PolicyError
    from dilcompile.policy import Policy

    try:
        return Policy.load(source)
    except PolicyError as error:
        for line in error.problems:
            typer.echo(line, err=True)
        raise typer.Exit(1) from None


def _sites(spec: str, policy: Policy, traceback: bool) -> Sequence[AttentionSite]:
    """The attention sites of the user's model."""
    from dilcompile.cli.model import load_example, users_code
    from dilcompile.errors import DilcompileError
    from dilcompile.inspect import explain

    try:
        example = load_example(spec)
        with users_code(f"--model {spec}: calling the model"):
            sites: Sequence[AttentionSite] = explain(example.model, *example.args, policy=policy, **example.kwargs).sites
    except DilcompileError as error:
        raise failed(error, traceback) from None
    return sites
