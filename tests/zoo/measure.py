"""One model in one regime: what is there, what is found, and whether the rewritten model still computes the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from zoo import truth
from zoo.causes import BOUND, Trial, cause_of, says_nothing
from zoo.compiling import Tally, as_it_is, fusions, rewriting, watching
from zoo.model import Model, quiet
from zoo.regimes import Regime
from zoo.runs import Numbers, apart, run

OTHER_LENGTH = 40


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        true: sites that ran eagerly; reached: those of them that stand whole in a graph (not split by a graph break) and are
            used (not dropped as dead code); found, rewritten: sites of the compiled call; refused, missed: how many for each reason.
        fused: what Inductor's own fuse_attention takes; None where it was not counted.
        forward, gradient: the largest difference to the model itself.
        cause: what makes a difference above the bound go away, as measured; empty if there is none.
        after: the differences with that cause taken away.
        error: what kept the model from being measured.
        code: a hash of the code that it was measured with.
    """

    model: str
    family: str
    implementation: str
    regime: str
    true: int = 0
    reached: int = 0
    found: int = 0
    rewritten: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    fused: int | None = None
    forward: float | None = None
    gradient: float | None = None
    cause: str = ""
    after: float | None = None
    seconds: float = 0.0
    error: str = ""
    code: str = ""

    @property
    def listed(self) -> int:
        """Sites that the report speaks of, as proven sites or as misses with a reason."""
        return self.found + sum(self.missed.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: Model, implementation: str, regime: Regime, *, inductor: bool = True) -> Row:
    """Everything that the table says of one model in one regime.

    Args:
        inductor: also count Inductor's own fusions, where the regime asks for that.

    Raises:
        Exception: what the model itself, or its compilation, raises.
    """
    quiet()
    start = time.perf_counter()
    with _default_dtype(regime.dtype):
        return replace(_measured(model, implementation, regime, inductor), seconds=round(time.perf_counter() - start, 2))


def _measured(model: Model, implementation: str, regime: Regime, inductor: bool) -> Row:
    net = _prepared(model, implementation, regime)
    inputs = model.call(regime.setting, regime.dtype)
    true = truth.count(net, inputs) if model.attention else 0
    tally = Tally()
    trial = Trial(net, inputs, regime.train, True if regime.dynamic else None)
    compiled = trial.compiled(rewriting(tally))
    calls = [(trial, trial.run(compiled), trial.run(net))]
    # Counted here: another length and the search for causes run graphs again.
    listed, rewritten, graphs = tally.listed, tally.rewritten, tally.executed
    refused, missed, masks, notes = (dict(held) for held in (tally.refused, tally.missed, tally.masks, tally.notes))
    calls += _at_another_length(model, regime, trial, compiled)
    forward, gradient = (max(column) for column in zip(*(apart(found, eager) for _, found, eager in calls), strict=True))
    cause, after = _first_cause(calls) if regime.dtype is torch.float64 else ("", None)
    return Row(
        model=model.name,
        family=model.family,
        implementation=implementation,
        regime=regime.name,
        true=true,
        reached=true if listed == true else _reached(trial),
        found=rewritten + sum(refused.values()),
        rewritten=rewritten,
        refused=refused,
        missed=missed,
        masks=masks,
        notes=notes,
        graphs=graphs,
        fused=_fused(model, implementation, regime) if inductor and regime.fusions else None,
        forward=forward,
        gradient=gradient if regime.train else None,
        cause=cause,
        after=after,
    )


def _first_cause(calls: Sequence[tuple[Trial, Numbers, Numbers]]) -> tuple[str, float | None]:
    """What makes the first of these calls differ, and what is left without it; nothing where they agree."""
    for trial, found, eager in calls:
        if max(apart(found, eager)) > BOUND or says_nothing(eager):
            return cause_of(trial, found, eager)
    return "", None


def compiles(model: Model, implementation: str, regime: Regime) -> bool:
    """Can torch.compile by itself run the model, with every graph left as it is?"""
    with _default_dtype(regime.dtype):
        trial = Trial(
            _prepared(model, implementation, regime),
            model.call(regime.setting, regime.dtype),
            regime.train,
            True if regime.dynamic else None,
        )
        try:
            trial.run_by(as_it_is)
        except Exception:
            return False
    return True


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Models that make tensors without naming a dtype make them in float64 too; half precision is never a default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _prepared(model: Model, implementation: str, regime: Regime) -> nn.Module:
    return without_dropout(model.build(implementation).to(regime.dtype).train(regime.train))


def without_dropout(net: nn.Module) -> nn.Module:
    """Every probability of dropping something set to 0, wherever a model keeps it: draws can't be compared."""
    for module in net.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            ):
                setattr(module, name, 0.0)
    return net


def _at_another_length(
    model: Model, regime: Regime, trial: Trial, compiled: Callable[..., Any]
) -> Iterator[tuple[Trial, Numbers, Numbers]]:
    """The same at a length that the graph was not compiled at, if the model takes one."""
    if not regime.dynamic:
        return
    other = replace(trial, inputs=model.call(replace(regime.setting, seq=OTHER_LENGTH), regime.dtype))
    try:
        eager = other.run(trial.net)
    except (RuntimeError, ValueError, IndexError):
        return
    yield other, other.run(compiled), eager


def _reached(trial: Trial) -> int:
    """Sites in the graphs of one call, counted as they run."""
    held = truth.Truth()
    trial.run_by(watching(held, [*trial.net.parameters(), *trial.net.buffers()]))
    return held.sites


def _fused(model: Model, implementation: str, regime: Regime) -> int:
    dtype = torch.float32 if regime.dtype is torch.float64 else regime.dtype
    with _default_dtype(dtype):
        net = model.build(implementation).to(dtype).train(regime.train)
        inputs = model.call(regime.setting, dtype)
        return fusions(net, lambda compiled: run(net, compiled, inputs, regime.train))
