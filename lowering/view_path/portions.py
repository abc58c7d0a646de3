"""The portions of heads and batch rows that the view path computes at once, and what they take of a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dilcompile.lowering.call import Call
from dilcompile.lowering.merge import merging_bytes
from dilcompile.lowering.space import bytes_of
from dilcompile.lowering.view_path.engines import Engine

_CHUNK_BYTES, _SMALL_CHUNK_BYTES = 1 << 24, 1 << 21
# That the LSE's gradient takes, see Note [LSE gradient] in views.py.
LSE_COLUMNS = 8


def workspace_bytes(call: Call, engine: Engine, backward: bool, share: float, grad_lse: bool) -> int:
    """See ``Kernel``; a share below 1 makes the forward's chunks smaller, down to one batch row of one key head."""
    problem = call.problem
    needs = Needs(call, backward, LSE_COLUMNS if grad_lse and not engine.takes_grad_lse else 0)
    full = needs.of_chunk(*_chunk(call, problem.batch))
    return needs.of_call(grad_lse) + (full if backward else max(needs.of_chunk(1, 1), int(full * share)))


@dataclass(frozen=True)
class Needs:
    """What a call, and a chunk of it, takes of a workspace.

    Args:
        columns: head columns more than the call has, see Note [LSE gradient].
    """

    call: Call
    backward: bool
    columns: int = 0

    def of_chunk(self, heads: int, batch: int) -> int:
        """Of so many key heads and batch rows: accumulators, and what a merge or a detached branch holds."""
        call, size, wide = self.call, self.call.problem, self.call.score_dtype
        half, by_row = call.q.dtype != wide, (batch, heads * size.group, size.q_len)
        forward = bytes_of(((*by_row, size.v_dim), wide)) if half else 0
        forward += merging_bytes(by_row, size.v_dim, call.q.dtype, wide)
        if not self.backward:
            return forward
        k_dim, v_dim = size.head_dim + self.columns, size.v_dim + self.columns
        by_key = (batch, heads, size.k_len)
        sums = bytes_of(((*by_row, k_dim), wide), ((*by_key, k_dim), wide), ((*by_key, v_dim), wide)) if half else 0
        if call.merge_grad == "exact":
            return sums
        branch = ((*by_row, size.v_dim), call.q.dtype)
        return sums + forward + bytes_of(branch, branch, (by_row, wide), (by_row, wide), (by_row, call.q.dtype))

    def of_call(self, grad_lse: bool) -> int:
        """Of all of it: copies with dense rows, and what a gradient of the LSE is given besides."""
        call, size = self.call, self.call.problem
        held = [(tuple(x.shape), x.dtype) for x in (call.q, call.k, call.v) if x.stride(-1) != 1]
        if not self.backward or not grad_lse:
            return bytes_of(*held)
        rows = ((size.batch, size.heads, size.q_len, size.v_dim + self.columns), call.q.dtype)
        wider = [((*x.shape[:3], x.shape[3] + self.columns), x.dtype) for x in (call.q, call.k, call.v)]
        if self.columns:
            held += [*wider, *wider, rows, rows]
        if call.merge_grad == "detach":
            held += [rows] if self.columns else [*wider, rows]
        return bytes_of(*held)


def portions(call: Call, batch: slice, needs: Needs, left: int | None) -> Iterator[tuple[slice, slice]]:
    """Batch rows and key heads in portions; left: bytes of the workspace, None where there is none."""
    heads, rows = _chunk(call, batch.stop - batch.start)
    # Gradients are added up in the order of the portions' blocks: of other portions they would be rounded otherwise.
    while not needs.backward and left is not None and rows * heads > 1 and needs.of_chunk(heads, rows) > left:
        heads, rows = (heads, -(-rows // 2)) if rows > 1 else (-(-heads // 2), 1)
    for b in range(batch.start, batch.stop, rows):
        for head in range(0, call.problem.kv_heads, heads):
            yield (
                slice(b, min(batch.stop, b + rows)),
                slice(head, min(call.problem.kv_heads, head + heads)),
            )


def _chunk(call: Call, batch: int) -> tuple[int, int]:
    """How many key heads and batch rows of ``batch`` keep accumulators small, but all threads busy.

    Half-precision portions are smaller: beside the output of a piece they need it in float32 and the op's packed keys and values.
    """
    problem, half = call.problem, call.q.dtype != call.score_dtype
    row = problem.group * problem.q_len * problem.v_dim * call.score_dtype.itemsize
    whole = row * problem.kv_heads * batch
    limit = min(_CHUNK_BYTES, max(_SMALL_CHUNK_BYTES // (2 if half else 1), whole // (8 if half else 4)))
    heads = min(problem.kv_heads, max(1 if half else torch.get_num_threads(), limit // max(1, row)))
    rows = max(1, limit // max(1, row * heads)) if heads == problem.kv_heads else 1
    return heads, min(rows, max(1, batch))
