"""All ranks of a sharded attention in one process, to look at what they do and to test it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dilcompile import arguments
from dilcompile.forms import Form
from dilcompile.functional import text_of
from dilcompile.lowering.distributed import simulate as executor
from dilcompile.lowering.distributed.simulate import Simulation
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.placements.shards import Order

__all__ = ["Simulation", "simulate"]


def simulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form | str | Mapping[str, Any],
    *,
    ranks: int = 8,
    method: str = "ring",
    order: Order = "contiguous",
    parts: int = 1,
    moving: str | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_padding: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kernel: str | None = None,
) -> Simulation:
    """Attention of a whole sequence by ``ranks`` ranks, executed one after the other here; no process group is needed.

    Args:
        q: [B, H, S, D]; k: [B, Hkv, S, D]; v: [B, Hkv, S, Dv]; S need not be a multiple of the ranks.
        ranks: over which keys move; 1 with ``method="ulysses"``.
        parts: over which heads are exchanged, with ``ulysses`` and ``usp``.
        key_padding: bool [B, S]; cu_seqlens: int [documents + 1].
        form, method, order, moving, is_causal, scale, softcap, kernel: see ``dilcompile.distributed.attention``.

    Returns:
        ``.out`` [B, H, S, Dv] and ``.lse`` [B, H, S], differentiable, ``.schedules``, what each rank did, and ``.sent``, bytes.

    Raises:
        DilcompileError: for operands that don't fit; PlacementError: if the placement can't be had.
    """
    arguments.check_operands(q, k, v)
    arguments.check_options(scale, softcap, 0.0, is_causal, None, kernel)
    arguments.check_padding(key_padding, q, k.shape[2])
    documents = None if cu_seqlens is None else arguments.documents(cu_seqlens, q, k.shape[2], 0)
    spec = Spec(
        "simulated", method, text_of(form), order, moving=moving, is_causal=is_causal,
        scale=q.shape[3] ** -0.5 if scale is None else scale, softcap=softcap, kernel=kernel, site="simulated attention",
    )  # fmt: skip
    return executor.simulate(q, k, v, spec, ranks, parts, (key_padding, documents, None, None))
