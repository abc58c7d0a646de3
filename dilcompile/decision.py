"""What the policy decides for one site: a form and how to compute it, or the reason why the site stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from dilcompile.forms import Form
from dilcompile.placements.choice import PlacementChoice
from dilcompile.site import AttentionSite

Fidelity = Literal["exact", "approximate"]
Consequence = Literal["warn", "keep", "error"]
# The kernels by name, fastest first; `lowering/select.py` holds what they are.
KernelName = Literal[
    "native", "sdpa", "flash_band", "triton", "flash_attn", "cudnn", "efficient", "flex", "flash", "cpu", "reference"
]
KERNEL_NAMES: tuple[KernelName, ...] = get_args(KernelName)


@dataclass(frozen=True)
class Check:
    """How a rewrite is compared with the site's own computation, in float64.

    Args:
        when: ``compile`` (on random inputs, before the rewrite is accepted), ``first_call`` or ``always`` (on the inputs of the
            first or of every call); ``off``: not at all.
        rel_l2: the largest norm of the difference over that of the site's own result.
        on_difference: what a larger one leads to: the site is left as it is, and ``warn``, ``keep`` quiet or ``error``.
    """

    when: Literal["off", "compile", "first_call", "always"] = "off"
    rel_l2: float = 1e-9
    on_difference: Consequence = "warn"


NO_CHECK = Check()


@dataclass(frozen=True)
class MemoryUse:
    """How the buffers of a graph lie in memory, where the inner compiler leaves that to us.

    Args:
        pool: ``default``: arenas are torch's allocator's again after each call; ``private``: kept for the graph's next call;
            ``shared``: kept for all graphs of the process.
        reuse: which buffers whose lives don't meet may share memory: those of one module, or all; ``off``: nothing is planned.
        budget: most bytes that the modules of the rule's sites may need at once, or None.
    """

    pool: Literal["default", "private", "shared"] = "default"
    reuse: Literal["off", "within_layer", "across_layers"] = "off"
    budget: int | None = None


@dataclass(frozen=True)
class Decision:
    """Rewrite this site into ``form``.

    Args:
        site: the site decided on.
        rule: name of the rule that matched, with its file and line.
        form: the relation family to compute.
        fidelity: ``exact`` when the rewritten site computes what the user's model computes.
        kernel: the kernel asked for by name, or None to choose the fastest that supports the site.
        fallback: what to do when the rewrite fails: ``warn`` and keep the original, ``keep`` it and only list it, or ``error``.
        check: whether and how the rewrite is compared with the site's own computation.
        memory: what the rule says of the buffers; None: nothing.
        if_faster: the site stays as it is where dense attention is faster.
        notes: what the user should know (policy keys that have no effect here, rows that see only themselves ...).
        placement: how the sequence is held over ranks; None: all of it is here.
    """

    site: AttentionSite
    rule: str
    form: Form
    fidelity: Fidelity
    kernel: KernelName | None = None
    fallback: Consequence = "warn"
    check: Check = NO_CHECK
    memory: MemoryUse | None = None
    if_faster: bool = False
    notes: tuple[str, ...] = field(default=())
    placement: PlacementChoice | None = None


def repeats_rounding(decision: Decision) -> bool:
    """Is the softmax computed in float32 over scores in float64, because the model does so and the result must equal it?"""
    exact = decision.fidelity == "exact" and decision.kernel in (None, "reference")
    return exact and decision.site.narrowed == "softmax"


@dataclass(frozen=True)
class Rejection:
    """This site stays as it is.

    Args:
        site: the site decided on.
        rule: name of the rule that matched, or None if no rule did.
        reason: why, naming the limit.
        cure: what to change to have it rewritten; empty when keeping it is what the policy asked for.
        asked: True if the policy itself said ``keep`` (or no rule matched); False if the site can't take the form asked for.
        axis: the mesh axis over which its rule shards it, so that keeping it as it is would be wrong; None: none.
    """

    site: AttentionSite
    rule: str | None
    reason: str
    cure: str = ""
    asked: bool = False
    axis: str | None = None
