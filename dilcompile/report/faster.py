"""``min_seq: auto``: a decided site is left as the model computes it where dense attention is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dilcompile.decision import Decision, Rejection
from dilcompile.report.kernels import kernel_of
from dilcompile.report.lengths import problem_of
from dilcompile.report.record import Verdict

NOTE = "min_seq auto:"


def where_faster(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, with rejections for the sites that ask for it and have too few keys.

    A symbolic length gets a guard, as a number for ``min_seq`` gives it.

    Raises:
        DilcompileError: if ``DILCOMPILE_RATES`` names no readable file.
    """
    return [_unless_slower(verdict) if isinstance(verdict, Decision) and verdict.if_faster else verdict for verdict in verdicts]


def _unless_slower(decision: Decision) -> Verdict:
    from dilcompile.lowering.choice.crossover import LONGEST, Setting, crossover

    site, problem, choice = decision.site, problem_of(decision.site), kernel_of(decision)
    if problem is None or choice.forward is None:
        return _noted(decision, f"rewritten whatever it costs: {choice.reason or 'a length is known only when the model runs'}")
    words = set(site.mask.words)
    setting = Setting(
        form=decision.form,
        problem=problem,
        grows=site.kind == "self" and problem.q_len > 1,
        plain=words <= {"causal"},
        device=site.device,
        dtype=site.dtype,
        train=site.phase == "train",
        forward=choice.forward,
        backward=choice.backward,
    )
    try:
        fewest = crossover(setting, torch.get_num_threads())
    except LookupError as error:
        return _noted(decision, f"rewritten whatever it costs: {error.args[0]}")
    where = f"on this device ({site.device.type}, kernel {choice.forward}, modelled)"
    if fewest is None:
        return _kept(decision, f"dense is faster up to {LONGEST} keys and more {where}")
    # For a symbolic length this adds a guard.
    if bool(site.k_len >= fewest):
        return _noted(decision, f"faster than dense from {fewest} keys on {where}")
    return _kept(decision, f"dense is faster below {fewest} keys {where}")


def _noted(decision: Decision, note: str) -> Decision:
    return replace(decision, notes=(*decision.notes, f"{NOTE} {note}"))


def _kept(decision: Decision, reason: str) -> Rejection:
    return Rejection(decision.site, decision.rule, f"{NOTE} {reason}", asked=True)
