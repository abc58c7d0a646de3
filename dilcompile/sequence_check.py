"""Looks through a graph of a model whose sequence is sharded, whether it holds a sharded site or stands behind a graph break."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dilcompile.decision import Decision
from dilcompile.errors import ShardingError
from dilcompile.passes.graph.operators import is_tensor, shape_of
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.whole_sequence import Sharding
from dilcompile.passes.sequence.hazards import hazards
from dilcompile.passes.sequence.known_rows import KnownRows
from dilcompile.passes.sequence.sequence_axes import SequenceAxes
from dilcompile.placements.marks import Mark, Marks, Waiting
from dilcompile.policy import Policy
from dilcompile.report.lengths import hint
from dilcompile.rewriting import Rewritten, sharding_functions

MOST_HAZARDS = 8
ALONE = "its sequence is sharded, but no process group is initialised: that all ranks compile the same is not checked"
UNCHECKED = (
    "it holds no sharded attention, though the policy shards some, and how many tokens a rank holds is not known yet: it is "
    "checked when that is known, from dilcompile.distributed.shard_inputs or a graph with sharded attention"
)
UNSHARDED = "none of its attention is sharded, though the policy shards some: it computes with the tokens that it is given"
WHOLE = "compile the model with fullgraph=True, so that the sequence is followed through all of it"


@dataclass(frozen=True)
class Checked:
    """What came of it.

    Args:
        notes: for the report.
        results: what is known of the graph's results; empty if nothing is to be remembered.
    """

    notes: tuple[str, ...] = ()
    results: tuple[Mark | None, ...] = ()


def check_sequence(
    parts: Sequence[Graph],
    done: Rewritten,
    policy: Policy,
    name: str,
    values: Mapping[Node, Any],
    marks: Marks,
    enforce: bool,
) -> Checked:
    """See that a graph computes what it would on one rank.

    Where it holds sharded sites the sequence is followed from them. Else it begins at what the last batch and earlier graphs tell
    of its inputs; of others a dim as long as a rank's part is taken for it.

    Args:
        parts: the rewritten graph, then the bodies in it.
        values: of the graph's inputs.
        marks: what is known in this process; more is noted there.

    Raises:
        ShardingError: if it would compute something else than one rank does.
    """
    if not policy.shards:
        return Checked()
    for axis, rows in _rows_of_sites(done):
        marks.note_rows(axis, rows)
    inputs = {node: mark for node, value in values.items() if (mark := marks.of(value)) is not None}
    known = KnownRows(inputs, marks.all_rows())
    functions = done.sharding or sharding_functions()
    if not known:
        return _later(parts, done, policy, name, known, functions, marks)
    notes = _waited(marks, known, enforce)
    along = SequenceAxes(parts, functions, known)
    found = [str(hazard) for hazard in hazards(parts, along)]
    if found and not along.sites:
        found.append(_why_looked_at(along))
    if found and enforce:
        held = ", ".join(map(repr, sorted(set(along.axis_of.values()))))
        raise ShardingError(
            f"graph {name} holds a sequence that is sharded over mesh axis {held}, and would compute something else than one "
            f"rank does:\n{_listed(found)}"
        )
    alone = torch.distributed.is_available() and torch.distributed.is_initialized()
    notes += (ALONE,) if along.sites and not alone else ()
    notes += (UNSHARDED,) if not along.sites and _own_sites(done) else ()
    notes += tuple(f"would be refused, as its sequence is sharded: {line}" for line in found)
    return Checked(notes, _results(parts[0], along))


def _rows_of_sites(done: Rewritten) -> list[tuple[str, int]]:
    """The mesh axis of each sharded site, and how many tokens of it a rank has."""
    found = []
    for verdict in done.verdicts:
        rows = hint(verdict.site.k_len)
        if isinstance(verdict, Decision) and verdict.placement is not None and rows is not None:
            found.append((verdict.placement.axis, rows))
    return found


def _own_sites(done: Rewritten) -> bool:
    return any(isinstance(verdict, Decision) or verdict.asked for verdict in done.verdicts)


def _results(part: Graph, along: SequenceAxes) -> tuple[Mark | None, ...]:
    results = part.gm.graph.output_node().args[0]
    results = results if isinstance(results, (list, tuple)) else (results,)
    return tuple(along.mark_of(node) if isinstance(node, Node) and is_tensor(node) else None for node in results)


def _why_looked_at(along: SequenceAxes) -> str:
    if not along.guessed:
        return f"the graph holds no sharded attention, but tokens of the sequence come into it; {WHOLE}"
    names = ", ".join(dict.fromkeys(f"{node.name} {list(shape_of(node))}" for node in along.guessed))
    return (
        f"the graph holds no sharded attention, and its inputs {names} are taken for tokens of the sequence, as many as a rank "
        f"holds; if they are none, {WHOLE}"
    )


def _listed(found: Sequence[str]) -> str:
    more = f"\n  and {len(found) - MOST_HAZARDS} more" if len(found) > MOST_HAZARDS else ""
    return "\n".join(f"  {line}" for line in found[:MOST_HAZARDS]) + more


def _later(
    parts: Sequence[Graph], done: Rewritten, policy: Policy, name: str, known: KnownRows, functions: Sharding, marks: Marks
) -> Checked:
    """Nothing is known of any sequence yet: what would be wrong, for each number of tokens that a rank may hold by its inputs."""
    axis = next(rule.shard.axes[0] for rule in policy.rules if rule.shard is not None)
    wrong = {}
    for rows in _sizes(parts[0]):
        guess = KnownRows(known.inputs, {axis: frozenset((rows,))})
        along = SequenceAxes(parts, functions, guess)
        found = [str(hazard) for hazard in hazards(parts, along)]
        if found:
            wrong[rows] = (*found, _why_looked_at(along))
    if wrong:
        marks.waiting.append(Waiting(name, wrong))
    note = UNSHARDED if _own_sites(done) else UNCHECKED
    return Checked((note,), _results(parts[0], SequenceAxes(parts, functions, known)))


def _sizes(part: Graph) -> list[int]:
    """Of all dims of inputs that are no weights."""
    inputs = [node for node in part.gm.graph.find_nodes(op="placeholder") if is_tensor(node)]
    sizes = [hint(size) for node in inputs if node not in part.weights and node not in part.tables for size in shape_of(node)]
    return sorted({size for size in sizes if size is not None and size > 1})


def _waited(marks: Marks, known: KnownRows, enforce: bool) -> tuple[str, ...]:
    """Graphs that were compiled before: now it is known how many tokens a rank holds."""
    notes: list[str] = []
    rows = frozenset().union(*known.rows.values())
    for graph in marks.waiting:
        found = [line for size, lines in graph.wrong.items() if size in rows for line in lines]
        if found and enforce:
            marks.waiting.clear()
            raise ShardingError(
                f"graph {graph.name}, compiled before this one, would compute something else than one rank does, as its sequence "
                f"is sharded over mesh axis {', '.join(map(repr, known.rows))}:\n{_listed(found)}"
            )
        notes += [f"would be refused in graph {graph.name}, as its sequence is sharded: {line}" for line in found]
    if rows:
        marks.waiting.clear()
    return tuple(notes)
