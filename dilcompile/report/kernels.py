"""Which kernel a decided site will be computed by: asked from selection, with operands that hold no data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dilcompile.decision import Decision
from dilcompile.errors import DilcompileError
from dilcompile.forms import Form
from dilcompile.relation import Problem
from dilcompile.report.lengths import problem_of


@dataclass(frozen=True)
class Choice:
    """The kernels by name, or why there is none.

    Args:
        forward: None where it is not known.
        backward: None where no gradient is asked for, or where it is not known.
        reason: why there is none.
    """

    forward: str | None
    backward: str | None = None
    reason: str | None = None


def kernel_of(decision: Decision) -> Choice:
    """What selection picks for this site on this machine, at the example's sizes."""
    site = decision.site
    problem = problem_of(site)
    if problem is None:
        return Choice(None, reason="a length is known only when the model runs")
    if site.device.type == "meta":
        return Choice(None, reason="a meta tensor has no device to choose for")
    present = (site.mask.key_padding, site.mask.documents, bool(site.bias))
    return _choose(
        decision.form, problem, site.dtype, site.device, present, site.scale, site.softcap, site.dropout_p,
        decision.kernel, site.phase == "train",
    )  # fmt: skip


@lru_cache(maxsize=256)
def _choose(
    form: Form,
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    present: tuple[bool, bool, bool],
    scale: float,
    softcap: float | None,
    dropout_p: float,
    asked: str | None,
    train: bool,
) -> Choice:
    from dilcompile.lowering.call import Call, merge_grad
    from dilcompile.lowering.select import KERNELS, select

    padding, documents, bias = present
    size = problem

    def operand(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device=device)

    try:
        with FakeTensorMode():
            call = Call(
                q=operand(size.batch, size.heads, size.q_len, size.head_dim),
                k=operand(size.batch, size.kv_heads, size.k_len, size.head_dim),
                v=operand(size.batch, size.kv_heads, size.k_len, size.v_dim),
                key_padding=operand(size.batch, size.k_len, of=torch.bool) if padding else None,
                documents=operand(size.batch, size.k_len, of=torch.int64) if documents else None,
                bias=operand(size.batch, size.heads, size.q_len, size.k_len) if bias else None,
                dropout_seed=operand(1, of=torch.int64) if dropout_p > 0 else None,
                relation=form.relation(problem),
                scale=scale,
                softcap=softcap,
                dropout_p=dropout_p,
                merge_grad=merge_grad(form),
            )
            names = {id(kernel): name for name, kernel in KERNELS.items()}
            forward = names[id(select(call, asked))]
            return Choice(forward, names[id(select(call, asked, backward=True))] if train else None)
    except DilcompileError as error:
        return Choice(None, reason=str(error))
