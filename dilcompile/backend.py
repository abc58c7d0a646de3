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
from dilcompile.decision import Decision
from dilcompile.errors import DilcompileError, ShardingError
from dilcompile.first_call import compared
from dilcompile.inner import INNERS, inner_compiler, notes_on_memory
from dilcompile.near import hint
from dilcompile.passes.graph.frames import compiled_frame
from dilcompile.pipeline import rewrite_dynamo, training
from dilcompile.placements.marks import MARKS, Mark
from dilcompile.planned import memory_use
from dilcompile.policy import Policy, tell_again
from dilcompile.publish import Telling, forget
from dilcompile.report import GraphReport
from dilcompile.report.file import report_path

Compiled = Callable[..., Any]

_OPTIONS = ("policy", "mode", "inner", "report")


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
    inner, memory, trains = asked.get("inner", "inductor"), memory_use(outcome.report, policy), training(example_inputs)
    bounds = bounds_of(policy, outcome.report, compiled_frame().prefix)
    notes = (*outcome.report.notes, *notes_on_memory(inner, memory, trains=trains))
    outcome = replace(outcome, report=replace(outcome.report, notes=notes))
    telling = Telling(outcome.report, policy, asked.get("report"))
    compile_inner = inner_compiler(inner, asked.get("mode"), memory, bounds, trains=trains, telling=telling)
    compiled = compile_inner(gm if outcome.gm is None else outcome.gm, example_inputs)
    if isinstance(compile_inner, Budgeted):
        outcome = replace(outcome, report=with_budget(outcome.report, compile_inner.report))
        telling.amend(outcome.report)
    else:
        telling.again()
    if outcome.gm is None:
        return _counted(_marked(compiled, outcome.results), outcome.report)
    original = _no_shard(axes) if axes else cache(lambda: compile_inner(gm, example_inputs))
    if outcome.trials:
        compiled = compared(compiled, outcome, original, telling.amend)
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
    if inner not in INNERS:
        raise DilcompileError(f"options: inner must be one of {', '.join(INNERS)}, not {inner!r}")
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
