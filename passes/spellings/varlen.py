"""Attention over sequences packed end to end (``varlen_attn``, flash-attention's varlen): one row with documents.

The operator takes documents as ids along the keys; these come as starts (``cu_seqlens``), and the two lists must be one.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from dilcompile.passes.anchors import Attention, Spelling
from dilcompile.passes.facts import Facts
from dilcompile.passes.masks.symbols import K, Q
from dilcompile.passes.masks.terms import Ge0, Truth, conjunction
from dilcompile.passes.spellings.arguments import arguments, first_output, given_scale
from dilcompile.passes.unproven import Unproven

_REFUSED = {
    "alibi_slopes": "it adds a bias by slopes",
    "block_table": "its keys stand in pages",
    "seqused_k": "its keys end where a tensor says",
    "leftpad_k": "its keys begin where a tensor says",
}


def _read(node: Node, facts: Facts) -> Attention | None:
    given, output = arguments(node), first_output(node)
    if output is None:
        return None
    for name, reason in _REFUSED.items():
        if given.get(name) is not None:
            raise Unproven(node, reason, "it stays as it is")
    q, k, v = (given[long] if long in given else given[long[0]] for long in ("query", "key", "value"))
    starts, key_starts = (next(given[name] for name in (f"cu_seqlens_{x}", f"cu_seq_{x}") if name in given) for x in "qk")
    if starts is not key_starts or not isinstance(starts, Node):
        raise Unproven(node, "queries and keys are cut into sequences differently", "it stays as it is")
    scale = given_scale({"scale": given.get("scale", given.get("softmax_scale")), "query": q}, node, facts)
    return Attention(
        q, k, v, output, scale,
        order="shd",
        seen=_seen(given, node),
        softcap=float(given.get("softcap") or 0.0) or None,
        dropout_p=float(given.get("dropout_p") or 0.0),
        enable_gqa=True,
        documents=starts,
    )  # fmt: skip


def _seen(given: dict[str, Any], node: Node) -> Truth:
    """Both lists are one, so that rows and columns of a sequence are the same tokens: top left is bottom right."""
    window = given.get("window_size") or (given.get("window_size_left"), given.get("window_size_right"))
    left, right = (-1 if side is None else side for side in window)
    if not isinstance(left, int) or not isinstance(right, int):
        raise Unproven(node, "its window is computed in the graph", "give it as a number")
    causal = given.get("is_causal") or given.get("causal")
    seen: Truth = True
    if causal or right >= 0:
        seen = Ge0(Q + (0 if causal else right) - K)
    if left >= 0:
        seen = conjunction(seen, Ge0(K - Q + left))
    return seen


VARLEN = Spelling("varlen", frozenset(("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward")), _read, order="shd")
