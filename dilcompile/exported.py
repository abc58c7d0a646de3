"""The same passes on a ``torch.export`` program."""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.fx import Node

from dilcompile.errors import DilcompileError, ShardingError
from dilcompile.passes.graph.regions import Graph
from dilcompile.pipeline import rewrite_exported_graph
from dilcompile.policy import Policy
from dilcompile.publish import publish

# Programs of a process have no compile ids; a report file tells of all of them.
_numbers = itertools.count()


def rewrite_exported(
    ep: ExportedProgram,
    policy: str | os.PathLike[str] | dict[str, Any] | Policy | None = None,
    *,
    report: str | os.PathLike[str] | None = None,
) -> ExportedProgram:
    """A program with the attentions of ``ep`` rewritten by policy; ``ep`` and its weights are not changed.

    Args:
        ep: as ``torch.export.export`` gives it, or after ``run_decompositions``.
        policy: path, dict, ``Policy`` or preset name; None: ``DILCOMPILE_POLICY``, else ``longnet``.
        report: path of an .html or .json file to write.

    Returns:
        A new program; compile it further with ``torch._inductor.aoti_compile_and_package`` or run its ``module()``.

    Raises:
        DilcompileError: if ``ep`` is no exported program.
        PolicyError: for a policy that can't be read.
        RewriteError: where the policy says that a failure is an error.
        ShardingError: if the policy shards attention over ranks.
    """
    if not isinstance(ep, ExportedProgram):
        raise DilcompileError(
            f"rewrite_exported takes an ExportedProgram, not {type(ep).__name__}; "
            f"export it first: torch.export.export(model, args)"
        )
    loaded = Policy.load(policy)
    if loaded.shards:
        raise ShardingError(
            "the policy shards attention over ranks, which an exported program can't hold; use torch.compile, or a policy "
            "without `shard`"
        )
    rewritten = _copied(ep)
    gm = rewritten.graph_module
    by_name = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    weights: set[Node] = set()
    tables: dict[Node, torch.Tensor] = {}
    mutated = set(rewritten.graph_signature.buffers_to_mutate.values())
    for spec in rewritten.graph_signature.input_specs:
        node = by_name.get(spec.arg.name)
        if node is None or spec.target is None:
            continue
        if spec.kind is InputKind.PARAMETER:
            weights.add(node)
        elif spec.kind is InputKind.BUFFER and spec.target not in mutated:
            # An exported buffer is part of the program: what a mask was read from it stays true.
            tables[node] = rewritten.state_dict[spec.target] if spec.persistent else rewritten.constants[spec.target]
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            tables[node] = rewritten.constants[spec.target]
    name = f"exported {next(_numbers)}"
    outcome = rewrite_exported_graph(Graph(gm, frozenset(weights), tables, training=False), loaded, name)
    publish(outcome.report, loaded, report)
    if outcome.gm is None:
        return _copied(ep)
    rewritten._graph_signature = _with_outputs(rewritten)
    return rewritten


def _with_outputs(ep: ExportedProgram) -> ExportGraphSignature:
    """The signature with the names that the graph's outputs have now."""
    (output,) = ep.graph.find_nodes(op="output")
    specs = []
    for spec, node in zip(ep.graph_signature.output_specs, output.args[0], strict=True):
        named = isinstance(node, Node) and spec.arg.name != node.name
        specs.append(replace(spec, arg=replace(spec.arg, name=node.name)) if named else spec)
    return ExportGraphSignature(ep.graph_signature.input_specs, specs)


def _copied(ep: ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own and the same weights."""
    own = copy.copy(ep)
    own._graph_module = copy.deepcopy(ep.graph_module)
    return own
