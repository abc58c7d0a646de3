"""The kernels behind ``scaled_dot_product_attention``, called by their own names."""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.finding.anchors import Attention, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.arguments import arguments, causal, first_output, given_scale, mask_of
from dilcompile.passes.graph.operators import op_name, shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.unproven import Unproven

_TOP_LEFT = frozenset(("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"))
_KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _read(node: Node, facts: Facts) -> Attention | None:
    given, output = arguments(node), first_output(node)
    if output is None:
        return None
    if given.get("dropout_mask") is not None:
        raise Unproven(node, "the dropout mask is given", "it stays as it is")
    square = same_size(shape_of(given["query"])[-2], shape_of(given["key"])[-2])
    if given["is_causal"] and not square and op_name(node) not in _TOP_LEFT:
        raise Unproven(node, "the kernel does not say how a causal mask of unequal lengths is aligned", "give the mask itself")
    mask = given["attn_mask"] if "attn_mask" in given else given.get("attn_bias")
    return Attention(
        given["query"],
        given["key"],
        given["value"],
        output,
        given_scale(given, node, facts),
        masks=mask_of(mask, output),
        seen=causal(given["is_causal"]),
        dropout_p=float(given["dropout_p"]),
        enable_gqa=bool(given.get("enable_gqa", False)),
        empty="zero" if op_name(node) in _TOP_LEFT else "odd",
    )


FUSED_SDPA = Spelling("fused sdpa", frozenset(f"aten::{kernel}" for kernel in _KERNELS), _read, order="bhsd")
