"""Direct use: one attention over a sequence that ranks hold in shards, without a policy or a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dilcompile import arguments
from dilcompile.errors import DilcompileError, PlacementError
from dilcompile.forms import Form
from dilcompile.functional import text_of
from dilcompile.lowering.distributed import meshes
from dilcompile.lowering.distributed.attention import sharded_attention
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.near import hint
from dilcompile.placements.shards import ORDERS, Order


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Form | str | Mapping[str, Any],
    *,
    axis: str = "cp",
    method: str = "gather_needed",
    order: Order = "contiguous",
    length: int | None = None,
    heads_axis: str | None = None,
    moving: str | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_padding: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    documents: Tensor | None = None,
    row_limits: Tensor | None = None,
    dropout_p: float = 0.0,
    q_offset: int | None = None,
    kernel: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys of the whole sequence. The numbers are those of one rank that has all of it.

    All ranks of the axis call it, in the same order and with the same options. The gradients that come back for k and v are those
    of all ranks' queries.

    Args:
        q: [B, H, n, D]; k: [B, Hkv, n, D]; v: [B, Hkv, n, Dv]; the places of this rank, see ``dilcompile.placements.Shards``.
            With ``method="tree"`` q is [B, H, Sq, D], the same on all ranks.
        form: see ``dilcompile.functional.attention``.
        axis: the mesh axis over which the sequence is held, known by ``set_mesh``.
        method: how keys come to queries: ``gather_needed``, ``halo``, ``ring``, ``all_gather``, ``ulysses``, ``usp``, ``tree``.
        order: which positions a rank holds: ``contiguous``, ``zigzag``, ``striped``.
        length: tokens of the whole sequence, where ranks have places without a token; else ranks times n.
        heads_axis: with ``usp`` the mesh axis over which heads are exchanged; its ranks hold slices of the places of a rank of
            ``axis``. moving: what moves keys over ``axis`` then, ``ring`` by default.
        is_causal, scale, softcap, dropout_p, kernel: see ``dilcompile.functional.attention``; causal by global positions. The
            dropped pairs don't depend on the number of ranks; the first rank's generator draws the seed.
        key_padding: bool [B, n], True keeps a key of this rank; or [B, length].
        cu_seqlens: int [documents + 1], where packed documents begin, from 0 to ``length``, the same on all ranks.
        documents: in place of it: int64 [B or 1, n], the document number of each place of this rank, no number for two documents;
            or [B or 1, length].
        row_limits: int64 [2, B or 1, n], the global positions of the first key that a query sees and of that behind the last.
        q_offset: with ``tree`` the position of the first query; ``length - Sq`` by default.
        return_lse: return (out, lse) with lse [B, H, n].

    Returns:
        out [B, H, n, Dv]; 0 (lse -inf) at places without a token and for queries that see no key.

    Raises:
        DilcompileError: for operands that don't fit; PlacementError: for a mesh, placement or shard that can't be had, and where
            another rank stopped.
    """
    arguments.check_operands(q, k, v)
    arguments.check_options(scale, softcap, dropout_p, is_causal, q_offset, kernel)
    if order not in ORDERS:
        raise PlacementError(f"order {order!r} is unknown{hint(order, ORDERS)}; the orders are {', '.join(ORDERS)}")
    if method != "tree" and q.shape[2] != k.shape[2]:
        raise DilcompileError(
            f"q has {q.shape[2]} rows but k has {k.shape[2]}; a rank has the queries and keys of the same places, except with "
            f"method='tree'"
        )
    text = _spec_text(
        axis, method, text_of(form), order, length, heads_axis, moving, is_causal, q.shape[3] ** -0.5 if scale is None else scale,
        softcap, dropout_p, kernel, q_offset, return_lse,
    )  # fmt: skip
    if cu_seqlens is not None:
        if documents is not None:
            raise DilcompileError("cu_seqlens and documents say the same; give one of them")
        documents = _documents(cu_seqlens, q, _length(length, k, axis, heads_axis))
    seed = torch.randint(0, 2**62, (1,), device=q.device) if dropout_p > 0 else None
    both: tuple[Tensor, Tensor] = sharded_attention(q, k, v, key_padding, documents, row_limits, seed, text)
    return both if return_lse else both[0]


# Under torch.compile a constant of the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _spec_text(
    axis: str,
    method: str,
    form: str,
    order: Order,
    length: int | None,
    heads_axis: str | None,
    moving: str | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    kernel: str | None,
    q_offset: int | None,
    lse: bool,
) -> str:
    return str(
        Spec(
            axis, method, form, order, length, heads_axis, moving, is_causal, scale=scale, softcap=softcap, dropout_p=dropout_p,
            kernel=kernel, q_offset=q_offset, site="dilcompile.distributed.attention", lse=lse,
        )
    )  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ranks(axis: str, heads_axis: str | None) -> int:
    return meshes.size_of(axis) * meshes.size_of(heads_axis)


def _length(length: int | None, k: Tensor, axis: str, heads_axis: str | None) -> int:
    return int(k.shape[2]) * _ranks(axis, heads_axis) if length is None else length


def _documents(cu_seqlens: Tensor, q: Tensor, length: int) -> Tensor:
    """int64 [1, length]."""
    return arguments.documents(cu_seqlens, q[:, :, :1], length, 0)
