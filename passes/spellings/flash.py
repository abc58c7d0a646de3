"""flash-attention's operators, of its own package and of torch: dims [B, S, H, D], causal and window aligned bottom right."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from dilcompile.passes.anchors import Attention, Spelling
from dilcompile.passes.facts import Facts
from dilcompile.passes.masks.arithmetic import as_expr
from dilcompile.passes.masks.symbols import K, Q
from dilcompile.passes.masks.terms import Ge0, Truth, conjunction
from dilcompile.passes.operators import shape_of
from dilcompile.passes.spellings.arguments import arguments, first_output, given_scale
from dilcompile.passes.unproven import Unproven

# Arguments that change what is computed in a way that no form covers, by the reason.
_REFUSED = {
    "alibi_slopes": "it adds a bias by slopes",
    "block_table": "its keys stand in pages",
    "seqused_k": "its keys end where a tensor says",
    "leftpad_k": "its keys begin where a tensor says",
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
    for name, reason in _REFUSED.items():
        if given.get(name) is not None:
            raise Unproven(node, reason, "it stays as it is")
    named: dict[str, Any] = {name: next((given[own] for own in names if own in given), None) for name, names in _NAMES.items()}
    if named["starts"] is not None:
        raise Unproven(node, "its sequences are packed end to end", "give them as a batch, or as one row with a document mask")
    softcap = float(given.get("softcap") or 0.0)
    return Attention(
        named["query"],
        named["key"],
        named["value"],
        output,
        given_scale(named, node, facts),
        order="bshd",
        seen=_seen(given, bool(named["causal"]), node, named),
        softcap=softcap or None,
        dropout_p=float(given.get("dropout_p") or 0.0),
        enable_gqa=True,
    )


def _seen(given: dict[str, Any], causal: bool, node: Node, named: dict[str, Any]) -> Truth:
    """The window around ``q + Sk - Sq``; -1 is no limit."""
    window = given.get("window_size") or (given.get("window_size_left"), given.get("window_size_right"))
    left, right = (-1 if side is None else side for side in window)
    if not isinstance(left, int) or not isinstance(right, int):
        raise Unproven(node, "its window is computed in the graph", "give it as a number")
    place = Q + as_expr(shape_of(named["key"])[1]) - as_expr(shape_of(named["query"])[1])
    seen: Truth = True
    if causal or right >= 0:
        seen = Ge0(place + (0 if causal else right) - K)
    if left >= 0:
        seen = conjunction(seen, Ge0(K - place + left))
    return seen


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
