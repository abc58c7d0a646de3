"""Sizes of the small models, chosen so that axes can be told apart by them, and the options that many configurations share.

Batch 2, 4 heads (2 of keys), head size 16, width 64, 48 tokens.
"""

from __future__ import annotations

from typing import Any

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS, LONGEST = 128, 64, 4, 2, 16, 128, 2, 256

Options = dict[str, Any]


def bert(**more: Any) -> Options:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": LONGEST,
        **more,
    }


def llama(**more: Any) -> Options:
    return bert(num_key_value_heads=KV_HEADS, pad_token_id=0, bos_token_id=1, eos_token_id=2) | more


def gpt(**more: Any) -> Options:
    names = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LONGEST}
    return {**names, "bos_token_id": 1, "eos_token_id": 2, **more}


def t5(**more: Any) -> Options:
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": HEAD_DIM,
        "d_ff": FEED_FORWARD,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 8,
        **more,
    }


def bart(**more: Any) -> Options:
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        **both_sides(),
        "max_position_embeddings": LONGEST,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
        **more,
    }


def both_sides() -> Options:
    """Encoder and decoder alike, as BART, DETR and the time-series models name it."""
    sides = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FEED_FORWARD}
    return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}


def vit(**more: Any) -> Options:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "image_size": 32,
        "patch_size": 4,
        **more,
    }


def without(options: Options, *names: str) -> Options:
    return {name: value for name, value in options.items() if name not in names}
