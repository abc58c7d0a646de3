"""`dilcompile plan`: what sharding a model's sequence moves and costs, and what its buffers take, predicted on one CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dilcompile.cli.model import Traceback, failed

if TYPE_CHECKING:
    from dilcompile.placements.device import Device
    from dilcompile.sharding_plan import Plan


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="A function that returns (model, inputs) or (model, args, kwargs).")
    ],
    mesh: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=RANKS",
            help="The mesh axis that holds the sequence, such as cp=8; for usp a second one over which heads are exchanged, as "
            "cp=8,heads=4 or by another --mesh.",
        ),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Plan the buffers of its graphs; computes nothing.")] = False,
    policy: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="Default: what DILCOMPILE_POLICY names, else longnet.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of the whole sequence; default: those of the inputs.")] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What the ranks are: h100, h200, a100, cpu, or a file that Device.save of a calibration wrote.",
        ),
    ] = "h100",
    flops: Annotated[float | None, typer.Option(help="Measured FLOP/s of attention in 2-byte dtypes.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Measured bytes/s that a rank receives, over all links.")] = None,
    latency: Annotated[float | None, typer.Option(help="Measured seconds of an exchange beside its bytes.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of other ranks' rows held at once, such as 2GiB.")
    ] = None,
    train: Annotated[bool, typer.Option(help="Count the backward, too.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, with every method that could be had.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="With --memory: write it as a page with pictures.")] = None,
    traceback: Traceback = False,
) -> None:
    """Predict on one CPU what a model's call would take: over the ranks of a mesh axis (--mesh), in memory (--memory), or both.

    --mesh shows for each attention how its keys would travel, how many bytes, how long, and why so; --memory which buffers each
    graph has, how they are packed, and the peak.

    Exit code 1 if the policy or an option is wrong or the model can't be made.
    """
    from dilcompile.cli.memory import planned_memory
    from dilcompile.errors import DilcompileError

    try:
        if mesh is None and not memory:
            raise DilcompileError("nothing to plan: give --mesh AXIS=RANKS, --memory, or both")
        if html is not None and not memory:
            raise DilcompileError("--html shows what --memory plans: give --memory, too")
        over = None
        if mesh is not None:
            over = _plan(model, mesh, policy, length, _device(device, flops, bandwidth, latency), budget, train)
        held = planned_memory(model, policy, length, train, html) if memory else None
    except DilcompileError as error:
        raise failed(error, traceback) from None
    if json:
        import json as text

        told = {**({} if over is None else over.to_dict()), **({} if held is None else {"memory": held.to_dict()})}
        typer.echo(text.dumps(told, indent=2))
    else:
        typer.echo("\n\n".join(str(one) for one in (over, held) if one is not None))


def _plan(
    model: str, mesh: list[str], policy: str | None, length: int | None, device: Device, budget: str | None, train: bool
) -> Plan:
    from dilcompile.cli.model import load_example, users_code
    from dilcompile.errors import DilcompileError
    from dilcompile.policy import Policy
    from dilcompile.policy.schema import num_bytes
    from dilcompile.sharding_plan import plan as planned

    axes = _axes(mesh)
    try:
        most = None if budget is None else num_bytes(budget)
    except ValueError as error:
        raise DilcompileError(f"--budget {budget}: {error}") from None
    loaded = Policy.load(policy)
    example = load_example(model, "MODULE:FUNCTION")
    with users_code(f"MODULE:FUNCTION {model}: calling the model"):
        return planned(example.model, example.args, example.kwargs, loaded, axes, device, length, most, train)


def _axes(mesh: list[str]) -> dict[str, int]:
    """Ranks by axis, in the order in which they are given."""
    from dilcompile.errors import DilcompileError

    found: dict[str, int] = {}
    for each in (part for given in mesh for part in given.split(",")):
        axis, _, ranks = each.strip().partition("=")
        if not axis or not ranks.isdecimal() or int(ranks) < 1 or axis in found:
            raise DilcompileError(f"--mesh takes AXIS=RANKS, such as cp=8, or two as in cp=8,heads=4, got {','.join(mesh)!r}")
        found[axis] = int(ranks)
    return found


def _device(name: str, flops: float | None, bandwidth: float | None, latency: float | None) -> Device:
    from dilcompile.errors import DilcompileError
    from dilcompile.near import hint
    from dilcompile.placements.device import DEVICES, Device

    is_file = name.endswith(".json")
    if not is_file and name not in DEVICES:
        known = ", ".join(DEVICES)
        raise DilcompileError(f"--device {name!r} is not known{hint(name, DEVICES)}; known are {known}, and .json files")
    given = {key: value for key, value in (("flops", flops), ("latency", latency)) if value is not None}
    if bandwidth is not None:
        given.update(bandwidth=bandwidth, network=bandwidth)
    wrong = [f"--{key} must be more than 0, got {value}" for key, value in given.items() if not value > 0]
    if wrong:
        raise DilcompileError("; ".join(wrong))
    device = Device.load(name) if is_file else DEVICES[name]
    return replace(device, **given, source=f"{device.source}; given: {', '.join(given)}") if given else device  # type: ignore[arg-type]
