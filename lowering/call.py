"""One attention as the kernels see it: operands and the relation, checked and bound together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from dilcompile.forms import Dilated, Form, parse_form
from dilcompile.lowering.pairs import Pairs
from dilcompile.lowering.selection import Selection
from dilcompile.lowering.space import NOWHERE, Space
from dilcompile.progression import Progression
from dilcompile.relation import Problem, Relation

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Held:
    """The positions of operands that are a part of their sequence.

    Args:
        queries: where the rows of q stand.
        keys: where the rows of k and v stand.
        first_head: query head 0 is this one of the whole attention, by which dropout is drawn.
    """

    queries: Progression
    keys: Progression
    first_head: int = 0


@dataclass(frozen=True)
class Room:
    """Memory that was there before a call.

    Args:
        results: where a kernel writes what it returns, in the order in which it returns it; what it makes elsewhere is copied.
        workspace: uint8, for what it needs besides; what that doesn't hold the kernel allocates.
    """

    results: tuple[Tensor | None, ...] = ()
    workspace: Tensor | None = None

    def space(self) -> Space:
        """The workspace, nothing of it taken."""
        return Space(self.workspace)


@dataclass(frozen=True)
class Call:
    """Operands of one attention.

    Args:
        q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv]; any strides. With ``pages`` k and v are a pool instead,
            [pages, Hkv, page size, D or Dv].
        key_padding: bool [B, Sk], True keeps the key.
        documents: int [B or 1, Sk], the document number of each key position, runs contiguous.
        bias: float, broadcastable to [B, H, Sq, Sk], added to the scaled and capped scores.
        dropout_seed: int64 with one element.
        row_limits: int64 [2, B or 1, Sq]: row (b, q) sees the keys from ``row_limits[0]`` up to before ``row_limits[1]``.
        pairs: a formula that lets pairs through.
        narrow: the softmax is computed in float32 though the scores are float64, as a model does that names the dtype; digit by
            digit, for what must equal the model.
        bias_grad: the gradient of the bias is asked for.
        pages: int32 [B, most pages]: the key at position p of batch row b is in slot ``p % page size`` of page
            ``pages[b, p // page size]``; Sk, the length in positions, is that of the problem. Numbers of no page are never
            read through; what a row that sees such keys gets is not said.
        exact_lse: False where nobody reads the LSE for its digits: it may be as rough as q's dtype (-inf still says no keys).
        selection: which blocks there are of a relation that names all that there may be; the queries' block rows are the grid's.
        held: q, k and v are a part of the sequence; Sk, which ``key_padding``, ``documents``, ``pairs`` and the relation go by,
            is the length of all of it, and Sq the number of rows of q. Neither bias nor pages nor selection. What is made of
            a part is added to that of others: out and gradients are in ``score_dtype``. The backward is given out, in q's dtype,
            and LSE over all keys of the sequence.
        flat: the products count as 0, so that all weights of a row are alike; their gradient is that of ordinary scores.
        room: see ``Room``; ``output_of`` and ``lse_of`` look there first.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_padding: Tensor | None
    documents: Tensor | None
    bias: Tensor | None
    dropout_seed: Tensor | None
    relation: Relation
    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    merge_grad: Literal["exact", "detach"] = "exact"
    row_limits: Tensor | None = None
    pairs: Pairs | None = None
    flat: bool = False
    narrow: bool = False
    bias_grad: bool = True
    pages: Tensor | None = None
    exact_lse: bool = True
    selection: Selection | None = None
    held: Held | None = None
    room: Room | None = None

    @property
    def problem(self) -> Problem:
        """The sizes."""
        return self.relation.problem

    @property
    def places(self) -> tuple[Progression, Progression]:
        """The positions of the rows of q and of k; the step of a single one, which may be anything, is 1."""
        size = self.problem
        if self.held is None:
            return Progression(size.q_offset, size.q_offset + size.q_len), Progression(0, size.k_len)
        parts = ((self.held.queries, self.q), (self.held.keys, self.k))
        for part, x in parts:
            assert len(part) == x.shape[2], f"{x.shape[2]} rows do not stand at the {len(part)} positions {part}"
        queries, keys = (part if len(part) > 1 else Progression(part.start, part.start + len(part)) for part, _ in parts)
        return queries, keys

    @property
    def score_dtype(self) -> torch.dtype:
        """The dtype of scores and LSE: float64 for float64 operands, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of out and of the gradients of q, k and v: q's; ``score_dtype`` where other parts are added."""
        return self.q.dtype if self.held is None else self.score_dtype

    def space(self) -> Space:
        """The workspace of its room, nothing of it taken."""
        return NOWHERE if self.room is None else self.room.space()


class Kernel(Protocol):
    """Who computes a call on one device. Modules of this folder satisfy it.

    ``TAKES_ROW_MASKS``: row limits and formulas over pairs are computed too. ``LEAST_ROWS``: with fewer query rows a key head
    another kernel is faster, so this one is taken only when asked for by name.
    """

    __name__: str
    TAKES_ROW_MASKS: bool
    LEAST_ROWS: int

    def fingerprint(self, call: Call) -> str | None:
        """What the code that would compute this call is made from, and by whom: its numbers are checked before it is trusted.

        Depends on the operands' device and dtype alone. None: nothing is compiled here, torch's own operators compute.
        """

    def supports(self, call: Call, backward: bool) -> str | None:
        """Why this kernel can't compute the call (its forward, or its backward), or None."""

    def workspace_bytes(self, call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
        """Bytes that it takes of the workspace of the call's room (``Call.space``), at most; 0: it takes none.

        Results never lie in a workspace.

        Args:
            call: tensors hold no data, and there is no room.
            grad_lse: the backward is given a gradient of the LSE.
            share: from 1 to 0: with at most this part of what makes it fastest, where it can do with less.
        """

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out [B, H, Sq, Dv] in ``out_dtype``, laid out [B, Sq, H, Dv]; lse [B, H, Sq] contiguous in ``score_dtype``."""

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        """Gradients of q, k and v in ``out_dtype``, of the bias in its dtype (None without bias), in their operands' shapes."""


@lru_cache(maxsize=256)
def form_of(text: str) -> Form:
    """The form with this text."""
    return parse_form(text)


@lru_cache(maxsize=1024)
def relation_of(form: Form, problem: Problem) -> Relation:
    """The relation of a form at these sizes."""
    return form.relation(problem)


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    window_left: int | None,
    window_right: int | None,
    q_offset: int,
    k_len: int | None = None,
) -> Problem:
    """The sizes of these operands; see ``Call`` for their shapes. k_len: where they are not as many as k has rows."""
    return Problem(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k.shape[2] if k_len is None else k_len,
        head_dim=q.shape[3],
        v_dim=v.shape[3],
        q_offset=q_offset,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
    )


def output_scale(form: Form, k_len: int) -> float:
    """The factor on the output that a form asks for."""
    return form.scale_of_output(k_len) if isinstance(form, Dilated) else 1.0


def merge_grad(form: Form) -> Literal["exact", "detach"]:
    """How the form's branches share the gradient."""
    return form.merge_grad if isinstance(form, Dilated) else "exact"


def empty_output(q: Tensor, v_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [B, H, Sq, Dv] that lies in memory as [B, Sq, H, Dv], what the models' next view wants."""
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v_dim), dtype=dtype).transpose(1, 2)


def output_of(call: Call, number: int, like: Tensor, dim: int) -> Tensor:
    """Uninitialised memory for result ``number`` of a call, [B, H, S, dim] of ``like``: of its room, or as ``empty_output``."""
    found = _room_for(call, number, torch.Size((*like.shape[:3], dim)), call.out_dtype)
    return empty_output(like, dim, call.out_dtype) if found is None or (dim > 1 and found.stride(3) != 1) else found


def lse_of(call: Call) -> Tensor:
    """Uninitialised memory for the LSE of a call, [B, H, Sq] contiguous in ``score_dtype``."""
    shape = torch.Size((call.problem.batch, call.problem.heads, call.problem.q_len))
    found = _room_for(call, 1, shape, call.score_dtype)
    return call.q.new_empty(shape, dtype=call.score_dtype) if found is None or not found.is_contiguous() else found


def bias_gradient_of(call: Call, bias: Tensor) -> Tensor:
    """Zeros for the gradient of the bias, contiguous in ``score_dtype``."""
    found = _room_for(call, 3, bias.shape, call.score_dtype)
    made = found is None or not found.is_contiguous()
    return bias.new_zeros(bias.shape, dtype=call.score_dtype) if made or found is None else found.zero_()


def _room_for(call: Call, number: int, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    given = None if call.room is None or number >= len(call.room.results) else call.room.results[number]
    return given if given is not None and given.shape == shape and given.dtype == dtype else None


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with neighbouring elements in its last dim, as kernels load them: itself, or a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
