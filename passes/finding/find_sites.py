"""Find every attention of a normalised graph: from each anchor outward, by role, with the axes proven."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.dialect.normalize import vmap_depth
from dilcompile.passes.finding.anchors import Attention, EmptyRule, Softmax, Spelling
from dilcompile.passes.finding.call_roles import roles_of_call
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.gather_facts import gather_facts
from dilcompile.passes.finding.loose_ends import LooseEnds
from dilcompile.passes.finding.match import Match, Proof, describe
from dilcompile.passes.finding.narrowing import narrowing
from dilcompile.passes.finding.roles import Roles, roles_of_products
from dilcompile.passes.finding.score_path import ScorePath, walk_scores
from dilcompile.passes.finding.spellings import BY_ANCHOR
from dilcompile.passes.finding.value_path import ValuePath, walk_values
from dilcompile.passes.graph.operators import full_name, op_name
from dilcompile.passes.graph.provenance import module_path, source_line
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.site import Miss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    matches: tuple[Match, ...]
    misses: tuple[Miss, ...]
    axes: Axes


def find_sites(graph: Graph) -> Findings:
    """All attention of the graph, and everything that looks like it and could not be proven, in graph order."""
    facts = gather_facts(graph)
    ends = LooseEnds(list(graph.gm.graph.nodes), facts)
    matches: list[Match] = []
    misses: list[Miss] = []
    depth = 0
    for node in graph.gm.graph.nodes:
        depth += vmap_depth(node)
        try:
            match = _at(node, len(matches), graph, facts, ends)
            if match is not None and depth:
                raise Unproven(node, "it runs inside vmap", "call the model on the whole batch instead")
        except Unproven as end:
            misses.append(Miss(module_path(node, graph.frame.prefix), source_line(node), end.node.name, end.reason, end.cure))
        except Exception as error:
            # A site that the finder stumbles over is a site left alone, never a model that does not run.
            log.warning("dilcompile: the finder failed at %s", node.name, exc_info=True)
            reason = f"the finder failed on it ({type(error).__name__}: {error})"
            misses.append(Miss(module_path(node, graph.frame.prefix), source_line(node), node.name, reason, "please report it"))
        else:
            matches += [] if match is None else [match]
    return Findings(tuple(matches), tuple(misses), facts.axes)


def _at(node: Node, index: int, graph: Graph, facts: Facts, ends: LooseEnds) -> Match | None:
    """The attention that is anchored at a node; None if there is none.

    Raises:
        Unproven: if there seems to be one.
    """
    if node.op != "call_function":
        return None
    for spelling in BY_ANCHOR.get(full_name(node), ()):
        found = spelling.read(node, facts)
        if isinstance(found, Attention):
            return describe(_of_call(node, spelling, found, facts), index, graph, facts)
        if isinstance(found, Softmax):
            ends.note(found)
            proof = _of_softmax(node, spelling, found, facts, ends)
            return None if proof is None else describe(proof, index, graph, facts)
    ends.check(node)
    return None


def _of_call(node: Node, spelling: Spelling, call: Attention, facts: Facts) -> Proof:
    """A whole attention: the roles are given."""
    return Proof(
        anchor=node,
        spelling=spelling.name,
        roles=roles_of_call(call, facts.axes),
        scale=call.scale,
        softcap=call.softcap,
        dropout_p=call.dropout_p,
        masks=call.masks,
        sinks=(),
        seen=call.seen,
        empty=call.empty,
        softmax_dtype=torch.promote_types(call.q.meta["val"].dtype, torch.float32),
        scored_at=node,
        valued_at=node,
        starts=call.documents,
        narrowed=call.narrowed,
    )


def _of_softmax(node: Node, spelling: Spelling, softmax: Softmax, facts: Facts, ends: LooseEnds) -> Proof | None:
    """A written-out attention, if the softmax stands between two products of activations."""
    if not ends.joins_products(softmax):
        return None  # a router, a gate, a classifier: nothing like attention
    path, values, roles = _between(node, softmax, facts)
    return Proof(
        anchor=node,
        spelling=f"{op_name(path.product.node)}-{spelling.name}",
        roles=roles,
        scale=path.scale,
        softcap=path.softcap,
        dropout_p=values.dropout_p,
        masks=path.masks,
        sinks=path.sinks,
        seen=True,
        empty=_rows_without_keys(softmax, values),
        softmax_dtype=softmax.dtype,
        scored_at=path.product.reader,
        valued_at=values.product.reader,
        multipliers=path.multipliers,
        weights=values.multipliers,
        zeroed=values.masks,
        factor=values.factor,
        floor=path.floor,
        narrowed=narrowing(node, softmax, path, roles.output, facts),
    )


def _rows_without_keys(softmax: Softmax, values: ValuePath) -> EmptyRule:
    """What rows that see nothing become on the way to the values.

    Raises:
        Unproven: if their NaN becomes 0, but not all of them have NaN.
    """
    if not values.cleared or softmax.empty == "zero":
        return softmax.empty
    if softmax.empty == "odd" or softmax.masks or softmax.division is not None:
        reason = "NaN becomes 0 after a softmax that is written out"
        raise Unproven(values.probabilities, reason, "write torch.softmax")
    return "cleared"


def _between(node: Node, softmax: Softmax, facts: Facts) -> tuple[ScorePath, ValuePath, Roles]:
    """The way from a product to the softmax and on to the values, for the first product that it can be proven of.

    Raises:
        Unproven: with the first product's reason.
    """
    ends: list[Unproven] = []
    for product in sorted(facts.scores[softmax.scores], key=facts.mutations.position.__getitem__):
        try:
            path = walk_scores(softmax, product, facts)
            values = walk_values(softmax, path.columns, product, facts)
            return path, values, roles_of_products(path.product, node, path.columns, values, facts.axes)
        except Unproven as end:
            ends.append(end)
    raise ends[0]
