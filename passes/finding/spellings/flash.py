"""flash-attention's operators, of its own package and of torch: dims [B, S, H, D], causal and window aligned bottom right."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from dilcompile.passes.finding.anchors import Attention, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.arguments import NOT_COVERED, arguments, first_output, given_scale, refuse, window_around
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.arithmetic import as_expr
from dilcompile.passes.masks.symbols import Q

_REFUSED = {
    **NOT_COVERED,
    "q_descale": "its operands are quantised",
    "k_descale": "its operands are quantised",
    "v_descale": "its operands are quantised",
    "k_new": "it writes to a cache",
    "qv": "its queries have a second part",
}
# The names that one argument has in the several packages.
_NAMES = {
    "query": ("q", "query"),
    "key": ("k", "key"),
    "value": ("v", "value"),
    "scale": ("softmax_scale", "scale"),
    "causal": ("causal", "is_causal"),
    "starts": ("cu_seqlens_q", "cum_seq_q"),
}


def _read(node: Node, facts: Facts) -> Attention | None:
    given, output = arguments(node), first_output(node)
    if output is None:
        return None
    refuse(node, given, _REFUSED)
    named: dict[str, Any] = {name: next((given[own] for own in names if own in given), None) for name, names in _NAMES.items()}
    if named["starts"] is not None:
        raise Unproven(node, "its sequences are packed end to end", "give them as a batch, or as one row with a document mask")
    softcap = float(given.get("softcap") or 0.0)
    # Aligned bottom right.
    place = Q + as_expr(shape_of(named["key"])[1]) - as_expr(shape_of(named["query"])[1])
    return Attention(
        named["query"],
        named["key"],
        named["value"],
        output,
        given_scale(named, node, facts),
        order="bshd",
        seen=window_around(place, given, bool(named["causal"]), node),
        softcap=softcap or None,
        dropout_p=float(given.get("dropout_p") or 0.0),
        enable_gqa=True,
    )


FLASH = Spelling(
    "flash",
    frozenset(
        (
            "aten::_flash_attention_forward",
            "flash_attn::_flash_attn_forward",
            "flash_attn_3::fwd",
            "flash_attn_3::_flash_attn_forward",
        )
    ),
    _read,
    order="bshd",
)
