"""One buffer of a plan: how large it is, and from when to when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import sympy

Lane = Literal["compute", "communication"]
Role = Literal["workspace", "output", "saved", "gradient", "send", "receive"]
ROLES: tuple[Role, ...] = get_args(Role)

# Of offsets, in bytes: a cache line, and what vector loads and CUDA's widest accesses ask for.
ALIGNMENT = 64


@dataclass(frozen=True)
class Buffer:
    """A piece of memory that is live from step ``begin`` to step ``end``, both included.

    Args:
        name: unique in a plan.
        size: bytes, or an expression over the lengths that are known when the graph runs.
        hint: bytes at the lengths that the plan is made for.
        device: ``cpu``, ``cuda:0``, ...; lane: buffers of another lane lie in an arena of their own, because their end is not
            ordered with the steps of this one.
        role: what it is for.
        module: path of the module whose attention it belongs to; empty for none.
    """

    name: str
    size: int | sympy.Expr
    begin: int
    end: int
    hint: int
    device: str = "cpu"
    lane: Lane = "compute"
    role: Role = "workspace"
    module: str = ""
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        if self.end < self.begin:
            raise ValueError(f"buffer {self.name}: ends at step {self.end}, before it begins at step {self.begin}")
        if self.hint < 0:
            raise ValueError(f"buffer {self.name}: a size of {self.hint} bytes")
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError(f"buffer {self.name}: an alignment of {self.alignment}, not a power of two")

    def meets(self, other: Buffer) -> bool:
        """Are both live in some step?"""
        return self.begin <= other.end and other.begin <= self.end


def aligned(offset: int, alignment: int = ALIGNMENT) -> int:
    """The least multiple of ``alignment`` that is not below ``offset``."""
    return -(-offset // alignment) * alignment
