"""Which ranks share a sequence: groups of a DeviceMesh, found at run time by the name of their mesh axis.

c10d names the groups of a mesh by number, and sub-groups of one axis have another number on every rank. Graphs that hold such a
name would differ. So each group is registered once more, as ``dilcompile:<axis>`` on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dilcompile.errors import PlacementError
from dilcompile.near import hint
from dilcompile.placements import device
from dilcompile.placements.marks import MARKS

# Typed by nobody the same in all versions.
_registry: Any = torch._C._distributed_c10d


@dataclass(frozen=True)
class Axis:
    """A mesh axis as this rank sees it; ``group`` is None where one rank is alone."""

    name: str
    size: int
    rank: int
    group: ProcessGroup | None


_axes: dict[str, Axis] = {}


def group_name(axis: str) -> str:
    """What the group of an axis is registered as, on every rank."""
    return f"dilcompile:{axis}"


def set_mesh(mesh: DeviceMesh) -> None:
    """Use the axes of this mesh, by their names, in place of those known before.

    Args:
        mesh: with ``mesh_dim_names``; axes that no policy names may stand beside.

    Raises:
        PlacementError: if its axes have no names, or this rank is not in it.
    """
    if mesh.mesh_dim_names is None:
        raise PlacementError("the mesh has no axis names; make it with init_device_mesh(..., mesh_dim_names=('cp',))")
    if mesh.get_coordinate() is None:
        raise PlacementError(f"rank {dist.get_rank()} is not in the mesh {mesh}; call set_mesh on its ranks only")
    forget()
    for name in mesh.mesh_dim_names:
        group = mesh.get_group(name)
        _register(Axis(name, mesh[name].size(), dist.get_rank(group), group))


def ensure(sizes: Mapping[str, int]) -> None:
    """See that there are axes of these sizes; where none of them is known, the mesh is made from the ranks of ``torchrun``.

    Args:
        sizes: ranks by axis, outermost first.

    Raises:
        PlacementError: if an axis has another size, or there is no process group and no environment to make one from.
    """
    known = {name: _axes[name].size for name in sizes if name in _axes}
    for name, size in known.items():
        if size != sizes[name]:
            raise PlacementError(
                f"mesh axis {name!r} has {size} ranks but the policy says {sizes[name]}; change the policy's mesh, or the mesh "
                f"given to dilcompile.distributed.set_mesh"
            )
    missing = [name for name in sizes if name not in known]
    if not missing:
        return
    if all(sizes[name] == 1 for name in missing):
        for name in missing:
            _register(Axis(name, 1, 0, None))
    elif known:
        raise PlacementError(
            f"the mesh given to dilcompile.distributed.set_mesh has no axis {missing[0]!r}, it has {', '.join(_axes)}; "
            f"give one that has it"
        )
    else:
        _make(sizes)


def _make(sizes: Mapping[str, int]) -> None:
    wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
    ranks = 1
    for size in sizes.values():
        ranks *= size
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise PlacementError(
            f"the mesh {wanted} needs {ranks} ranks, but there is no process group and this is no rank of one; "
            f"start it with: torchrun --nproc-per-node {ranks} script.py"
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise PlacementError(
            f"the mesh {wanted} needs {ranks} ranks but there are {world}; start as many, change the policy's mesh, or give a "
            f"mesh with more axes to dilcompile.distributed.set_mesh"
        )
    set_mesh(init_device_mesh(_device_type(), tuple(sizes.values()), mesh_dim_names=tuple(sizes)))


def _device_type() -> str:
    if dist.is_initialized():
        return "cuda" if "nccl" in dist.get_backend() else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _register(axis: Axis) -> None:
    name = group_name(axis.name)
    _axes[axis.name] = axis
    if axis.group is not None:
        _registry._unregister_process_group(name)
        _registry._register_process_group(name, axis.group)


def forget() -> None:
    """Leave all axes, as when the process group was destroyed."""
    if dist.is_available():
        for name in _axes:
            _registry._unregister_process_group(group_name(name))
    _axes.clear()
    MARKS.forget()
    device.forget()


def axis_of(name: str) -> Axis:
    """The axis with this name.

    Raises:
        PlacementError: if there is none.
    """
    if name in _axes:
        return _axes[name]
    if not _axes:
        raise PlacementError(
            f"no mesh has been set, so axis {name!r} is unknown; start the ranks with torchrun, make a mesh with "
            f"init_device_mesh and give it to dilcompile.distributed.set_mesh, or name its sizes in the policy's mesh"
        )
    raise PlacementError(f"mesh axis {name!r} is unknown{hint(name, _axes)}; the axes are {', '.join(_axes)}")


def size_of(name: str | None) -> int:
    """Ranks of an axis; 1 without one."""
    return 1 if name is None else axis_of(name).size


def rank_of(name: str | None) -> int:
    """This rank's number on an axis; 0 without one."""
    return 0 if name is None else axis_of(name).rank
