"""Ranks that share a sequence compile the same thing, or stop: with both values, before anything is computed.

What each rank compiles goes through the store of the process group, not through a collective: a rank that compiles alone can't be
taken for one that computes, and is told of by name when the time is up.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.fx import GraphModule

from dilcompile.decision import Decision
from dilcompile.errors import ShardingError
from dilcompile.policy import Policy
from dilcompile.report import GraphReport
from dilcompile.report.lengths import hint

# Of the store and its keys, how many graphs the ranks of a group have compiled.
_compiled: dict[tuple[int, ...], tuple[Store, int]] = {}
_CURES = {
    "policy": "give all ranks the same policy",
    "inputs": "give all ranks shards of one size, cut by dilcompile.distributed.shard_inputs",
    "decisions": "give all ranks the same policy and model",
    "graph": "give all ranks the same model in the same mode, with no number of the rank in its code",
}


def agree_over_ranks(gm: GraphModule, example_inputs: Sequence[Any], report: GraphReport, policy: Policy) -> None:
    """See that the mesh axes of a sharded graph exist, and that their ranks compile the same.

    Raises:
        PlacementError: if there is no such mesh, and none can be made.
        ShardingError: if the ranks compile different things.
    """
    # Loaded for sharded graphs alone.
    from dilcompile.lowering.distributed import meshes

    axes = axes_of(report)
    meshes.ensure(axes)
    said = described(gm, example_inputs, report, policy)
    for name in axes:
        group = meshes.axis_of(name).group
        if group is not None and dist.get_backend(group) != "fake":
            agree(said, name, group)


def described(gm: GraphModule, example_inputs: Sequence[Any], report: GraphReport, policy: Policy) -> dict[str, str]:
    """What must be the same on all ranks, in the order in which differences are told."""
    return {
        "policy": f"{policy.name or 'policy'} {policy.fingerprint[:12]}\n{policy}",
        "inputs": "\n".join(_input(i, value) for i, value in enumerate(example_inputs)),
        "decisions": "\n".join(_verdict(verdict) for verdict in report.verdicts),
        "graph": graph_text(gm),
    }


def graph_text(gm: GraphModule) -> str:
    """The code of a graph and of those in it, without the number of the device: the same on all ranks of one program."""
    parts = [part for part in gm.modules() if isinstance(part, GraphModule)]
    code = "\n".join(part.code.strip() for part in parts)
    return re.sub(r"(device\(type='\w+'), index=\d+\)", r"\1)", re.sub(r"\bcuda:\d+", "cuda", code))


def graph_hash(gm: GraphModule) -> str:
    """SHA-256 of ``graph_text``."""
    return hashlib.sha256(graph_text(gm).encode()).hexdigest()


def _input(index: int, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"input {index}: {type(value).__name__} {value}"
    shape = ", ".join(str(hint(size)) for size in value.shape)
    return f"input {index}: {str(value.dtype).removeprefix('torch.')}[{shape}]"


def _verdict(verdict: Any) -> str:
    site = verdict.site
    if not isinstance(verdict, Decision):
        return f"{site.module or '<top>'}: kept: {verdict.reason}"
    placed = "on one rank" if verdict.placement is None else str(verdict.placement)
    return f"{site.module or '<top>'}: {verdict.form}, {placed}, kernel {verdict.kernel}"


def agree(said: Mapping[str, str], axis: str, group: dist.ProcessGroup) -> None:
    """Compare with the other ranks of a mesh axis.

    Raises:
        ShardingError: if another rank says something else, or nothing within the time of the group.
    """
    ranks = tuple(dist.get_process_group_ranks(group))
    store, number = _next(ranks)
    prefix = f"dilcompile/{'-'.join(map(str, ranks))}/{number}"
    own = json.dumps(dict(said))
    store.set(f"{prefix}/{dist.get_rank()}/all", own)
    store.set(f"{prefix}/{dist.get_rank()}/hash", hashlib.sha256(own.encode()).hexdigest())
    hashes = {rank: _read(store, f"{prefix}/{rank}/hash", rank, axis, group) for rank in ranks}
    if len(set(hashes.values())) == 1:
        return
    first = next(rank for rank in ranks if hashes[rank] != hashes[ranks[0]])
    two = [json.loads(_read(store, f"{prefix}/{rank}/all", rank, axis, group)) for rank in (ranks[0], first)]
    raise ShardingError(_difference(axis, ranks[0], first, *two))


def _next(ranks: tuple[int, ...]) -> tuple[Store, int]:
    """The store, and how many graphs these ranks have compared in it before."""
    store = distributed_c10d._get_default_store()
    held, number = _compiled.get(ranks, (store, 0))
    number = number if held is store else 0
    _compiled[ranks] = (store, number + 1)
    return store, number


def _read(store: Store, key: str, rank: int, axis: str, group: dist.ProcessGroup) -> str:
    limit = _timeout(group)
    try:
        store.wait([key], limit)
        found: bytes = store.get(key)
    except (RuntimeError, dist.DistError) as error:
        raise ShardingError(
            f"rank {dist.get_rank()} compiles a graph whose sequence is sharded over mesh axis {axis!r}, but rank {rank} did not "
            f"within {limit}: it stopped, computes something else, or its policy shards nothing; run the same model with the "
            f"same policy on all ranks. {error}"
        ) from error
    return found.decode()


def _timeout(group: dist.ProcessGroup) -> timedelta:
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    found = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
    return found if isinstance(found, timedelta) else timedelta(minutes=5)


def _difference(axis: str, one: int, other: int, first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """The first thing that differs, as both ranks have it."""
    part = next(name for name in _CURES if first[name] != second[name])
    lines = _differing(first[part].splitlines(), second[part].splitlines())
    shown = "\n".join(f"  rank {rank}: {line or '(nothing)'}" for rank, line in zip((one, other), lines, strict=True))
    hashes = ""
    if part == "graph":
        digests = [hashlib.sha256(each[part].encode()).hexdigest()[:12] for each in (first, second)]
        hashes = f" (hashes {digests[0]} and {digests[1]})"
    return f"the ranks of mesh axis {axis!r} don't compile the same: their {part} differ{hashes}:\n{shown}\n{_CURES[part]}"


def _differing(a: list[str], b: list[str]) -> tuple[str, str]:
    """The first lines that are not the same; empty where one has none."""
    for tag, i, _, j, _ in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            return "" if tag == "insert" else a[i].strip(), "" if tag == "delete" else b[j].strip()
    return "", ""


def axes_of(report: GraphReport) -> dict[str, int]:
    """The mesh axes over which the sites of a graph are held, with their ranks."""
    return dict(_axes(report.verdicts))


def _axes(verdicts: Iterable[Any]) -> Iterable[tuple[str, int]]:
    for verdict in verdicts:
        if isinstance(verdict, Decision) and verdict.placement is not None:
            yield from verdict.placement.axes.items()
