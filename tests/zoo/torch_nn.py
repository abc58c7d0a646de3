"""The attention of torch.nn, in its options."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo import calls
from zoo.calls import Call, hidden
from zoo.model import Inputs, Model, Setting
from zoo.sizes import FEED_FORWARD, HEADS, LAYERS, WIDTH

Mask = Literal["bool", "float", "is_causal"]


def _padded(at: Setting) -> Inputs:
    return {**hidden(at), "padding": calls.keep(at) == 0}


def _source_and_target(at: Setting) -> Inputs:
    return {"source": calls.features(at, 40, WIDTH), "target": calls.features(at, at.seq, WIDTH)}


class Attentions(nn.Module):
    """Layers of ``nn.MultiheadAttention`` one after the other."""

    def __init__(self, mask: Mask | None = None, need_weights: bool = False, layers: int = LAYERS, **options: Any) -> None:
        super().__init__()
        made = (nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}) for _ in range(layers))
        self.layers = nn.ModuleList(made)
        self.mask, self.need_weights = mask, need_weights

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        mask: Tensor | None = None
        if self.mask == "bool":
            mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        elif self.mask is not None:
            mask = nn.Transformer.generate_square_subsequent_mask(length)
        for layer in self.layers:
            x, _ = layer(
                x,
                x,
                x,
                attn_mask=mask,
                key_padding_mask=padding,
                need_weights=self.need_weights,
                is_causal=self.mask == "is_causal",
            )
        return x


class Encoder(nn.Module):
    def __init__(self, nested: bool = False, causal: bool = False, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=nested)
        self.causal = causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, FEED_FORWARD, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.decoder(target, source, tgt_mask=mask, tgt_is_causal=True)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, FEED_FORWARD, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


def entry(name: str, kind: type[nn.Module], inputs: Call = hidden, note: str = "", **options: Any) -> Model:
    return Model(name, "torch_nn", lambda: kind(**options), inputs, ("native",), note=note)


MODELS = (
    entry("nn_mha", Attentions),
    entry("nn_mha_need_weights", Attentions, need_weights=True),
    entry("nn_mha_causal_bool", Attentions, mask="bool"),
    entry("nn_mha_causal_float", Attentions, mask="float"),
    entry("nn_mha_is_causal", Attentions, mask="is_causal"),
    entry("nn_mha_vdim", Attentions, layers=1, kdim=WIDTH, vdim=WIDTH),
    entry("nn_mha_padded", Attentions, _padded),
    entry("nn_mha_zero_attn", Attentions, add_zero_attn=True, note="a key of zeros at the end"),
    entry("nn_mha_bias_kv", Attentions, add_bias_kv=True, note="a learned key at the end"),
    entry("nn_mha_sequence_first", Attentions, batch_first=False, note="[S, B, E]"),
    entry("nn_encoder", Encoder, note="one fused operator a layer in eval mode"),
    entry("nn_encoder_norm_first", Encoder, norm_first=True),
    entry("nn_encoder_causal", Encoder, causal=True),
    entry("nn_encoder_kpm", Encoder, _padded),
    entry("nn_encoder_kpm_nested", Encoder, _padded, nested=True, note="nested tensors"),
    entry("nn_decoder", Decoder, _source_and_target, note="self and cross attention"),
    entry("nn_transformer", Whole, _source_and_target, note="encoder, decoder and cross attention"),
)
