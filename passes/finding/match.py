"""One proven attention: its description for the policy, and the nodes that a rewrite needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from dilcompile.passes.axes.atoms import Atom, Leaves
from dilcompile.passes.finding.anchors import EmptyRule, MaskOperand, Multiplier, Sink
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.multipliers import Placed, placed
from dilcompile.passes.finding.operands import Operand, strip
from dilcompile.passes.finding.read_operands import Sinks, read_site_mask
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.graph.provenance import layer_index, module_path, source_line
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.emptiness import Floor
from dilcompile.passes.masks.place import place_of
from dilcompile.passes.masks.read import ReadMask
from dilcompile.passes.masks.terms import Truth
from dilcompile.site import AttentionSite, Kind, Length, Narrowed, Phase


@dataclass(frozen=True)
class Match:
    """One proven attention: its description, and the nodes that a rewrite needs."""

    site: AttentionSite
    roles: Roles
    q: Operand
    k: Operand
    v: Operand
    mask: ReadMask
    bias: tuple[MaskOperand, ...]
    sinks: tuple[Sink, ...]
    multipliers: Placed
    starts: Node | None
    tables: frozenset[Node]


@dataclass(frozen=True)
class Proof:
    """What is proven of an attention before its mask is read.

    Args:
        anchor: the node that it was found at.
        spelling: how it is written, in a word.
        seen: the pairs that the spelling itself lets through.
        empty: what rows become that see nothing.
        scored_at, valued_at: the nodes that read the queries and keys, and the values.
        multipliers, weights: tensors that scores and probabilities are multiplied with; the latter by ``factor``, too.
        zeroed: what sets probabilities to 0 after the softmax.
        floor: what the scores are lifted to after all masks.
        starts: where the sequences start that rows and columns are packed from.
        narrowed: see ``AttentionSite``, were the operands float64, and but for the biases.
    """

    anchor: Node
    spelling: str
    roles: Roles
    scale: float
    softcap: float | None
    dropout_p: float
    masks: tuple[MaskOperand, ...]
    sinks: tuple[Sink, ...]
    seen: Truth
    empty: EmptyRule
    softmax_dtype: torch.dtype
    scored_at: Node
    valued_at: Node
    multipliers: tuple[Multiplier, ...] = ()
    weights: tuple[Multiplier, ...] = ()
    zeroed: tuple[MaskOperand, ...] = ()
    factor: float = 1.0
    floor: Floor | None = None
    starts: Node | None = None
    narrowed: Narrowed = "no"


def describe(proof: Proof, index: int, graph: Graph, facts: Facts) -> Match:
    """Read the masks, follow the operands back to where they can be read, and write the site down.

    Raises:
        Unproven: if an operand is written to before the attention ends, or the output in a way that can't be repeated; if only a
            part of it has gradients.
    """
    roles, at = proof.roles, proof.roles.output
    _rewritable(proof, facts)
    q = strip(roles.q, _needed(roles, "q"), facts, at, scaled=True)
    k = strip(roles.k, _needed(roles, "k"), facts, at, scaled=True)
    v = strip(roles.v, _needed(roles, "v"), facts, at, scaled=False)
    for operand, reader in (
        (q, proof.scored_at),
        (k, proof.scored_at),
        (v, proof.valued_at),
    ):
        if facts.mutations.overwritten(operand.source, reader, at):
            raise Unproven(operand.source, "it is written in place before the attention ends", "write it out of place")
    narrowed = _narrowed(proof, (q, k, v))
    batch, heads, kv_heads = _count(roles)
    q_len, k_len = _size(roles.q_rows), _size(roles.k_columns)
    multipliers = placed(proof.multipliers, proof.weights, proof.factor, roles, facts.axes)
    mask, bias = read_site_mask(
        (*proof.masks, *multipliers.gates),
        proof.seen,
        roles,
        facts.axes,
        facts.reader,
        (batch, heads, q_len, k_len),
        capped=proof.softcap is not None,
        narrow=narrowed == "softmax",
        training=graph.training,
        rule=proof.empty,
        zeroed=proof.zeroed,
        floor=proof.floor,
        sinks=_sinks(proof.sinks, facts),
    )
    _readable_at(at, mask, (*bias, *proof.sinks, *multipliers.all), graph)
    if proof.starts is not None:
        if facts.mutations.stale(proof.starts, at):
            raise Unproven(proof.starts, "it is written in place before the attention ends", "write it out of place")
        mask = replace(mask, spec=replace(mask.spec, documents=True))
    module, spec = module_path(proof.anchor, graph.frame.prefix), mask.spec
    site = AttentionSite(
        index=index,
        module=module,
        source=source_line(proof.anchor),
        spelling=proof.spelling,
        kind=_kind(roles, spec.causal),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=int(_size(roles.q_features)),
        v_dim=int(_size(roles.v_features)),
        dtype=at.meta["val"].dtype,
        softmax_dtype=proof.softmax_dtype,
        narrowed="scores" if narrowed == "softmax" and _rounded(bias) else narrowed,
        device=at.meta["val"].device,
        scale=proof.scale * q.factor * k.factor,
        mask=spec,
        softcap=proof.softcap,
        dropout_p=proof.dropout_p,
        bias=tuple(operand.spec for operand in bias if operand.spec is not None),
        phase=_phase(graph.training, q_len),
        layer=layer_index(module),
        layer_type="sliding_attention" if "window" in spec.words else "full_attention",
        sinks=" + ".join(str(sink) for sink in proof.sinks) or None,
        multipliers=str(multipliers) or None,
    )
    tables = frozenset(facts.reader.used_tables & graph.tables.keys())
    return Match(site, roles, q, k, v, mask, bias, proof.sinks, multipliers, proof.starts, tables)


def _narrowed(proof: Proof, operands: tuple[Operand, ...]) -> Narrowed:
    """Nothing is narrow where nothing is float64."""
    ends = (proof.roles.output, *(operand.source for operand in operands))
    return proof.narrowed if any(end.meta["val"].dtype is torch.float64 for end in ends) else "no"


def _rounded(bias: tuple[MaskOperand, ...]) -> bool:
    """A bias that is added in fewer digits than float64 rounds the scores once more."""
    return any(operand.dtype is not torch.float64 for operand in bias)


def _rewritable(proof: Proof, facts: Facts) -> None:
    at, mutations = proof.roles.output, facts.mutations
    if facts.modes.change(proof.scored_at, at):
        reason = "a part of it is computed without gradients (torch.no_grad)"
        raise Unproven(proof.anchor, reason, "compute all of it there, or nothing")
    if mutations.written_after(at) and not (mutations.is_first(at) and at.meta["val"].is_contiguous()):
        raise Unproven(at, "its output is written in place through memory that it shares", "write it out of place")


def _sinks(sinks: tuple[Sink, ...], facts: Facts) -> Sinks:
    if not sinks:
        return "none"
    return "ordinary" if all(_is_ordinary(sink.logit, facts) for sink in sinks) else "data"


def _is_ordinary(logit: float | Node, facts: Facts) -> bool:
    """A learned logit, or a constant that no fill of a mask comes near."""
    if isinstance(logit, Node) and logit in facts.axes.parametric:
        return True
    held = facts.constant(logit) if isinstance(logit, Node) else logit
    return held is not None and abs(held) < 1e4


def _readable_at(output: Node, mask: ReadMask, beside: tuple[MaskOperand | Multiplier | Sink, ...], graph: Graph) -> None:
    """Masks are read again where the output is made: they must still hold what they held."""
    for operand in beside:
        node = operand.logit if isinstance(operand, Sink) else operand.node
        if isinstance(node, Node) and graph.mutations.overwritten(node, operand.on, output):
            raise Unproven(node, "it is written in place before the attention ends", "write it out of place")
    place_of(mask, output, graph.mutations)


def _needed(roles: Roles, operand: str) -> Leaves:
    """The atoms along which an operand varies."""
    shared = tuple(atom for axis in roles.shared if (atom := getattr(axis, operand)) is not None)
    if operand == "q":
        return shared + roles.q_rows + roles.q_features
    if operand == "k":
        return shared + roles.k_columns + roles.k_features
    return shared + roles.v_columns + roles.v_features


def _size(atoms: Leaves) -> Length:
    size: Length = 1
    for atom in atoms:
        size = size * atom.size
    return size


def _count(roles: Roles) -> tuple[Length, int, int]:
    batch = _size(tuple(axis.out for axis in roles.batch))
    heads = int(_size(tuple(axis.out for axis in roles.heads)))
    own: list[Atom] = [axis.out for axis in roles.heads if axis.k is not None or axis.v is not None]
    return batch, heads, int(_size(tuple(own)))


def _kind(roles: Roles, causal: bool) -> Kind:
    if causal:
        return "self"
    rows, columns = roles.q_rows, roles.k_columns
    if len(rows) == len(columns) and all(a.root is b.root for a, b in zip(rows, columns, strict=True)):
        return "self"
    return "cross" if rows or columns else "self"


def _phase(training: bool, q_len: Length) -> Phase:
    if training:
        return "train"
    return "decode" if isinstance(q_len, int) and q_len == 1 else "prefill"
