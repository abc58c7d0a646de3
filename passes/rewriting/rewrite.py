"""Replace each decided site by one ``dilcompile::attention`` call, and take out what it made dead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from dilcompile.decision import Decision, repeats_rounding
from dilcompile.passes.axes.atoms import Atom, Leaves, flat, leaves
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.finding.anchors import Sink
from dilcompile.passes.finding.match import Match
from dilcompile.passes.finding.multipliers import multiplied
from dilcompile.passes.finding.operands import Operand
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.finding.score_order import in_score_order
from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.whole_sequence import Sharding
from dilcompile.passes.masks.binary import assert_binary
from dilcompile.passes.masks.operands import mask_operands
from dilcompile.passes.masks.place import place_of
from dilcompile.passes.rewriting.biases import emit_biases
from dilcompile.passes.rewriting.empty_rows import Inputs, attend, rows_without_keys
from dilcompile.passes.rewriting.shard import attend_over_ranks
from dilcompile.site import Length


def rewrite_site(graph: Graph, match: Match, decision: Decision, axes: Axes, sharding: Sharding | None = None) -> Node:
    """Insert the rewritten attention before the site's output and redirect the output's users to it.

    Args:
        graph: the normalised graph, changed in place; dead nodes stay until ``erase_dead``.
        axes: the layouts that the finder proved on this graph.
        sharding: what a decision with a placement calls.

    Returns:
        The node that now holds the site's output.

    Raises:
        ShardingError: if the decision has a placement and the site's rows are no shard of one sequence.
    """
    roles, site = match.roles, match.site
    emit = Emitter(graph.gm, roles.output)
    q = _operand(emit, match.q, _groups(roles, "q"), axes, site.dtype)
    k = _operand(emit, match.k, _groups(roles, "k"), axes, site.dtype)
    v = _operand(emit, match.v, _groups(roles, "v"), axes, site.dtype)
    q = multiplied(emit, q, match.multipliers.q, roles, axes)
    k = multiplied(emit, k, match.multipliers.k, roles, axes, along_keys=True)
    v = multiplied(emit, v, match.multipliers.v, roles, axes, along_keys=True)
    spec, read = site.mask, match.mask.inside_chunks() if decision.form.holds_chunks else match.mask
    sizes = (site.batch, site.q_len, site.k_len)
    place = place_of(match.mask, roles.output, graph.mutations)
    mask = mask_operands(Emitter(graph.gm, place), read, sizes, site.device, graph.bring_in)
    assert_binary(Emitter(graph.gm, place), match.mask, site.module, graph.bring_in)
    others = [
        mask_operands(Emitter(graph.gm, place), other.mask, sizes, site.device, graph.bring_in) for other in match.mask.others
    ]
    if place is not roles.output:
        mask = mask.copied(Emitter(graph.gm, place))
        others = [other.copied(Emitter(graph.gm, place)) for other in others]
    if match.starts is not None:
        mask = replace(mask, documents=_documents(emit, match.starts, site.k_len))
    biases = emit_biases(emit, match.bias, roles, axes)
    seed = _seed(emit, q) if site.dropout_p > 0 else None
    inputs = Inputs(q, k, v, biases, seed, repeats_rounding(decision))
    # Rows without keys are told from the others by an LSE of any precision.
    exact_lse = graph.training or bool(match.sinks)
    reads_lse = decision.fidelity == "exact" and spec.empty_rows != "zero"
    if decision.placement is None:
        call = attend(emit, inputs, mask, spec, site, str(decision.form), decision.kernel, exact_lse=exact_lse)
    else:
        assert sharding is not None
        call = attend_over_ranks(graph, emit, inputs, mask, roles, decision, sharding, reads_lse or bool(match.sinks))
    out = emit.item(call, 0)
    if reads_lse:
        out = rows_without_keys(emit, out, emit.item(call, 1), inputs, match, others)
    if match.sinks:
        out = _past_sinks(emit, out, emit.item(call, 1), match.sinks, roles, axes)
    if match.multipliers.factor != 1.0:
        out = emit(aten.mul.Scalar, out, match.multipliers.factor)
    out = multiplied(emit, out, match.multipliers.output, roles, axes)
    result = _output(emit, out, roles, axes)
    if graph.mutations.written_after(roles.output):
        result = _own_memory(emit, result, roles.output)
    redirect(roles.output, result)
    return result


def redirect(output: Node, result: Node) -> None:
    """Whoever reads a site's output reads what it was rewritten to."""
    output.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)


def _groups(roles: Roles, operand: str) -> tuple[list[Atom | None], list[Length], list[Leaves], list[Length]]:
    """Batch and head atoms with their lengths (None: the operand is broadcast along it), then rows and features."""
    heads = roles.heads
    if operand != "q":
        # Query heads of a group share their key head: only what keys or values vary along is a key head.
        heads = tuple(axis for axis in heads if axis.k is not None or axis.v is not None)
    shared = (*roles.batch, *heads)
    atoms: list[Atom | None] = [getattr(axis, operand) for axis in shared]
    sizes = [axis.out.size for axis in shared]
    rows = {"q": roles.q_rows, "k": roles.k_columns, "v": roles.v_columns}[operand]
    features = {"q": roles.q_features, "k": roles.k_features, "v": roles.v_features}[operand]
    return atoms, sizes, [rows, features], [_product(a.out.size for a in roles.batch), _product(a.out.size for a in heads)]


def _product(sizes: object) -> Length:
    total: Length = 1
    for size in sizes:  # type: ignore[attr-defined]
        total = total * size
    return total


def _operand(
    emit: Emitter,
    operand: Operand,
    groups: tuple[list[Atom | None], list[Length], list[Leaves], list[Length]],
    axes: Axes,
    dtype: torch.dtype,
) -> Node:
    """The operand as [batch, heads, rows, features], by views alone where the memory allows."""
    atoms, sizes, (rows, features), (batch, heads) = groups
    plain = _by_dims(operand.source, groups, axes)
    if plain is not None:
        return emit.cast(emit.permute(operand.source, plain), dtype)
    # Axes that keys are repeated along may still be dims of the source; they are read at 0.
    node, present = _at_leaves(emit, operand.source, axes)
    wanted = [atom for atom in atoms if atom is not None] + [*rows, *features]
    for dim in reversed(range(len(present))):
        if present[dim].broadcast and all(present[dim] is not atom for atom in wanted):
            node = emit(aten.select.int, node, dim, 0)
            present = present[:dim] + present[dim + 1 :]
    order = [_index_of(present, atom) for atom in wanted]
    node = emit.permute(node, order)
    if any(atom is None for atom in atoms):
        node = _broadcast(emit, node, atoms, sizes)
    lengths = [_product(atom.size for atom in group) for group in (rows, features)]
    node = emit.reshape(node, [batch, heads, *lengths])
    return emit.cast(node, dtype)


def _by_dims(
    source: Node, groups: tuple[list[Atom | None], list[Length], list[Leaves], list[Length]], axes: Axes
) -> list[int] | None:
    """The order of the source's own dims that gives the four wanted ones, if each is one dim of it."""
    atoms, _, (rows, features), (batch, heads) = groups
    layout = [leaves(dim) for dim in axes[source]]
    if len(layout) != 4 or any(atom is None for atom in atoms):
        return None
    shared = [atom for atom in atoms if atom is not None]
    for cut in range(len(shared) + 1):
        wanted = [tuple(shared[:cut]), tuple(shared[cut:]), tuple(rows), tuple(features)]
        sizes = [_product(atom.size for atom in group) for group in wanted[:2]]
        if not (same_size(sizes[0], batch) and same_size(sizes[1], heads)):
            continue
        ids = [tuple(id(atom) for atom in dim) for dim in layout]
        named = [tuple(id(atom) for atom in group) for group in wanted]
        if sorted(ids) == sorted(named) and len(set(ids)) == len(ids):
            return [ids.index(name) for name in named]
    return None


def _index_of(atoms: Sequence[Atom], atom: Atom) -> int:
    return next(i for i, other in enumerate(atoms) if other is atom)


def _at_leaves(emit: Emitter, source: Node, axes: Axes) -> tuple[Node, Leaves]:
    """The tensor with one dim an atom."""
    present = flat(axes[source])
    return emit.reshape(source, [atom.size for atom in present]), present


def _broadcast(emit: Emitter, node: Node, atoms: list[Atom | None], sizes: list[Length]) -> Node:
    for dim, atom in enumerate(atoms):
        if atom is None:
            node = emit(aten.unsqueeze.default, node, dim)
    rest = len(shape_of(node)) - len(atoms)
    target = [emit.size(size) if atom is None else -1 for atom, size in zip(atoms, sizes, strict=True)]
    return emit(aten.expand.default, node, target + [-1] * rest)


def _past_sinks(emit: Emitter, out: Node, lse: Node, sinks: Sequence[Sink], roles: Roles, axes: Axes) -> Node:
    """What is left of the keys' output once sinks have taken their part: ``out * sigmoid(lse - sink)`` for each in turn."""
    for sink in sinks:
        logit = sink.logit if isinstance(sink.logit, float) else _sink_logit(emit, sink, roles, axes, lse.meta["val"].dtype)
        subtract = aten.sub.Scalar if isinstance(logit, float) else aten.sub.Tensor
        gap = emit(subtract, lse, logit)
        share = emit(aten.sigmoid.default, gap)
        out = emit(aten.mul.Tensor, out, emit.cast(emit(aten.unsqueeze.default, share, -1), out.meta["val"].dtype))
        # The sink is part of the sum from now on.
        lse = emit(aten.sub.Tensor, lse, emit(aten.log_sigmoid.default, gap)) if len(sinks) > 1 else lse
    return out


def _sink_logit(emit: Emitter, sink: Sink, roles: Roles, axes: Axes, dtype: torch.dtype) -> Node:
    """The logits of a sink tensor, one a row: [B or 1, H or 1, Sq or 1]."""
    assert isinstance(sink.logit, Node)
    node = emit.cast(sink.logit, dtype)
    if sink.factor != 1.0:
        node = emit(aten.mul.Scalar, node, sink.factor)
    node = emit(aten.logsumexp.default, node, [sink.dim], True)
    dims = list(axes[sink.on])
    dims[sink.dim] = roles.score_columns
    return emit(aten.squeeze.dim, in_score_order(emit, node, tuple(dims), roles), -1)


def _documents(emit: Emitter, starts: Node, k_len: Length) -> Node:
    """Each token's document [1, S], from the starts and the end of all documents: how many begin at or before it."""
    places = emit(aten.arange.default, emit.size(k_len), dtype=starts.meta["val"].dtype, device=starts.meta["val"].device)
    later = emit(aten.slice.Tensor, starts, 0, 1)
    return emit(aten.unsqueeze.default, emit(aten.bucketize.Tensor, places, later, right=True), 0)


def _seed(emit: Emitter, q: Node) -> Node:
    device = q.meta["val"].device
    return emit(aten.randint.low, 0, 2**62, [1], dtype=torch.int64, device=device)


def _output(emit: Emitter, out: Node, roles: Roles, axes: Axes) -> Node:
    """From [B, H, Sq, Dv] to the dims of the site's own output."""
    ours = [axis.out for axis in (*roles.batch, *roles.heads)] + [*roles.out_rows, *roles.v_features]
    theirs = flat(axes[roles.output])
    node = emit.reshape(out, [atom.size for atom in ours])
    node = emit.permute(node, [_index_of(ours, _own(ours, atom)) for atom in theirs])
    node = emit.reshape(node, shape_of(roles.output))
    return emit.cast(node, roles.output.meta["val"].dtype)


def _own_memory(emit: Emitter, result: Node, output: Node) -> Node:
    """A copy that may be written in place, through views too: it lies in memory as the site's own output did."""
    copy = emit(aten.clone.default, result, memory_format=torch.contiguous_format)
    copy.meta["val"] = output.meta["val"]
    return copy


def _own(ours: list[Atom], atom: Atom) -> Atom:
    """The atom of ours that an output atom is: the value product may have copied or replaced it."""
    for candidate in ours:
        if candidate is atom or atom.origin is candidate:
            return candidate
    raise LookupError("an output axis that is none of the site's")
