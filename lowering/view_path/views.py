"""The view path: a relation's pieces as strided views, each by one dense attention op, merged by LSE.

Forward: every piece gives (out, lse), merged in float32. Backward: every piece gets the joint out and LSE, which makes its
gradients exact, so nothing is saved per piece. Work runs over chunks of heads to keep intermediates small.

Note [LSE gradient]: flash ops compute delta = rowsum(grad_out * out). A further head column (grad_lse, -1) turns it into
delta - grad_lse, and zeros in that column of q, k and v leave everything else as it was. Eight columns keep rows aligned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilcompile.lowering.call import Call, Gradients, bias_gradient_of, lse_of, output_of
from dilcompile.lowering.merge import merge_into
from dilcompile.lowering.space import Space
from dilcompile.lowering.view_path.engines import Engine, Part, Upstream
from dilcompile.lowering.view_path.pieces import Piece, Plan, plan
from dilcompile.lowering.view_path.portions import LSE_COLUMNS, Needs, portions
from dilcompile.lowering.view_path.row_masks import row_masks
from dilcompile.lowering.view_path.strided import (
    Block,
    Operand,
    add_into,
    blocks,
    key_operand,
    padding_operand,
    pair_operand,
    row_operand,
)
from dilcompile.relation import Relation


def forward(call: Call, engine: Engine) -> tuple[Tensor, Tensor]:
    """See ``Kernel.forward``; ``engine`` computes the blocks."""
    space = call.space()
    call = replace(call, q=space.dense_rows(call.q), k=space.dense_rows(call.k), v=space.dense_rows(call.v))
    out, lse = output_of(call, 0, call.q, call.problem.v_dim), lse_of(call)
    for region in _regions(call, Needs(call, backward=False), space):
        with space.again():
            _merge_pieces(call, engine, region, region.planned(), region.rows(out), region.rows(lse), space)
    return out, lse


def backward(call: Call, engine: Engine, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel.backward``; ``engine`` computes the blocks."""
    space = call.space()
    joint = _Joint(space.dense_rows(out), lse, space.dense_rows(grad_out), grad_lse)
    call = replace(call, q=space.dense_rows(call.q), k=space.dense_rows(call.k), v=space.dense_rows(call.v))
    bias = None if call.bias is None or not call.bias_grad else bias_gradient_of(call, call.bias)
    if call.merge_grad == "exact":
        grads = _joint_gradients(call, engine, joint, None, bias, space)
    else:
        # The LSE is no part of the merge: its gradient is the exact one.
        grads = _no_gradients(call)
        _add_gradients(call, engine, replace(joint, grad_lse=None), grads, bias, space, detached=True)
        if grad_lse is not None:
            only_lse = replace(joint, grad_out=_zeros(space, joint.grad_out.shape, joint.grad_out.dtype, joint.grad_out.device))
            _joint_gradients(call, engine, only_lse, grads, bias, space)
    return grads[0], grads[1], grads[2], None if bias is None or call.bias is None else bias.to(call.bias.dtype)


def _no_gradients(call: Call) -> list[Tensor]:
    """Zeros where the gradients of q, k and v are to lie."""
    return [output_of(call, number, x, x.shape[-1]).zero_() for number, x in enumerate((call.q, call.k, call.v))]


def _joint_gradients(
    call: Call, engine: Engine, joint: _Joint, before: list[Tensor] | None, bias: Tensor | None, space: Space
) -> list[Tensor]:
    """The gradients from the joint output, added to those before."""
    wider = joint.grad_lse is not None and not engine.takes_grad_lse
    if before is None and not wider:
        grads = _no_gradients(call)
        _add_gradients(call, engine, joint, grads, bias, space)
        return grads
    with space.again():
        more = _gradients_apart(call, engine, joint, bias, space)
        grads = _no_gradients(call) if before is None else before
        for grad, other in zip(grads, more, strict=True):
            grad.add_(other[..., : grad.shape[-1]])
    return grads


def _gradients_apart(call: Call, engine: Engine, joint: _Joint, bias: Tensor | None, space: Space) -> list[Tensor]:
    """The same in memory of their own, with more columns where the engine takes no gradient of the LSE."""
    if not engine.takes_grad_lse:
        call, joint = _with_lse_as_head_dim(call, joint, space)
    grads = [_zeros(space, x.shape, call.out_dtype, x.device) for x in (call.q, call.k, call.v)]
    _add_gradients(call, engine, joint, grads, bias, space)
    return grads


def _add_gradients(
    call: Call,
    engine: Engine,
    joint: _Joint,
    grads: list[Tensor],
    bias: Tensor | None,
    space: Space,
    detached: bool = False,
) -> None:
    for region in _regions(call, Needs(call, backward=True), space):
        here = _Joint(
            region.rows(joint.out),
            region.rows(joint.lse),
            region.rows(joint.grad_out),
            None if joint.grad_lse is None else region.rows(joint.grad_lse),
        )
        if detached:
            _backward_detached(call, engine, region, here, grads, bias, space)
        else:
            with space.again():
                _add_pieces(call, engine, region, region.planned(), here, grads, bias, space)


def _zeros(space: Space, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return space.heads_inside(shape, dtype, device).zero_()


@dataclass(frozen=True)
class _Region:
    """Batch rows, key heads, query rows and keys computed together; one document where there are documents."""

    relation: Relation
    batch: slice
    heads: slice
    query_rows: slice
    keys: slice

    def rows(self, x: Tensor) -> Tensor:
        """The region of a [B, H, Sq, ...] tensor."""
        group = self.relation.problem.group
        return x[self.batch, self.heads.start * group : self.heads.stop * group, self.query_rows]

    def key_rows(self, x: Tensor) -> Tensor:
        """The region of a [B, Hkv, Sk, D] tensor."""
        return x[self.batch, self.heads, self.keys]

    def planned(self) -> Plan:
        """The pieces of the region, key heads counted from its first."""
        whole = plan(self.relation, self.heads.start, self.heads.stop)
        moved = tuple(replace(piece, head=piece.head - self.heads.start) for piece in whole.pieces)
        return Plan(moved, whole.covers)


@dataclass(frozen=True)
class _Joint:
    """Joint output, LSE and their gradients over a region."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


def _regions(call: Call, needs: Needs, space: Space) -> Iterator[_Region]:
    for relation, batch, query_rows, keys in _documents(call):
        for rows, heads in portions(call, batch, needs, space.left):
            yield _Region(relation, rows, heads, query_rows, keys)


def _documents(call: Call) -> Iterator[tuple[Relation, slice, slice, slice]]:
    """Each document is a call of its own: positions count from its start."""
    problem = call.problem
    if call.documents is None:
        yield call.relation, slice(0, problem.batch), slice(0, problem.q_len), slice(0, problem.k_len)
        return
    shared = call.documents.shape[0] == 1
    for b, numbers in enumerate(call.documents):
        batch = slice(0, problem.batch) if shared else slice(b, b + 1)
        stops = torch.nonzero(numbers[1:] != numbers[:-1]).flatten().add(1).tolist()
        for start, stop in zip([0, *stops], [*stops, problem.k_len], strict=True):
            first = max(start, problem.q_offset)
            last = min(stop, problem.q_offset + problem.q_len)
            if first < last:
                relation = call.relation.at(last - first, stop - start, first - start)
                rows = slice(first - problem.q_offset, last - problem.q_offset)
                yield relation, batch, rows, slice(start, stop)


def _part(call: Call, region: _Region) -> Part:
    group, bias = call.problem.group, call.bias
    if bias is not None:
        problem = call.problem
        bias = bias.expand(problem.batch, problem.heads, problem.q_len, problem.k_len)
        bias = region.rows(bias)[..., region.keys]
    padding = None if call.key_padding is None else call.key_padding[region.batch, region.keys]
    return Part(
        call=call,
        q=row_operand(region.rows(call.q), group),
        k=key_operand(region.key_rows(call.k)),
        v=key_operand(region.key_rows(call.v)),
        padding=None if padding is None else padding_operand(padding),
        bias=None if bias is None else pair_operand(bias, group),
        relation=region.relation,
        first_batch=region.batch.start,
        first_head=region.heads.start,
        first_position=region.keys.start,
        row_masks=row_masks(call, region.batch, region.query_rows, region.keys),
    )


def _blocks(part: Part, piece: Piece, extra: list[Operand]) -> Iterator[Block]:
    operands = [part.q, part.k, part.v, *extra]
    operands += [operand for operand in (part.padding, part.bias) if operand is not None]
    operands += [] if part.row_masks is None else part.row_masks.operands
    return blocks(piece, part.q.tensor.shape[0], operands, apart=piece.exclusive)


def _merge_pieces(call: Call, engine: Engine, region: _Region, planned: Plan, out: Tensor, lse: Tensor, space: Space) -> None:
    part, group = _part(call, region), call.problem.group
    if part.row_masks is not None and part.row_masks.sees_nothing:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    own_dtype = out.dtype == call.score_dtype
    total = out if own_dtype else space.heads_inside(out.shape, call.score_dtype, out.device)
    lse.fill_(-torch.inf)
    # With padding or masks by row a piece may find no key for a row, so nothing counts as written before.
    all_written = planned.covers and part.padding is None and part.row_masks is None
    if not all_written:
        total.zero_()
    totals, lses = row_operand(total, group), row_operand(lse, group)
    for piece in planned.pieces:
        for block in _blocks(part, piece, [totals, lses]):
            into, lse_into = block.view(totals), block.view(lses)
            for result in engine.forward(part, block):
                at = result.cut[:3]
                merge_into(into[at], lse_into[at], result.out, result.lse, piece.fresh and all_written, space)
    if not own_dtype:
        out.copy_(total)


def _add_pieces(
    call: Call,
    engine: Engine,
    region: _Region,
    planned: Plan,
    joint: _Joint,
    grads: list[Tensor],
    grad_bias: Tensor | None,
    space: Space,
) -> None:
    part, group = _part(call, region), call.problem.group
    if part.row_masks is not None and part.row_masks.sees_nothing:
        return
    grad_lse = None if joint.grad_lse is None else row_operand(joint.grad_lse, group)
    upstream = Upstream(
        row_operand(joint.out, group),
        row_operand(joint.lse, group),
        row_operand(joint.grad_out, group),
        grad_lse,
    )
    targets = [region.rows(grads[0]), region.key_rows(grads[1]), region.key_rows(grads[2])]
    exact = call.q.dtype == call.score_dtype
    totals = targets if exact else [_zeros(space, x.shape, call.score_dtype, x.device) for x in targets]
    sums = [row_operand(totals[0], group), key_operand(totals[1]), key_operand(totals[2])]
    if grad_bias is not None:
        expanded = grad_bias.expand(call.problem.batch, call.problem.heads, call.problem.q_len, call.problem.k_len)
        sums.append(pair_operand(region.rows(expanded)[..., region.keys], group))
    extra = [upstream.out, upstream.lse, upstream.grad_out] + ([] if grad_lse is None else [grad_lse])
    for piece in planned.pieces:
        for block in _blocks(part, piece, extra):
            for found in engine.backward(part, block, upstream):
                for operand, grad in zip(sums, (found.q, found.k, found.v, found.scores), strict=False):
                    if grad is not None:
                        add_into(operand, block, grad, found.cut)
    if not exact:
        for target, total in zip(targets, totals, strict=True):
            target.add_(total)


def _backward_detached(
    call: Call,
    engine: Engine,
    region: _Region,
    joint: _Joint,
    grads: list[Tensor],
    grad_bias: Tensor | None,
    space: Space,
) -> None:
    """The branches' weights in the merge as constants: each branch has its own output, LSE and share of the gradient."""
    whole = region.planned()
    for term in range(len(region.relation.terms)):
        planned = Plan(tuple(piece for piece in whole.pieces if piece.term == term), covers=False)
        with space.again():
            out = space.heads_inside(joint.out.shape, joint.out.dtype, joint.out.device)
            lse = space.like(joint.lse)
            with space.again():
                _merge_pieces(call, engine, region, planned, out, lse, space)
            weight = torch.sub(lse, joint.lse, out=space.like(lse)).exp_().nan_to_num_(nan=0.0)
            weight = space.like(weight, out.dtype).copy_(weight)[..., None]
            grad_out = space.heads_inside(out.shape, out.dtype, out.device)
            alone = _Joint(out, lse, torch.mul(joint.grad_out, weight, out=grad_out), None)
            _add_pieces(call, engine, region, planned, alone, grads, grad_bias, space)


def _with_lse_as_head_dim(call: Call, joint: _Joint, space: Space) -> tuple[Call, _Joint]:
    """Put the LSE gradient where a flash op takes it: see Note [LSE gradient]."""
    assert joint.grad_lse is not None
    q, k, v, out, grad_out = (_padded(x, space) for x in (call.q, call.k, call.v, joint.out, joint.grad_out))
    out[..., -1] = -1
    grad_out[..., -1] = joint.grad_lse
    return replace(call, q=q, k=k, v=v), _Joint(out, joint.lse, grad_out, None)


def _padded(x: Tensor, space: Space) -> Tensor:
    """``x`` with columns of zeros."""
    found = space.take((*x.shape[:3], x.shape[3] + LSE_COLUMNS), x.dtype, x.device)
    found[..., : x.shape[3]] = x
    found[..., x.shape[3] :] = 0
    return found
