"""What a forward and its backward will need, read off both graphs before either runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dilcompile.errors import BudgetError
from dilcompile.memory.buffer import Buffer
from dilcompile.memory.step import Phase, Reuse, Step
from dilcompile.passes.graph.copies import copied
from dilcompile.passes.graph.provenance import module_path, source_line
from dilcompile.passes.memory.donated import donated_between
from dilcompile.passes.memory.lifetimes import Lifetimes, lifetimes_of
from dilcompile.passes.memory.plan_buffers import Workspaces, plan_graph, without

_BACKWARD = "backward:"


def foresee(
    forward: GraphModule,
    backward: GraphModule | None = None,
    num_outputs: int | None = None,
    reuse: Reuse = "off",
    workspace: Workspaces = without,
) -> Step:
    """The buffers of one step. The graphs stay as they are.

    Args:
        forward, backward: ATen graphs with fake values, as a partition of AOTAutograd's joint graph gives them: a saved tensor is
            an output of the forward and, by the same name, an input of the backward.
        num_outputs: how many of the forward's outputs are the model's own; the others are saved. None: all.
        reuse: how its buffers will be planned.
        workspace: see ``plan_graph``.

    Raises:
        BudgetError: if the size of a tensor is known only when the graph runs.
    """
    for gm in (forward, *([] if backward is None else [backward])):
        _refuse_unknown_sizes(gm)
    first = lifetimes_of(forward)
    model_outputs = set(first.outputs[:num_outputs])
    ahead = max(1, first.steps)
    if backward is None:
        kept = [replace(buffer, role="output") for buffer in first.kept]
        only, own = _phase(forward, first, reuse, workspace, 0, ahead - 1)
        return Step((*first.buffers, *own, *kept), (only,))
    second = lifetimes_of(backward)
    last = ahead + max(1, second.steps) - 1
    ends = _last_reads(forward, first, second)
    forwards, own = _phase(forward, first, reuse, workspace, 0, ahead - 1)
    found = [*first.buffers, *own]
    for buffer in first.kept:
        if buffer.name in model_outputs:
            found.append(replace(buffer, role="output", end=last))
        else:
            found.append(replace(buffer, role="saved", end=ahead + ends.get(buffer.name, last - ahead)))
    donated = donated_between(forward, backward, num_outputs)
    backwards, own = _phase(backward, second, reuse, workspace, ahead, last, donated)
    found.extend(_shifted(buffer, ahead) for buffer in (*second.buffers, *second.kept))
    found.extend(replace(_shifted(buffer, ahead), role=buffer.role) for buffer in own)
    placed = frozenset(_BACKWARD + name for name in backwards.placed)
    backwards = replace(backwards, placed=placed, held=_held(forward, first, backwards))
    return Step(tuple(found), (forwards, backwards))


def _refuse_unknown_sizes(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise BudgetError(
                f"memory.budget: how large {node.name} of {module_path(node) or 'the graph'} ({source_line(node)}) is depends on "
                "data, so that no need of memory can be foreseen; leave the budget out, or compute that outside of the model"
            )


def _phase(
    gm: GraphModule,
    lifetimes: Lifetimes,
    reuse: Reuse,
    workspace: Workspaces,
    begin: int,
    end: int,
    donated: Collection[int] = (),
) -> tuple[Phase, tuple[Buffer, ...]]:
    """With the arenas that the graph would get, and the workspaces in them; without a plan operators make their own."""
    if reuse == "off":
        return Phase(begin, end), ()
    planned = plan_graph(copied(gm), within_module=reuse == "within_layer", workspace=workspace, donated=donated)
    elsewhere = {buffer.name for buffer in planned.elsewhere}
    placed = frozenset(buffer.name for buffer in (*lifetimes.buffers, *planned.workspaces) if buffer.name not in elsewhere)
    return Phase(begin, end, planned.plan, placed), planned.workspaces


def _held(forward: GraphModule, first: Lifetimes, backwards: Phase) -> dict[str, int]:
    """For each buffer that the forward hands over and in which others lie then, the last step of those."""
    plan = backwards.plan
    arenas = {} if plan is None else {arena.inside.name: arena for arena in plan.donated if arena.inside is not None}
    return {
        buffer: backwards.begin + max(other.end for other in arenas[result.name].buffers)
        for result, buffer in zip(_results(forward), first.outputs, strict=True)
        if buffer is not None and result is not None and result.name in arenas
    }


def _shifted(buffer: Buffer, steps: int) -> Buffer:
    name, begin, end = _BACKWARD + buffer.name, buffer.begin + steps, buffer.end + steps
    return replace(buffer, name=name, begin=begin, end=end, role="gradient")


def _last_reads(forward: GraphModule, first: Lifetimes, second: Lifetimes) -> dict[str, int]:
    """For each buffer that the forward hands over the step of the backward that reads it last, through any of its views."""
    read = {buffer.name: buffer.end for buffer in second.given}
    found: dict[str, int] = {}
    for result, buffer in zip(_results(forward), first.outputs, strict=True):
        if buffer is not None and result is not None and result.name in read:
            found[buffer] = max(found.get(buffer, 0), read[result.name])
    return found


def _results(gm: GraphModule) -> Iterator[Node | None]:
    for result in gm.graph.output_node().args[0]:  # type: ignore[union-attr]
        yield result if isinstance(result, Node) else None
