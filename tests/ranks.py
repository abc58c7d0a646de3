"""Real processes as ranks: one spawn runs many cases, because starting costs seconds."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dilcompile.lowering.distributed import meshes

# Its children inherit what it has imported, and no threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "dilcompile.distributed"])


def over_ranks(
    mesh: dict[str, int], job: Callable[..., Any], *given: Any, timeout: float = 60.0, patience: float = 120.0
) -> list[Any]:
    """What ``job(rank, *given)`` returns on each rank of a gloo mesh, which ``dilcompile.distributed.set_mesh`` knows.

    Args:
        mesh: ranks by axis.
        job: a function of a module.
        timeout: of the process group, seconds.
        patience: how long to wait for all ranks, seconds. A rank that leaves without a result gives None.
    """
    ranks = 1
    for size in mesh.values():
        ranks *= size
    with tempfile.TemporaryDirectory() as folder:
        running = [_CONTEXT.Process(target=_rank, args=(rank, mesh, folder, timeout, job, given)) for rank in range(ranks)]
        for process in running:
            process.start()
        for process in running:
            process.join(patience)
            if process.is_alive():
                process.kill()
        found = []
        for rank in range(ranks):
            failure, result = Path(folder, f"failure{rank}"), Path(folder, f"result{rank}")
            assert not failure.exists(), failure.read_text()
            found.append(torch.load(result, weights_only=False) if result.exists() else None)
        return found


def _rank(rank: int, mesh: dict[str, int], folder: str, timeout: float, job: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    ranks = 1
    for size in mesh.values():
        ranks *= size
    store = f"file://{folder}/store"
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
        meshes.set_mesh(init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh)))
        torch.save(job(rank, *given), Path(folder, f"result{rank}"))
    except BaseException:
        Path(folder, f"failure{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        dist.destroy_process_group()
