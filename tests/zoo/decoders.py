"""Text decoders."""

from __future__ import annotations

from typing import Any

from zoo import calls
from zoo.hugging_face import WRITTEN, Family
from zoo.model import Inputs, Setting
from zoo.sizes import FEED_FORWARD, HEAD_DIM, HEADS, KV_HEADS, LAYERS, LONGEST, VOCAB, WIDTH, Options, bert, gpt, llama, without

decoder = Family("decoder", calls.decoder)
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SEVERAL: Options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": FEED_FORWARD}
HYBRID = ["linear_attention", "full_attention"]
LOCAL_THEN_FULL = ["sliding_attention", "full_attention"]


def headed(**more: Any) -> Options:
    return llama(head_dim=HEAD_DIM, **more)


def _no_cache(at: Setting) -> Inputs:
    return {"input_ids": calls.ids(at), "use_cache": False}


LATENT: Options = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

MODELS = (
    decoder("gpt2", "GPT2", gpt()),
    decoder("openai_gpt", "OpenAIGPT", gpt(), inputs=calls.text, ways=WRITTEN, note="a mask that scores are multiplied with"),
    decoder(
        "gpt_neo",
        "GPTNeo",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": LONGEST,
            **ENDS,
        },
        ways=WRITTEN,
        note="no scale, two masks",
    ),
    decoder("gpt_neox", "GPTNeoX", bert(**ENDS)),
    decoder("gpt_neox_japanese", "GPTNeoXJapanese", bert(**ENDS), ways=WRITTEN, note="baddbmm"),
    decoder("gptj", "GPTJ", gpt(rotary_dim=8), ways=WRITTEN),
    decoder(
        "opt",
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
            "word_embed_proj_dim": WIDTH,
            "pad_token_id": 0,
            **ENDS,
        },
    ),
    decoder(
        "bloom",
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "pad_token_id": 0, **ENDS},
        ways=WRITTEN,
        note="ALiBi by baddbmm",
    ),
    decoder(
        "mpt",
        "Mpt",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": LONGEST},
        ways=WRITTEN,
        note="ALiBi",
    ),
    decoder(
        "falcon",
        "Falcon",
        without(bert(multi_query=True, alibi=False, **ENDS), "intermediate_size"),
        note="one key head",
    ),
    decoder("llama", "Llama", llama()),
    decoder("mistral", "Mistral", llama(sliding_window=16)),
    decoder("ministral", "Ministral", headed(sliding_window=16)),
    decoder("mixtral", "Mixtral", llama(num_local_experts=4, sliding_window=None)),
    decoder("qwen2", "Qwen2", llama()),
    decoder("qwen2_swa", "Qwen2", llama(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    decoder("qwen3", "Qwen3", headed()),
    decoder("qwen3_moe", "Qwen3Moe", headed(**SEVERAL)),
    decoder(
        "qwen3_next",
        "Qwen3Next",
        headed(
            **SEVERAL,
            shared_expert_intermediate_size=FEED_FORWARD,
            layer_types=HYBRID,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=HEAD_DIM,
            linear_value_head_dim=HEAD_DIM,
        ),
        note="one linear layer, one gated full one",
    ),
    decoder("gemma", "Gemma", headed()),
    decoder("gemma2", "Gemma2", headed(sliding_window=16), ways=WRITTEN, note="soft cap"),
    decoder("gemma3_text", "Gemma3Text", headed(sliding_window=16, layer_types=LOCAL_THEN_FULL), kind="Model"),
    decoder("phi", "Phi", without(llama(), "num_key_value_heads")),
    decoder("phi3", "Phi3", llama()),
    decoder("phimoe", "Phimoe", llama(num_local_experts=4)),
    decoder("olmoe", "Olmoe", llama(num_experts=4, num_experts_per_tok=2)),
    decoder("cohere", "Cohere", llama()),
    decoder("cohere2", "Cohere2", llama(sliding_window=16, layer_types=LOCAL_THEN_FULL)),
    decoder("stablelm", "StableLm", llama()),
    decoder("starcoder2", "Starcoder2", llama(sliding_window=16)),
    decoder("granite", "Granite", llama(attention_multiplier=0.1), note="its own scale"),
    decoder("granitemoe", "GraniteMoe", llama(num_local_experts=4, num_experts_per_tok=2)),
    decoder("nemotron", "Nemotron", llama()),
    decoder(
        "dbrx",
        "Dbrx",
        lambda: {
            "d_model": WIDTH,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "max_seq_len": LONGEST,
            "vocab_size": VOCAB,
            "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": FEED_FORWARD, "moe_num_experts": 4, "moe_top_k": 2},
            "pad_token_id": 0,
            **ENDS,
        },
        note="graph breaks",
    ),
    decoder(
        "jetmoe",
        "JetMoe",
        without(llama(kv_channels=HEAD_DIM, num_local_experts=4), "num_attention_heads"),
        note="a mixture of heads",
    ),
    decoder(
        "xglm",
        "XGLM",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "num_layers": LAYERS,
            "attention_heads": HEADS,
            "ffn_dim": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
            "pad_token_id": 0,
            **ENDS,
        },
        ways=WRITTEN,
        note="scores cut off from below",
    ),
    decoder(
        "ctrl",
        "CTRL",
        without(gpt(dff=FEED_FORWARD), *ENDS),
        ways=WRITTEN,
        note="graph break",
    ),
    decoder(
        "gpt_oss",
        "GptOss",
        headed(sliding_window=16, num_local_experts=4, num_experts_per_tok=2, layer_types=LOCAL_THEN_FULL),
        ways=WRITTEN,
        note="sinks concatenated",
    ),
    decoder(
        "llama4_text",
        "Llama4Text",
        headed(
            intermediate_size_mlp=FEED_FORWARD,
            num_local_experts=4,
            attention_chunk_size=16,
            no_rope_layers=[1, 0],
            layer_types=["chunked_attention", "full_attention"],
        ),
        note="chunks",
    ),
    decoder("smollm3", "SmolLM3", llama()),
    decoder("glm", "Glm", headed()),
    decoder("glm4", "Glm4", headed()),
    decoder("helium", "Helium", headed()),
    decoder("nanochat", "NanoChat", llama()),
    decoder("seed_oss", "SeedOss", headed()),
    decoder("arcee", "Arcee", llama()),
    decoder("ernie4_5", "Ernie4_5", llama()),
    decoder(
        "deepseek_v3",
        "DeepseekV3",
        llama(
            **LATENT,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            moe_intermediate_size=FEED_FORWARD,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
        ),
        note="latent heads, values of another size",
    ),
    decoder("minicpm3", "MiniCPM3", llama(**LATENT), note="latent heads"),
    decoder(
        "recurrent_gemma",
        "RecurrentGemma",
        without(
            bert(attention_window_size=16, lru_width=WIDTH, block_types=["recurrent", "attention"]),
            "max_position_embeddings",
        ),
        note="hybrid",
    ),
    decoder(
        "mamba",
        "Mamba",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8},
        inputs=_no_cache,
        ways=WRITTEN,
        attention=False,
        note="no attention",
    ),
    decoder("moshi", "Moshi", headed(ffn_dim=FEED_FORWARD, sliding_window=16, audio_vocab_size=64)),
    decoder(
        "minimax",
        "MiniMax",
        headed(num_local_experts=4, layer_types=HYBRID, block_size=16),
        note="one linear layer, one full one",
    ),
    decoder(
        "modernbert_decoder",
        "ModernBertDecoder",
        bert(local_attention=16, pad_token_id=0, cls_token_id=1, sep_token_id=2, **ENDS),
    ),
)
