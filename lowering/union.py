"""What a kernel that computes a whole relation in one pass, pair by pair, leaves to others."""

from __future__ import annotations

import math

from dilcompile.lowering.call import Call


def beyond_union(call: Call, backward: bool) -> str | None:
    """The part of the call that is no matter of which pairs count, how often and with what bias, or None."""
    if call.pairs is not None:
        return "a formula over pairs"
    if call.flat:
        return "flat scores"
    if backward and call.merge_grad == "detach":
        return "merge_grad 'detach', which needs each branch's own output"
    return None if math.isfinite(call.scale) else f"scale {call.scale}"
