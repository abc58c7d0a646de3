"""The partition of a joint graph by a budget, as Inductor asks for it. Imports Inductor: only where it compiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx import GraphModule

from dilcompile.passes.memory.climb import Climb


class Partitioner(CustomPartitionerFn):
    """Takes the first rung that fits. To Inductor's cache all are alike: the graphs that it is given differ as the rungs do."""

    def __init__(self, climb: Climb) -> None:
        self._climb = climb

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[Any], **options: Any) -> tuple[GraphModule, GraphModule]:
        """See ``Climb.split``."""
        return self._climb.split(gm, joint_inputs, **options)

    def uuid(self) -> str:
        """See ``CustomPartitionerFn``."""
        return "dilcompile.budget"

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (self.uuid(),))
