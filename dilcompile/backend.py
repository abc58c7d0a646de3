"""``torch.compile(model, backend="dilated")``: found through the entry point group ``torch_dynamo_backends``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import dilcompile.lowering.ops as _registered  # noqa: F401
from dilcompile.agreement import agree_over_ranks, axes_of
from dilcompile.budgeted import Budgeted, bounds_of, with_budget
from dilcompile.decision import Decision, MemoryUse
from dilcompile.errors import DilcompileError, ShardingError
from dilcompile.first_call import compared
from dilcompile.near import hint
from dilcompile.passes.frames import compiled_frame
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.placements.marks import MARKS, Mark
from dilcompile.planned import planned
from dilcompile.policy import Policy, memory_use, tell_again
from dilcompile.publish import forget, publish
from dilcompile.report import GraphReport
from dilcompile.report.file import report_path

Compiled = Callable[..., Any]

_OPTIONS = ("policy", "mode", "inner", "report")
_INNERS = ("inductor", "aot_eager", "eager")


def dilated(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Rewrite the attentions of a Dynamo graph by policy, then compile it with the inner compiler.

    Args:
        gm, example_inputs: as Dynamo gives them.
        options: ``policy`` (path, dict, ``Policy`` or preset name; default: ``DILCOMPILE_POLICY``, else ``longnet``),
            ``inner`` (``inductor``, ``aot_eager``, ``eager``), ``mode`` (Inductor's: ``default``, ``reduce-overhead``,
            ``max-autotune``, ``max-autotune-no-cudagraphs``), ``report`` (path of an .html or .json file to write).
        mode: the same as the option; torch.compile takes it only without options.

    Raises:
        DilcompileError: for an unknown option or value.
        PolicyError: for a policy that can't be read, with every problem in it.
        RewriteError: where the policy says that a failure is an error.
        ShardingError: if a sharded graph would compute something else than one rank does, or ranks compile different graphs.
        PlacementError: if there is no mesh to shard over.
    """
    asked = _checked(options, mode)
    policy = Policy.load(asked.get("policy"))
    outcome = rewrite_dynamo(gm, example_inputs, policy, _compile_id())
    axes = axes_of(outcome.report)
    if axes and outcome.gm is not None:
        agree_over_ranks(outcome.gm, example_inputs, outcome.report, policy)
    publish(outcome.report, policy, asked.get("report"))
    memory, bounds = _memory(outcome.report, policy), bounds_of(policy, outcome.report, compiled_frame().prefix)
    compile_inner = _inner(asked.get("inner", "inductor"), asked.get("mode"), memory)
    if bounds:
        patches = _patches(asked.get("mode"))
        compile_inner = Budgeted(asked.get("inner", "inductor"), outcome.report.graph, memory or MemoryUse(), bounds, patches)
    compiled = compile_inner(gm if outcome.gm is None else outcome.gm, example_inputs)
    if isinstance(compile_inner, Budgeted):
        outcome = replace(outcome, report=with_budget(outcome.report, compile_inner.report))
        publish(outcome.report, policy, asked.get("report"))
    if outcome.gm is None:
        return _counted(_marked(compiled, outcome.results), outcome.report)
    original = _no_shard(axes) if axes else cache(lambda: compile_inner(gm, example_inputs))
    if outcome.trials:
        compiled = compared(compiled, outcome, original, lambda report: publish(report, policy, asked.get("report")))
    if outcome.tables:
        compiled = _watched(compiled, outcome.tables, original)
    return _counted(_marked(compiled, outcome.results), outcome.report)


def _no_shard(axes: Mapping[str, int]) -> Callable[[], Compiled]:
    """In place of the user's own graph, which would take a rank's shard for the whole sequence."""

    def refuse() -> Compiled:
        raise ShardingError(
            f"what this graph was rewritten by no longer holds (see the error before; or a buffer with a mask has changed), and "
            f"its sequence is sharded over mesh axis {', '.join(map(repr, axes))}: the model's own graph would compute something "
            f"else; compile it again after torch._dynamo.reset()"
        )

    return refuse


def _reset() -> None:
    """Report files and warnings begin anew."""
    forget()
    tell_again()
    MARKS.forget_graphs()


# torch._dynamo.reset() calls it.
dilated.reset = _reset  # type: ignore[attr-defined]


def _checked(options: Mapping[str, Any] | None, mode: str | None) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise DilcompileError(f"options: must be a dict with the keys {', '.join(_OPTIONS)}, not {options!r}")
    asked = dict(options or {})
    for key in asked:
        if key not in _OPTIONS:
            raise DilcompileError(f"options: unknown key {key!r}{hint(key, _OPTIONS)}; the keys are {', '.join(_OPTIONS)}")
    if mode is not None:
        asked.setdefault("mode", mode)
    inner = asked.get("inner", "inductor")
    if inner not in _INNERS:
        raise DilcompileError(f"options: inner must be one of {', '.join(_INNERS)}, not {inner!r}")
    modes = sorted(torch._inductor.list_mode_options())
    if asked.get("mode") not in (None, *modes):
        raise DilcompileError(f"options: mode must be one of {', '.join(modes)}, not {asked['mode']!r}")
    if asked.get("mode") not in (None, "default") and inner != "inductor":
        raise DilcompileError(f"options: mode {asked['mode']!r} is Inductor's, but inner is {inner!r}; leave one of them out")
    if asked.get("report") is not None:
        report_path(asked["report"])
    return asked


def _compile_id() -> str:
    compile_id = torch._guards.CompileContext.current_compile_id()
    return "?" if compile_id is None else str(compile_id)


def _memory(report: GraphReport, policy: Policy) -> MemoryUse | None:
    """What the rules say of the graph's buffers: the first that says anything, else the defaults."""
    found = [verdict.memory for verdict in report.verdicts if isinstance(verdict, Decision) and verdict.memory is not None]
    return found[0] if found else memory_use(policy)


def _patches(mode: str | None) -> dict[str, Any]:
    """What a mode sets in Inductor's configuration."""
    return torch._inductor.list_mode_options(mode) if mode is not None else {}


def _inner(name: str, mode: str | None, memory: MemoryUse | None) -> Callable[[GraphModule, Sequence[Any]], Compiled]:
    if name == "eager":
        return lambda gm, example_inputs: gm.forward
    if name == "aot_eager" and memory is not None and memory.reuse != "off":
        return planned(memory)
    if name == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return lambda gm, example_inputs: aot_eager(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    patches = _patches(mode)

    def inductor(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
        assert callable(compiled)
        return compiled

    return inductor


def _watched(compiled: Compiled, tables: Mapping[int, torch.Tensor], original: Callable[[], Compiled]) -> Compiled:
    """Run ``compiled`` while the buffers that masks were read from are what they were; else the original graph.

    A buffer is the same while it is the same object with the same version counter.
    """
    versions = {position: (table, table._version) for position, table in tables.items()}

    def run(*args: Any) -> Any:
        for position, (table, version) in versions.items():
            held = args[position]
            if held is not table or held._version != version:
                return original()(*args)
        return compiled(*args)

    return run


def _marked(compiled: Compiled, marks: Sequence[Mark | None]) -> Compiled:
    """Say of what the graph returns which dims run along the sequence: a graph behind it may read it."""
    if not any(marks):
        return compiled

    def run(*args: Any) -> Any:
        results = compiled(*args)
        MARKS.note_results(results, marks)
        return results

    return run


def _counted(compiled: Compiled, report: GraphReport) -> Compiled:
    """Count the graph when it first runs: Dynamo may call a backend twice for a graph and drop the first result."""
    counted = False

    def run(*args: Any) -> Any:
        nonlocal counted
        if not counted:
            counted = True
            tally = counters["dilcompile"]
            tally["graphs"] += 1
            tally["sites_found"] += len(report.verdicts)
            tally["sites_rewritten"] += sum(isinstance(verdict, Decision) for verdict in report.verdicts)
            tally["misses"] += len(report.misses)
        return compiled(*args)

    return run
