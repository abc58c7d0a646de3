"""Models of images and videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo import calls
from zoo.calls import image
from zoo.hugging_face import WRITTEN, Family
from zoo.model import Inputs, Model, Setting
from zoo.sizes import FEED_FORWARD, HEADS, WIDTH, Options, both_sides, vit, without

vision = Family("vision", image())
PYRAMID: Options = {"hidden_sizes": [16, 32, 32, 64], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
SWIN: Options = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip


def _sam() -> Options:
    return {
        "vision_config": {
            "hidden_size": WIDTH,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": FEED_FORWARD,
            "num_pos_feats": 16,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 4, "mask_input_channels": 4},
        "mask_decoder_config": {
            "hidden_size": 32,
            "mlp_dim": FEED_FORWARD,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    }


def _with_points(at: Setting) -> Inputs:
    points = torch.rand(at.batch, 1, 2, 2, generator=torch.Generator().manual_seed(4)) * 32
    return {"pixel_values": calls.pixels(at), "input_points": points}


def _detr(stages: tuple[str, ...] = ("stage4",), **more: Any) -> Callable[[], Options]:
    def options() -> Options:
        import transformers

        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=list(stages)
        )
        kept = {"use_timm_backbone": False, "use_pretrained_backbone": False}
        return {"backbone_config": backbone, "d_model": WIDTH, **both_sides(), "num_queries": 12, **kept, **more}

    return options


def _rt_detr() -> Options:
    import transformers

    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        layer_type="basic",
    )
    return {
        "backbone_config": backbone,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 24, 32],
        "encoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "d_model": 32,
        "num_queries": 12,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 64,
        "decoder_attention_heads": 4,
        "decoder_layers": 2,
        "num_denoising": 0,
    }


def _masked_image(at: Setting) -> Inputs:
    return {"pixel_values": calls.pixels(at, 128), "pixel_mask": torch.ones(at.batch, 128, 128, dtype=torch.long)}


MODELS: tuple[Model, ...] = (
    vision("vit", "ViT", vit()),
    vision("vit_msn", "ViTMSN", vit()),
    vision("ijepa", "IJepa", vit()),
    vision("dinov2", "Dinov2", without(vit(mlp_ratio=2), "intermediate_size")),
    vision("dinov3_vit", "DINOv3ViT", vit()),
    vision("beit", "Beit", vit(use_relative_position_bias=True), note="bias table"),
    vision("data2vec_vision", "Data2VecVision", vit(use_relative_position_bias=True), note="bias table"),
    vision("yolos", "Yolos", vit(image_size=[32, 32], num_detection_tokens=5)),
    vision("swin", "Swin", SWIN, note="windows in the batch, bias table"),
    vision("swinv2", "Swinv2", SWIN, ways=WRITTEN, note="cosine scores, learned scale"),
    vision("donut_swin", "DonutSwin", SWIN, ways=WRITTEN),
    vision(
        "swin2sr",
        "Swin2SR",
        {"image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
        inputs=image(16),
        ways=WRITTEN,
        note="cosine scores, learned scale",
    ),
    vision(
        "hiera",
        "Hiera",
        {
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
        ways=WRITTEN,
        note="units of a mask, queries pooled",
    ),
    vision("pvt_v2", "PvtV2", {"image_size": 64, **PYRAMID}, inputs=image(64), ways=WRITTEN),
    vision("segformer", "Segformer", PYRAMID, inputs=image(64)),
    vision("glpn", "GLPN", PYRAMID, inputs=image(64), ways=WRITTEN),
    vision(
        "mobilevit",
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 80]},
        inputs=image(64),
        ways=WRITTEN,
    ),
    vision("vivit", "Vivit", without(vit(num_frames=4, tubelet_size=[2, 8, 8]), "patch_size"), inputs=image(32, 4)),
    vision("videomae", "VideoMAE", vit(num_frames=4, tubelet_size=2, patch_size=8), inputs=image(32, 4)),
    vision("timesformer", "Timesformer", vit(num_frames=4, patch_size=8), inputs=image(32, 4), ways=WRITTEN),
    vision("vitpose_backbone", "VitPoseBackbone", vit(image_size=[32, 32], patch_size=[8, 8]), kind=""),
    vision("siglip_vision", "SiglipVision", vit(), note="pooled by a learned query"),
    vision("clip_vision", "CLIPVision", vit()),
    vision("sam", "Sam", _sam, inputs=_with_points, note="decomposed relative positions"),
    vision("detr", "Detr", _detr(), inputs=_masked_image),
    vision("conditional_detr", "ConditionalDetr", _detr(), inputs=_masked_image, note="values of another size"),
    vision(
        "deformable_detr",
        "DeformableDetr",
        _detr(("stage2", "stage3", "stage4"), num_feature_levels=4),
        inputs=_masked_image,
    ),
    vision("rt_detr", "RTDetr", _rt_detr, inputs=image(64)),
    vision(
        "levit",
        "Levit",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "mlp_ratio": [2, 2, 2],
            "attention_ratio": [2, 2, 2],
            "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 6, 4, 2, 2]],
        },
        inputs=image(64),
        ways=WRITTEN,
        note="values of another size, bias table",
    ),
    vision(
        "groupvit_vision",
        "GroupViTVision",
        {
            "hidden_size": WIDTH,
            "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 0],
            "image_size": 32,
            "patch_size": 4,
        },
        ways=WRITTEN,
        note="also a softmax over the groups, which is no attention",
    ),
)
