"""Which kernel a decided site will be computed by, if any may: asked from selection, with operands that hold no data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dilcompile.decision import Decision, Rejection, repeats_rounding
from dilcompile.errors import DilcompileError
from dilcompile.forms import Form
from dilcompile.relation import Problem
from dilcompile.report.lengths import problem_of
from dilcompile.report.record import Verdict

if TYPE_CHECKING:
    from dilcompile.lowering.call import Call


@dataclass(frozen=True)
class Choice:
    """The kernels by name, or why there is none.

    Args:
        forward: None where it is not known.
        backward: None where no gradient is asked for, or where it is not known.
        reason: why there is none.
        passed_over: the faster kernel that would be taken if its numbers were right on this device, and what was found.
        remarks: what the kernels took that were timed, and whose code it is where the user has changed that.
    """

    forward: str | None
    backward: str | None = None
    reason: str | None = None
    passed_over: str | None = None
    remarks: tuple[str, ...] = ()


def kernel_of(decision: Decision) -> Choice:
    """What selection picks for this site on this machine, at the example's sizes."""
    site = decision.site
    problem = problem_of(site)
    if problem is None:
        return Choice(None, reason="a length is known only when the model runs")
    if site.device.type == "meta":
        return Choice(None, reason="a meta tensor has no device to choose for")
    return _choose(decision.form, problem, _Traits.of(decision), decision.kernel, site.phase == "train", _known())


def able(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, without the decisions for a kernel by name that can't compute the site."""
    return [_unless_refused(verdict) if isinstance(verdict, Decision) else verdict for verdict in verdicts]


def _unless_refused(decision: Decision) -> Verdict:
    reason = refusal_of(decision)
    if reason is None:
        return decision
    text = f"kernel {decision.kernel} can't compute {decision.form.name} on it: {reason}"
    return Rejection(decision.site, decision.rule, text, "name a kernel that can, or leave `kernel` out")


def refusal_of(decision: Decision) -> str | None:
    """Why the kernel that the policy asks for by name can't compute this site, whatever it is called with; None if it may.

    What is known only when the model runs is left to the call itself.
    """
    if decision.kernel is None:
        return None
    site = decision.site
    problem = problem_of(site)
    if problem is None or site.device.type == "meta":
        return None
    # A place of the queries that isn't fixed: the kernel must take any.
    fixed = isinstance(site.mask.q_offset, int) and not site.mask.runtime_offset
    offsets = (problem.q_offset,) if fixed else (problem.q_offset, problem.q_offset + 1)
    train = site.phase == "train"
    reasons = (
        _refused(decision.form, replace(problem, q_offset=offset), _Traits.of(decision), decision.kernel, train, _known())
        for offset in offsets
    )
    return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True)
class _Traits:
    """What selection asks of a site beside its sizes; ``limits`` and ``pairs``: the operands that masks by row become."""

    dtype: torch.dtype
    device: torch.device
    scale: float
    softcap: float | None
    dropout_p: float
    padding: bool
    documents: bool
    bias: bool
    limits: bool
    pairs: bool
    narrow: bool

    @classmethod
    def of(cls, decision: Decision) -> _Traits:
        site, mask = decision.site, decision.site.mask
        factors = [factor.word for factor in mask.by_row]
        if decision.form.holds_chunks:
            factors.remove("chunk")
        words = set(factors)
        return cls(
            dtype=site.dtype,
            device=site.device,
            scale=site.scale,
            softcap=site.softcap,
            dropout_p=site.dropout_p,
            padding=mask.key_padding,
            documents=mask.documents,
            # A part of the mask that could not be read is added to the scores as a tensor.
            bias=bool(site.bias) or "other" in words,
            limits=bool(words & {"chunk", "prefix", "rows"}),
            pairs=bool(words & {"label", "pairs"}),
            narrow=repeats_rounding(decision),
        )


@lru_cache(maxsize=256)
def _choose(form: Form, problem: Problem, traits: _Traits, asked: str | None, train: bool, known: Hashable) -> Choice:
    """``known``: with more verdicts about kernels, and more of them timed, the choice may be another."""
    from dilcompile.lowering.select import KERNELS, measured, passed_over, select

    try:
        with FakeTensorMode():
            call = _call(form, problem, traits)
            names = {id(kernel): name for name, kernel in KERNELS.items()}
            forward = names[id(select(call, asked))]
            backward = names[id(select(call, asked, backward=True))] if train else None
            doubts = (passed_over(call, step) for step in ((False, True) if train else (False,)) if asked is None)
            passed = next((doubt for doubt in doubts if doubt is not None), None)
            times = (measured(call, step) for step in ((False, True) if train else (False,)) if asked is None)
            remarks = (*(text for text in times if text is not None), *_whose(forward, backward))
            return Choice(forward, backward, passed_over=passed, remarks=remarks)
    except DilcompileError as error:
        return Choice(None, reason=str(error))


def _whose(*kernels: str | None) -> tuple[str, ...]:
    from dilcompile.lowering import aten_flash

    name = aten_flash.activated()
    if name is None or not {"flash_band", "flash"} & set(kernels):
        return ()
    return (f"torch's flash op is {name} here, which was activated through its registry",)


@lru_cache(maxsize=256)
def _refused(form: Form, problem: Problem, traits: _Traits, asked: str, train: bool, known: Hashable) -> str | None:
    from dilcompile.lowering.select import KERNELS, reason_against

    with FakeTensorMode():
        call = _call(form, problem, traits)
        return reason_against(KERNELS[asked], call, False) or (reason_against(KERNELS[asked], call, True) if train else None)


def _known() -> Hashable:
    """What a choice depends on beside the call."""
    from dilcompile.lowering import aten_flash
    from dilcompile.lowering.choice import contest, trust

    return trust.num_known(), contest.num_known(), aten_flash.activated()


def _call(form: Form, size: Problem, traits: _Traits) -> Call:
    """The call as the site will make it, with operands that hold no data."""
    from dilcompile.lowering.call import Call, merge_grad
    from dilcompile.lowering.pairs import Pairs
    from dilcompile.lowering.selection import select_blocks

    def operand(*shape: int, of: torch.dtype = traits.dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=traits.device)

    def terms(length: int) -> Tensor:
        return operand(1, 1, length, of=torch.int64)

    q = operand(size.batch, size.heads, size.q_len, size.head_dim)
    k = operand(size.batch, size.kv_heads, size.k_len, size.head_dim)
    relation = form.relation(size)
    return Call(
        q=q,
        k=k,
        v=operand(size.batch, size.kv_heads, size.k_len, size.v_dim),
        key_padding=operand(size.batch, size.k_len, of=torch.bool) if traits.padding else None,
        documents=operand(size.batch, size.k_len, of=torch.int64) if traits.documents else None,
        bias=operand(size.batch, size.heads, size.q_len, size.k_len) if traits.bias else None,
        dropout_seed=operand(1, of=torch.int64) if traits.dropout_p > 0 else None,
        relation=relation,
        scale=traits.scale,
        softcap=traits.softcap,
        dropout_p=traits.dropout_p,
        merge_grad=merge_grad(form),
        row_limits=operand(2, 1, size.q_len, of=torch.int64) if traits.limits else None,
        pairs=Pairs("g0", terms(size.q_len), terms(size.k_len)) if traits.pairs else None,
        narrow=traits.narrow,
        selection=select_blocks(relation, q, k),
    )
