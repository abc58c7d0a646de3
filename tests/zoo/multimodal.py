"""Models of images and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo import calls
from zoo.hugging_face import WRITTEN, Family
from zoo.model import Inputs, Model, Setting
from zoo.sizes import FEED_FORWARD, HEAD_DIM, HEADS, LAYERS, LONGEST, VOCAB, WIDTH, Options, bert, llama, vit

multimodal = Family("multimodal", calls.image_and_text)
TEXT: Options = bert(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
IMAGE_TOKEN = 4


def _dual(**more: Any) -> Options:
    return {"text_config": dict(TEXT), "vision_config": vit(), **more}


def _with_image_tokens(count: int, types: int | None = None) -> Callable[[Setting], Inputs]:
    """Text whose first tokens stand for the image; ``types``: how many belong to the prefix that sees itself whole."""

    def call(at: Setting) -> Inputs:
        words = calls.ids(at)
        words[:, 2 : 2 + count] = IMAGE_TOKEN
        made = {"input_ids": words, "pixel_values": calls.pixels(at), "use_cache": False, **calls.padding(at)}
        if types is not None:
            made["token_type_ids"] = (torch.arange(at.seq) >= types).long().expand(at.batch, -1).contiguous()
        return made

    return call


def _git() -> Options:
    return {**TEXT, "vision_config": vit()}


def _visual_bert(at: Setting) -> Inputs:
    seen = torch.ones(at.batch, 10)
    return {**calls.text(at), "visual_embeds": calls.features(at, 10, 32), "visual_attention_mask": seen}


def _llava() -> Options:
    import transformers

    return {
        "vision_config": transformers.CLIPVisionConfig(**vit(patch_size=8)),
        "text_config": transformers.LlamaConfig(**llama()),
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
    }


def _paligemma() -> Options:
    return {
        "vision_config": {"model_type": "siglip_vision_model", **vit(patch_size=8), "projection_dim": WIDTH},
        "text_config": {"model_type": "gemma", **llama(head_dim=HEAD_DIM)},
        "image_token_id": IMAGE_TOKEN,
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
    }


def _mllama() -> tuple[Any, str]:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return MllamaTextConfig(**llama(cross_attention_layers=[1], rope_parameters=rope)), "MllamaTextModel"


def _beside_an_image(name: str) -> Callable[[Setting], Inputs]:
    return lambda at: {**calls.text(at), name: calls.features(at, 20, WIDTH), "use_cache": False}


MODELS = (
    multimodal("clip", "CLIP", _dual(projection_dim=32)),
    multimodal("chinese_clip", "ChineseCLIP", _dual(projection_dim=32)),
    multimodal("owlvit", "OwlViT", _dual(projection_dim=32)),
    multimodal(
        "git",
        "Git",
        _git,
        inputs=lambda at: {"input_ids": calls.ids(at), "pixel_values": calls.pixels(at), "use_cache": False},
        ways=WRITTEN,
        note="prefix",
    ),
    multimodal(
        "flava",
        "Flava",
        lambda: {
            "image_config": vit(),
            "text_config": dict(TEXT),
            "multimodal_config": {
                "hidden_size": WIDTH,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "intermediate_size": FEED_FORWARD,
            },
            "hidden_size": WIDTH,
            "projection_dim": 32,
        },
        ways=WRITTEN,
    ),
    multimodal("visual_bert", "VisualBert", bert(visual_embedding_dim=32), inputs=_visual_bert, ways=WRITTEN),
    multimodal(
        "perceiver",
        "Perceiver",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 32,
            "v_channels": 32,
        },
        inputs=lambda at: {"inputs": calls.features(at, at.seq, 32)},
        ways=WRITTEN,
        note="learned latents",
    ),
    multimodal("llava", "Llava", _llava, inputs=_with_image_tokens(16)),
    multimodal("paligemma", "PaliGemma", _paligemma, inputs=_with_image_tokens(16, types=20), note="prefix"),
    Model(
        "mllama_text",
        "multimodal",
        _mllama,
        _beside_an_image("cross_attention_states"),
        note="cross attention to the image",
    ),
    multimodal(
        "trocr",
        "TrOCR",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "decoder_layers": LAYERS,
            "decoder_attention_heads": HEADS,
            "decoder_ffn_dim": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
            "is_decoder": True,
            "cross_attention_hidden_size": WIDTH,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        kind="ForCausalLM",
        inputs=_beside_an_image("encoder_hidden_states"),
        ways=WRITTEN,
    ),
)
