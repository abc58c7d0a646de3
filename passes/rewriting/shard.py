"""A rewritten site whose sequence is held by several ranks: one call of sharded attention in place of the local operator.

The local rows are a shard. The site's mask was read as formulas over local positions, and means positions of the whole sequence:
for ``k <= q`` and distances that is the same formula. What a mask holds a number a token of is handed over as this rank has it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.fx import Node

from dilcompile.decision import Decision
from dilcompile.errors import ShardingError
from dilcompile.passes.axes.atoms import Leaves
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.graph.emit import Emitter
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.whole_sequence import Sharding, WholeSequence
from dilcompile.passes.masks.operands import MaskOperands
from dilcompile.passes.rewriting.empty_rows import Inputs
from dilcompile.placements.choice import PlacementChoice


def attend_over_ranks(
    graph: Graph,
    emit: Emitter,
    inputs: Inputs,
    mask: MaskOperands,
    roles: Roles,
    decision: Decision,
    sharding: Sharding,
    lse: bool,
) -> Node:
    """One call of sharded attention: (out, lse).

    Args:
        lse: somebody reads the LSE.

    Raises:
        ShardingError: if the site's rows are no shard of one sequence.
    """
    placement = decision.placement
    assert placement is not None
    _one_sequence(roles, decision, placement)
    spec = spec_of(decision, placement, lse)
    documents = mask.documents
    if documents is not None:
        documents = WholeSequence(placement, spec, sharding).documents(graph, emit, documents)
    return emit.held(
        sharding.attention,
        _results(inputs, decision),
        (inputs.q, inputs.k, inputs.v, mask.key_padding, documents, None, inputs.seed, spec),
    )


def spec_of(decision: Decision, placement: PlacementChoice, lse: bool) -> str:
    """The site as text, the same on every rank; see ``lowering/distributed/spec.py``."""
    site, mask = decision.site, decision.site.mask
    said: dict[str, Any] = {
        "axis": placement.axis,
        "placement": placement.method,
        "form": str(decision.form),
        "order": placement.order,
        "heads_axis": placement.heads_axis,
        "moving": placement.moving,
        "prefetch": None if placement.overlap == "prefetch" else False,
        "is_causal": mask.causal or None,
        "window_left": mask.left,
        "window_right": mask.right,
        "scale": site.scale,
        "softcap": site.softcap,
        "dropout_p": site.dropout_p or None,
        "kernel": decision.kernel,
        "site": site.module or "<top>",
        "lse": lse or None,
    }
    return json.dumps({name: value for name, value in said.items() if value is not None})


def _results(inputs: Inputs, decision: Decision) -> tuple[torch.Tensor, torch.Tensor]:
    """What the call gives, without data: out laid out [B, Sq, H, Dv], and the LSE."""
    q, site = inputs.q.meta["val"], decision.site
    batch, heads, rows, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((batch, rows, heads, site.v_dim)).transpose(1, 2), q.new_empty((batch, heads, rows), dtype=wide)


def _one_sequence(roles: Roles, decision: Decision, placement: PlacementChoice) -> None:
    """A shard is a run of places along one axis: rows of a grid, or of windows, are none."""
    named: dict[str, Leaves] = {"keys": roles.k_columns, "values": roles.v_columns}
    if placement.method != "tree":
        named = {"queries": roles.q_rows, **named}
    for what, atoms in named.items():
        if len(atoms) != 1:
            sizes = " x ".join(str(atom.size) for atom in atoms) or "1"
            raise ShardingError(
                f"{decision.site.module or '<top>'} ({decision.site.source}) can't be sharded over mesh axis {placement.axis!r}: "
                f"its {what} lie along {sizes} places, which are no shard of one sequence; give its rule no `shard`, or longer "
                "inputs"
            )
