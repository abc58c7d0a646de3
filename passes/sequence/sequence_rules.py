"""What each operator may do where a dim runs along a sequence that several ranks hold: a reason for what would be wrong, or None.

Fine is what treats every token alike: element by element, products over other dims, views that leave the sequence whole, look-ups
by a token's own number. An operator without a rule is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.axes.along import ALONG, REDUCES, argument, dims_along, indexed_dims
from dilcompile.passes.axes.dim_order import dims_of
from dilcompile.passes.axes.products import Product, parse_product
from dilcompile.passes.dialect.normalize import CHECKPOINT
from dilcompile.passes.graph.operators import (
    CONVOLUTIONS,
    MOVES_ONLY,
    RANDOM,
    VIEWS,
    full_name,
    indexed,
    is_pointwise,
    is_tensor,
    op_name,
    shape_of,
    tensor_args,
)
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.sequence.sequence_axes import COUNTED, SequenceAxes

POSITIONS = "pass position_ids from dilcompile.distributed.shard_inputs, which are those of the whole sequence"
LOSS = (
    "compute the loss outside of the compiled model with dilcompile.distributed.sharded_loss, from labels that shard_inputs "
    "has shifted"
)
OUTSIDE = "do it outside of the compiled model: before dilcompile.distributed.shard_inputs, or after unshard"
NO_SHARD = "give its rule no `shard`: layers over the sequence other than attention run on one rank"
SHARD_IT = "let a rule with `shard` take it, or leave `shard` out of the policy"
NO_DROPOUT = "set the model's dropout to 0"


@dataclass(frozen=True)
class Wrong:
    """What would be wrong, and the cure."""

    reason: str
    cure: str


_OVER_ROWS = Wrong("a convolution over the sequence: rows at the edge of a shard need rows of another rank", NO_SHARD)


Rule = Callable[[Node, SequenceAxes], "Wrong | None"]

_LOSSES = frozenset(
    "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward mse_loss l1_loss smooth_l1_loss huber_loss kl_div "
    "binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss ctc_loss".split()
)
_CONSTANT = frozenset(
    "full full_like zeros zeros_like ones ones_like empty empty_like new_zeros new_ones new_full new_empty scalar_tensor "
    "empty_strided new_empty_strided lift_fresh_copy".split()
)
_DRAWN = RANDOM | frozenset(
    "rand randn randint randint_like randperm alpha_dropout feature_dropout normal uniform exponential".split()
)
_SHIFTS = frozenset("slice narrow pad constant_pad_nd roll cat concat diff".split())
_NORMS = frozenset("layer_norm native_layer_norm rms_norm _fused_rms_norm".split())
_HARMLESS = frozenset(
    "_assert_async _assert_tensor_metadata _assert_scalar sym_size sym_numel sym_stride sym_storage_offset".split()
)
_REORDERS = MOVES_ONLY - frozenset("slice narrow select".split())


def wrong_with(node: Node, along: SequenceAxes) -> Wrong | None:
    """What would be wrong about a call in a graph whose sequence is sharded."""
    if node.target in (along.sharding.attention, along.sharding.whole, CHECKPOINT):
        return None
    if node.target is operator.getitem:
        parent = node.args[0]
        made = isinstance(parent, Node) and parent.op == "call_function" and parent.target is not CHECKPOINT
        return _source(parent, along) if made and along.dims(node) and not _touched(parent, along) else None  # type: ignore[arg-type]
    if not _touched(node, along):
        return _source(node, along) if along.dims(node) else None
    return _rule(node, along)(node, along)


def _touched(node: Node, along: SequenceAxes) -> bool:
    return any(along.dims(arg) for arg in tensor_args(node))


def _rule(node: Node, along: SequenceAxes) -> Rule:
    name = op_name(node)
    if full_name(node) in along.orders:
        return _attention
    if name in _RULES:
        return _RULES[name]
    if name in _REORDERS:
        return _reordered
    if name in ALONG:
        return _acts_along
    if name in CONVOLUTIONS:
        return _convolution
    if indexed(node) is not None:
        return _indexed
    if parse_product(node) is not None:
        return _product
    return _pointwise if is_pointwise(node) else _unknown


def _unknown(node: Node, along: SequenceAxes) -> Wrong:
    return Wrong("what it does along the sharded sequence is not understood", OUTSIDE)


def _fine(node: Node, along: SequenceAxes) -> None:
    return None


def _source(node: Node, along: SequenceAxes) -> Wrong | None:
    """Something that runs along the sequence and is made of nothing that does."""
    name = op_name(node)
    if name in _CONSTANT or name in ("expand", "expand_as", "broadcast_to"):
        return None
    if name in COUNTED:
        return Wrong("it counts positions from this rank's first row on", POSITIONS)
    if name in _DRAWN:
        return Wrong("it draws numbers for this rank's tokens, which are not those of one rank", NO_DROPOUT)
    if name in CONVOLUTIONS:
        return _OVER_ROWS
    if all(_held(arg) for arg in tensor_args(node)):
        return Wrong("it takes one entry a token out of a table, by this rank's own count", POSITIONS)
    return _unknown(node, along)


def _held(node: Node) -> bool:
    """An input of the graph or a constant, moved."""
    while node.op == "call_function" and op_name(node) in MOVES_ONLY and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op != "call_function"


def _attention(node: Node, along: SequenceAxes) -> Wrong | None:
    for operand in node.args[:3]:
        assert isinstance(operand, Node)
        letters = dims_of(along.orders[full_name(node)], len(shape_of(operand)))
        if any(letters[dim] != "b" and letters[dim] != "h" for dim in along.dims(operand)):
            return Wrong("this attention sees the tokens of one rank alone", SHARD_IT)
    return None


def _reordered(node: Node, along: SequenceAxes) -> Wrong | None:
    """Views and moves: the sequence stays in one piece, in its order."""
    source = tensor_args(node)[0]
    if not along.dims(source):
        return None
    if op_name(node) in VIEWS and any(along.axis((atom,)) is not None for atom in along.cut_of(source)):
        return Wrong("it cuts this rank's rows into parts, as windows or a grid", NO_SHARD)
    before = {id(atom.root) for dim in along.layout(source) for atom in dim if along.axis((atom,)) is not None}
    after = {id(atom.root) for dim in along.layout(node) for atom in dim if along.axis((atom,)) is not None}
    if before != after:
        return _unknown(node, along)
    if op_name(node) in ("repeat", "repeat_interleave") and _longer(node, source, along):
        return Wrong("it repeats this rank's rows", OUTSIDE)
    return None


def _longer(node: Node, source: Node, along: SequenceAxes) -> bool:
    sizes = [shape_of(tensor)[dim] for tensor in (source, node) for dim in along.dims(tensor)]
    return len(sizes) != 2 or not same_size(*sizes)


def _acts_along(node: Node, along: SequenceAxes) -> Wrong | None:
    name = op_name(node)
    for source in tensor_args(node):
        hit = dims_along(node, shape_of(source)) & along.dims(source)
        if hit and not _is_identity(node, source, hit) and not _only_asserted(node):
            return _about_along(name, source)
    if name in ("cat", "concat"):
        return _broadcasts(node, along, {int(argument(node, "dim") or 0) % len(shape_of(node))})
    return None


def _about_along(name: str, source: Node) -> Wrong:
    if name in REDUCES:
        return Wrong(f"{name} runs over the tokens of one rank alone", f"{LOSS}, or {OUTSIDE}")
    if name in _SHIFTS and not source.meta["val"].dtype.is_floating_point:
        return Wrong(f"{name} moves numbers of tokens along the sequence, and not across the edges of shards", LOSS)
    return Wrong(f"{name} acts along the sequence, of which one rank has a part", OUTSIDE)


def _is_identity(node: Node, source: Node, hit: frozenset[int]) -> bool:
    """Does it leave these dims as they are: a slice of all of it, a joining with nothing?"""
    name = op_name(node)
    if name in ("slice", "narrow", "cat", "concat", "split", "chunk"):
        return is_tensor(node) and all(same_size(shape_of(node)[dim], shape_of(source)[dim]) for dim in hit)
    return False


def _only_asserted(node: Node) -> bool:
    """A condition for every token is one for all: each rank checks its own."""
    return op_name(node) == "all" and bool(node.users) and all(op_name(user) == "_assert_async" for user in node.users)


def _product(node: Node, along: SequenceAxes) -> Wrong | None:
    product = parse_product(node)
    assert product is not None
    if any(a in along.dims(product.lhs) or b in along.dims(product.rhs) for a, b in product.contracted):
        return Wrong("it sums over the tokens of one rank alone", NO_SHARD)
    sides = ((product.lhs, product.lhs_free), (product.rhs, product.rhs_free))
    if all(any(dim in along.dims(operand) for dim, _ in free) for operand, free in sides):
        return Wrong("it pairs the tokens of one rank with each other", SHARD_IT)
    return _kept_by_product(node, product, along)


def _kept_by_product(node: Node, product: Product, along: SequenceAxes) -> Wrong | None:
    for left, right, out in product.batch:
        for operand, dim in ((product.lhs, left), (product.rhs, right)):
            if dim is not None and not _agree(along, operand, dim, node, out):
                return _unknown(node, along)
    for operand, free in ((product.lhs, product.lhs_free), (product.rhs, product.rhs_free)):
        if any((dim in along.dims(operand)) != (out in along.dims(node)) for dim, out in free):
            return _unknown(node, along)
    return None


def _agree(along: SequenceAxes, operand: Node, dim: int, node: Node, out: int) -> bool:
    """Do a dim of an operand and one of the result run along the same, or does the operand not vary?"""
    held = along.layout(operand)[dim]
    if same_size(shape_of(operand)[dim], 1) or all(atom.broadcast for atom in held):
        return True
    return (dim in along.dims(operand)) == (out in along.dims(node))


def _broadcasts(node: Node, along: SequenceAxes, but: set[int]) -> Wrong | None:
    rank = len(shape_of(node))
    for arg in tensor_args(node):
        lead = rank - len(shape_of(arg))
        for dim in range(len(shape_of(arg))):
            if dim + lead not in but and not _agree(along, arg, dim, node, dim + lead):
                return _unknown(node, along)
    return None


def _pointwise(node: Node, along: SequenceAxes) -> Wrong | None:
    if op_name(node) in _DRAWN:
        return Wrong("it draws numbers for this rank's tokens, which are not those of one rank", NO_DROPOUT)
    return _broadcasts(node, along, set())


def _dropout(node: Node, along: SequenceAxes) -> Wrong | None:
    p, train = argument(node, "p"), argument(node, "train")
    if p == 0 or train is False:
        return None
    return Wrong(f"it drops out other numbers of tokens than one rank would (p={p})", NO_DROPOUT)


def _stack(node: Node, along: SequenceAxes) -> Wrong | None:
    dim = int(argument(node, "dim") or 0) % len(shape_of(node))
    for arg in tensor_args(node):
        for i in range(len(shape_of(arg))):
            if not _agree(along, arg, i, node, i + (i >= dim)):
                return _unknown(node, along)
    return None


def _pad(node: Node, along: SequenceAxes) -> Wrong | None:
    source, widths = tensor_args(node)[0], node.args[1]
    assert isinstance(widths, (list, tuple))
    rank = len(shape_of(source))
    padded = {rank - 1 - i // 2 for i, width in enumerate(widths) if width != 0}
    return _about_along("pad", source) if padded & along.dims(source) else _broadcasts_alike(node, source, along, padded)


def _broadcasts_alike(node: Node, source: Node, along: SequenceAxes, but: set[int]) -> Wrong | None:
    dims = [dim for dim in range(len(shape_of(source))) if dim not in but]
    return None if all(_agree(along, source, dim, node, dim) for dim in dims) else _unknown(node, along)


def _norm(node: Node, along: SequenceAxes) -> Wrong | None:
    source = tensor_args(node)[0]
    over = len(argument(node, "normalized_shape"))
    last = range(len(shape_of(source)) - over, len(shape_of(source)))
    if along.dims(source) & set(last):
        return Wrong("it takes the mean over the tokens of one rank alone", NO_SHARD)
    return None


def _group_norm(node: Node, along: SequenceAxes) -> Wrong | None:
    if along.dims(tensor_args(node)[0]) - {0}:
        return Wrong("it takes the mean over the tokens of one rank alone", NO_SHARD)
    return None


def _batch_norm(node: Node, along: SequenceAxes) -> Wrong | None:
    training = argument(node, "training")
    if training is not False or 1 in along.dims(tensor_args(node)[0]):
        return Wrong("it takes the mean over the tokens of one rank alone", NO_SHARD)
    return None


def _convolution(node: Node, along: SequenceAxes) -> Wrong | None:
    source, weight = node.args[:2]
    assert isinstance(source, Node)
    hit = along.dims(source) - {0}
    if not hit:
        return None
    alone = all(same_size(size, 1) for size in shape_of(weight)[2:]) and all(  # type: ignore[arg-type]
        dim in along.dims(node) and same_size(shape_of(source)[dim], shape_of(node)[dim]) for dim in hit
    )
    if alone and 1 not in hit:
        return None
    return _OVER_ROWS


def _embedding(node: Node, along: SequenceAxes) -> Wrong | None:
    weight = node.args[0]
    assert isinstance(weight, Node)
    return _unknown(node, along) if along.dims(weight) else None


def _indexed(node: Node, along: SequenceAxes) -> Wrong | None:
    found = indexed(node)
    assert found is not None
    tensor, indices = found
    if any(is_tensor(index) and index.meta["val"].dtype is torch.bool for index in indices):
        return _unknown(node, along)
    if any(is_tensor(index) and dim in along.dims(tensor) for dim, index in enumerate(indices)):
        return Wrong("it picks tokens by their number on this rank", OUTSIDE)
    ways = indexed_dims(node, tensor, indices)
    return None if all(_agree(along, arg, dim, node, out) for arg, dim, out in ways) else _unknown(node, along)


def _gather(node: Node, along: SequenceAxes) -> Wrong | None:
    source, index = tensor_args(node)[:2]
    dim = int(argument(node, "dim")) % len(shape_of(source))
    if dim in along.dims(source):
        return Wrong("it picks tokens by their number on this rank", OUTSIDE)
    return None if along.dims(index) == along.dims(node) else _unknown(node, along)


def _triangle(node: Node, along: SequenceAxes) -> Wrong | None:
    source = tensor_args(node)[0]
    rank = len(shape_of(source))
    if along.dims(source) & {rank - 1, rank - 2}:
        return Wrong("it goes by positions counted from this rank's first row on", POSITIONS)
    return None


def _loss(node: Node, along: SequenceAxes) -> Wrong | None:
    # 0: one loss a token.
    if argument(node, "reduction") == 0:
        return _unknown(node, along)
    return Wrong("it reduces over the tokens of one rank alone", LOSS)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_HARMLESS, _fine),
    **dict.fromkeys(_LOSSES, _loss),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("dropout", "native_dropout"), _dropout),
    **dict.fromkeys(_CONSTANT, _fine),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("group_norm", "native_group_norm", "instance_norm"), _group_norm),
    **dict.fromkeys(("batch_norm", "native_batch_norm"), _batch_norm),
    "embedding": _embedding,
    "gather": _gather,
    "stack": _stack,
    "one_hot": _fine,
    "copy": _pointwise,
}
