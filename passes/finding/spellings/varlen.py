"""Attention over sequences packed end to end (``varlen_attn``, flash-attention's varlen): one row with documents.

The operator takes documents as ids along the keys; these come as starts (``cu_seqlens``), and the two lists must be one.
"""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.finding.anchors import Attention, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.arguments import NOT_COVERED, arguments, first_output, given_scale, refuse, window_around
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.symbols import Q


def _read(node: Node, facts: Facts) -> Attention | None:
    given, output = arguments(node), first_output(node)
    if output is None:
        return None
    refuse(node, given, NOT_COVERED)
    q, k, v = (given[long] if long in given else given[long[0]] for long in ("query", "key", "value"))
    starts, key_starts = (next(given[name] for name in (f"cu_seqlens_{x}", f"cu_seq_{x}") if name in given) for x in "qk")
    if starts is not key_starts or not isinstance(starts, Node):
        raise Unproven(node, "queries and keys are cut into sequences differently", "it stays as it is")
    scale = given_scale({"scale": given.get("scale", given.get("softmax_scale")), "query": q}, node, facts)
    return Attention(
        q, k, v, output, scale,
        order="shd",
        # Both lists are one, so that rows and columns of a sequence are the same tokens: top left is bottom right.
        seen=window_around(Q, given, bool(given.get("is_causal") or given.get("causal")), node),
        softcap=float(given.get("softcap") or 0.0) or None,
        dropout_p=float(given.get("dropout_p") or 0.0),
        enable_gqa=True,
        documents=starts,
    )  # fmt: skip


VARLEN = Spelling("varlen", frozenset(("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward")), _read, order="shd")
