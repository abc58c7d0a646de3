"""Static buffer plans: which memory each buffer of a graph has, decided before the graph runs."""

from dilcompile.memory.buffer import Buffer
from dilcompile.memory.plan import Arena, BufferPlan, plan_buffers

__all__ = ["Arena", "Buffer", "BufferPlan", "plan_buffers"]
