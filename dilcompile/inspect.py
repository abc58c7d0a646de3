"""``explain``: what a policy would do to a model, without compiling, changing or (mostly) running it."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any, TypeAlias, TypeVar

import torch
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from dilcompile.decision import MemoryUse
from dilcompile.memory.account import GraphMemory
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.placements.marks import MARKS, Mark, Marks
from dilcompile.planned import memory_use, planned
from dilcompile.policy import Policy
from dilcompile.publish import gathered
from dilcompile.report import GraphReport, Report

_CALL = "def call(*args, **kwargs):\n    return model(*args, **kwargs)\n"
_FILE = "<dilcompile.explain>"
_NO_LIMIT = 1 << 30

Found = TypeVar("Found")
Results: TypeAlias = "tuple[Mark | None, ...]"
Look: TypeAlias = "Callable[[GraphModule, Sequence[Any], str, Marks], tuple[Found, Results]]"


class _Captured(Exception):
    """Leaves the call once its only graph is known, before anything is computed."""


class GraphBreak(Exception):
    """The model has graph breaks, or its call is wrong; says why."""


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,
    policy: str | os.PathLike[str] | dict[str, Any] | Policy | None = None,
    **kwargs: Any,
) -> Report:
    """What ``torch.compile(model, backend="dilated", options={"policy": policy})`` would do to ``model(*args, **kwargs)``.

    A model that Dynamo captures as one graph is not run. One with graph breaks is run once as it is, because what follows a
    break depends on what came before; its buffers and the random state are put back then. Nothing warns and no policy fallback
    raises: what they would say is in the report. Compilations made before or after are not affected.

    Args:
        model: a module or function, compiled or not. Grad mode and train/eval mode count as they are.
        policy: as in the backend's options; None: ``DILCOMPILE_POLICY``, else the preset ``longnet``.

    Raises:
        PolicyError: for a policy that can't be read.
    """
    loaded = Policy.load(policy)

    def described(gm: GraphModule, example_inputs: Sequence[Any], name: str, marks: Marks) -> tuple[GraphReport, Results]:
        return _described(gm, example_inputs, loaded, name, marks)

    found, breaks = each_graph(model, args, kwargs, described)
    return gathered(tuple(_with_breaks(found, breaks)), loaded)


def each_graph(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    look: Look[Found],
    *,
    may_run: bool = True,
) -> tuple[list[Found], Iterable[str]]:
    """What ``look`` says of each graph of ``model(*args, **kwargs)``, and the reasons of graph breaks.

    Args:
        look: is given a graph, its inputs, a name for it, and what is known of tensors along a sharded sequence; gives back what
            it says, and what is known so of the graph's results.
        may_run: a model with graph breaks is run once as it is; otherwise it is refused.

    Raises:
        GraphBreak: if it has graph breaks and must not run.
    """
    plain = _uncompiled(model)
    try:
        return _only_graph(plain, args, kwargs, look), ()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None
    except torch._dynamo.exc.TorchDynamoException as error:
        if not may_run:
            raise GraphBreak(str(error).strip().partition("\n")[0]) from error
        # It has graph breaks, or its call itself is wrong: then the run raises what the model raises.
        return _all_graphs(plain, args, kwargs, look)


def _only_graph(model: Callable[..., Any], args: Any, kwargs: Any, look: Look[Found]) -> list[Found]:
    found: list[Found] = []
    marks = MARKS.apart()

    def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(look(gm, example_inputs, "0", marks)[0])

        def leave(*inputs: Any) -> Any:
            raise _Captured

        return leave

    with contextlib.suppress(_Captured), _undisturbed(model):
        _compiled(model, capture, fullgraph=True)(*args, **kwargs)
    return found


def _all_graphs(model: Callable[..., Any], args: Any, kwargs: Any, look: Look[Found]) -> tuple[list[Found], Iterable[str]]:
    found: list[Found] = []
    marks = MARKS.apart()

    def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen, results = look(gm, example_inputs, str(len(found)), marks)
        found.append(seen)
        return lambda *args: _noted(gm.forward(*args), results, marks)

    before = Counter(counters["graph_break"])
    with _undisturbed(model):
        _compiled(model, capture, fullgraph=False)(*args, **kwargs)
    return found, counters["graph_break"] - before


def _with_breaks(found: list[GraphReport], reasons: Iterable[str]) -> list[GraphReport]:
    """The last graph notes why there are several: what ran between them was seen by no backend."""
    notes = tuple(map(_break, reasons))
    *others, last = found or [GraphReport("none")]
    return [*others, replace(last, notes=(*last.notes, *notes))] if found or notes else []


def _break(reason: str) -> str:
    what, *more = (line.strip() for line in reason.splitlines() if line.strip())
    why = next((line.removeprefix("Explanation:").strip() for line in more if line.startswith("Explanation:")), "")
    told = f"{what}: {why}" if why else what
    return f"torch.compile broke the graph; attention that ran in between is not seen. {told}"


def _noted(results: Any, known: Results, marks: Marks) -> Any:
    """What a graph returned, of which the graphs behind it may be told."""
    if known:
        marks.note_results(results, known)
    return results


def _described(
    gm: GraphModule, example_inputs: Sequence[Any], policy: Policy, name: str, marks: Marks
) -> tuple[GraphReport, Results]:
    outcome = rewrite_dynamo(gm, example_inputs, policy, name, enforce=False, marks=marks)
    report = outcome.report
    # Where only torch's own code lies between, our call is the nearest line: that is no line of the user's.
    verdicts = [
        replace(v, site=replace(v.site, source="unknown")) if v.site.source.startswith(_FILE) else v for v in report.verdicts
    ]
    misses = [replace(miss, source="unknown") if miss.source.startswith(_FILE) else miss for miss in report.misses]
    memory = memory_of(gm if outcome.gm is None else outcome.gm, example_inputs, memory_use(report, policy), name)
    return replace(report, verdicts=tuple(verdicts), misses=tuple(misses), memory=memory), outcome.results


def memory_of(gm: GraphModule, example_inputs: Sequence[Any], use: MemoryUse | None, name: str) -> tuple[GraphMemory, ...]:
    """What planning a rewritten graph's buffers comes to, forward and backward; nothing where ``use`` is None."""
    found: list[GraphMemory] = []
    if use is not None:
        with lowered_at_once():
            planned(use, lambda call, direction: found.append(call.account(name, direction)))(gm, example_inputs)
    return tuple(found)


def lowered_at_once() -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd compiles a backward with its forward, not when it is first called, which here never happens."""
    found: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return found


def _compiled(model: Callable[..., Any], backend: Callable[..., Any], fullgraph: bool) -> Callable[..., Any]:
    # Older torch has no such option; frames after a graph break then share their caches with other compilations.
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    compiled: Callable[..., Any] = torch.compile(_own_code(model), backend=backend, fullgraph=fullgraph, **apart)  # type: ignore[call-overload]
    return compiled


def _own_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """A call of ``model`` by code that nothing else runs: what Dynamo caches on code then belongs to nobody else.

    A function is copied, not called by another, so that Dynamo names what it holds as it does when the function is compiled.
    """
    if isinstance(model, MethodType):
        return MethodType(_own_code(model.__func__), model.__self__)
    if isinstance(model, FunctionType):
        own = FunctionType(model.__code__.replace(), model.__globals__, model.__name__, model.__defaults__, model.__closure__)
        own.__kwdefaults__ = model.__kwdefaults__
        return own
    scope: dict[str, Any] = {"model": model}
    # Code without a source Dynamo calls from a frame of torch's, on which all such compilations would be cached, up to its limit.
    linecache.cache[_FILE] = (len(_CALL), None, _CALL.splitlines(keepends=True), _FILE)
    exec(compile(_CALL, _FILE, "exec"), scope)
    call: Callable[..., Any] = scope["call"]
    return call


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(model, torch._dynamo.OptimizedModule):
        return model._orig_mod
    inner: Callable[..., Any] = torch._dynamo.eval_frame.innermost_fn(model)
    return inner


@contextlib.contextmanager
def _undisturbed(model: Callable[..., Any]) -> Iterator[None]:
    """Buffers and random state afterwards are what they were."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    before = [buffer.detach().clone() for buffer in buffers]
    # Where frames share their caches, those that are full are still looked at.
    unlimited: dict[str, Any] = {"recompile_limit": _NO_LIMIT, "accumulated_recompile_limit": _NO_LIMIT}
    with torch.random.fork_rng(), torch._dynamo.config.patch(automatic_dynamic_shapes=False, **unlimited):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, held in zip(buffers, before, strict=True):
                    # Some operators write without counting a version; one that is equal must not get a new version either.
                    if not torch.equal(buffer, held):
                        buffer.copy_(held)
