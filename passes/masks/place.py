"""Where in the graph a mask's data can be read again."""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.graph.mutations import Mutations
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.read import ReadMask


def place_of(mask: ReadMask, output: Node, mutations: Mutations) -> Node:
    """The last node up to the output before which all tensors of the mask hold what was read off them.

    A cache counts its tokens in place: the mask was made from the count before, the attention runs after it.

    Raises:
        Unproven: if there is none.
    """
    place, position = output, mutations.position
    local = [source for source in mask.sources if source.graph is output.graph]
    for source in local:
        for write in mutations.writes(source, source, output):
            if source in mask.late:
                raise Unproven(source, "a mask is written in place before the attention ends", "write it out of place")
            place = min(place, write, key=position.__getitem__)
    for source in local:
        if position[source] >= position[place]:
            raise Unproven(source, "a mask is made of tensors before and after they are written in place", "write out of place")
    return place
