"""The inner compilers: who compiles a rewritten graph, and what there is to tell of its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch.fx import GraphModule

from dilcompile.budgeted import Budgeted
from dilcompile.decision import MemoryUse
from dilcompile.memory import plan_buffers
from dilcompile.memory.account import Direction, GraphMemory
from dilcompile.memory.budget import Bound
from dilcompile.passes.memory.lifetimes import lifetimes_of
from dilcompile.planned import PlannedCall, account_of, planned
from dilcompile.publish import Telling

InnerName = Literal["inductor", "aot_eager", "eager"]
INNERS: tuple[InnerName, ...] = get_args(InnerName)
Compiled = Callable[..., Any]
Inner = Callable[[GraphModule, Sequence[Any]], Compiled]

# After which calls the report is written again: what its memory came to then.
_TOLD_AFTER = frozenset((1, 2, 8, 64, 512))
NOT_UNDER_GRAD = (
    "memory: nothing is planned, because inner: eager leaves what is saved for the backward to autograd; inner: aot_eager plans "
    "both, and under torch.no_grad() this one is planned"
)
BY_INDUCTOR = (
    "memory: Inductor gives the buffers of this graph their places, and a report lists those that are ours; pool and reuse are "
    "for inner: aot_eager"
)


def inner_compiler(
    name: InnerName, mode: str | None, memory: MemoryUse | None, bounds: tuple[Bound, ...] = (), *, trains: bool, telling: Telling
) -> Inner:
    """The inner compiler of this name.

    Args:
        mode: Inductor's.
        memory: what the rules say of the graph's buffers; None: they are not planned.
        bounds: what the graph's memory must keep.
        trains: a gradient is asked for.
        telling: is told of the memory of each graph.
    """

    def tell(call: PlannedCall, direction: Direction) -> None:
        _watch(call, direction, telling)

    if bounds:
        patches, innermost = _patches(mode), _innermost(telling)
        return Budgeted(name, telling.graph, memory or MemoryUse(), bounds, patches, tell=tell, innermost=innermost)
    if name == "inductor":
        return _inductor(mode, telling)
    if memory is not None and memory.reuse != "off" and (name == "aot_eager" or not trains):
        return planned(memory, tell)
    if name == "eager":
        return lambda gm, example_inputs: gm.forward
    from torch._dynamo.backends.debugging import aot_eager

    return lambda gm, example_inputs: aot_eager(gm, list(example_inputs))


def notes_on_memory(name: InnerName, memory: MemoryUse | None, *, trains: bool) -> tuple[str, ...]:
    """What a rule asks for that this inner compiler does not do."""
    if memory is None or memory.reuse == "off" or name == "aot_eager":
        return ()
    if name == "inductor":
        return (BY_INDUCTOR,)
    return (NOT_UNDER_GRAD,) if trains else ()


def _watch(call: PlannedCall, direction: Direction, telling: Telling) -> None:
    if not telling.wanted:
        return
    telling.memory(call.account(telling.graph, direction))

    def after() -> None:
        if call.runs.calls in _TOLD_AFTER:
            telling.memory(call.account(telling.graph, direction))
            telling.again()

    call.after = after


def _patches(mode: str | None) -> dict[str, Any]:
    """What a mode sets in Inductor's configuration."""
    return torch._inductor.list_mode_options(mode) if mode is not None else {}


def _innermost(telling: Telling) -> Compiled:
    """Inductor's compiler of one graph, which lists what is ours where somebody wants to know."""
    from torch._inductor.compile_fx import compile_fx_inner

    def listed(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        direction: Direction = "forward"
        if options.get("is_backward") or options.get("is_inference"):
            direction = "backward" if options.get("is_backward") else "inference"
        telling.memory(_ours(gm, telling.graph, direction))
        return compile_fx_inner(gm, example_inputs, **options)

    # Only where there is a report to list them in: a graph that comes from Inductor's cache is not shown to us.
    return listed if telling.wanted else compile_fx_inner


def _inductor(mode: str | None, telling: Telling) -> Inner:
    from torch._inductor.compile_fx import compile_fx

    patches, innermost = _patches(mode), _innermost(telling)

    def inductor(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        compiled = compile_fx(gm, list(example_inputs), inner_compile=innermost, config_patches=patches)
        assert callable(compiled)
        return compiled

    return inductor


def _ours(gm: GraphModule, graph: str, direction: Direction) -> GraphMemory:
    """The buffers of our operators among those that Inductor places."""
    found = lifetimes_of(gm, ours_only=True)
    return account_of(graph, direction, plan_buffers(found.buffers), found, planner="inductor")
