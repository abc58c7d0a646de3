"""``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.finding.anchors import Attention, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.arguments import arguments, causal, given_scale, mask_of


def _read(node: Node, facts: Facts) -> Attention:
    given = arguments(node)
    return Attention(
        given["query"],
        given["key"],
        given["value"],
        node,
        given_scale(given, node, facts),
        masks=mask_of(given["attn_mask"], node),
        seen=causal(given["is_causal"]),
        dropout_p=float(given["dropout_p"]),
        enable_gqa=bool(given["enable_gqa"]),
    )


SDPA = Spelling("sdpa", frozenset(("aten::scaled_dot_product_attention",)), _read, order="bhsd")
