"""Models of sound, and of time series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo import calls
from zoo.hugging_face import WRITTEN, Family
from zoo.model import Inputs, Setting
from zoo.sizes import FEED_FORWARD, HEADS, LAYERS, LONGEST, VOCAB, WIDTH, Options, bart, bert, both_sides

audio = Family("audio", calls.wave)
series = Family("timeseries", lambda at: _values(at))


def _wave2vec(**more: Any) -> Options:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "conv_dim": [16, 16, 16],
        "conv_stride": [5, 4, 4],
        "conv_kernel": [8, 3, 3],
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 3,
        "vocab_size": VOCAB,
        "apply_spec_augment": False,
        **more,
    }


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _speech(bands: int, length: int) -> calls.Call:
    """Spectrogram frames, padded, and the words said so far."""

    def call(at: Setting) -> Inputs:
        return {
            "input_features": calls.features(at, length, bands),
            "attention_mask": calls.keep(at, length),
            "decoder_input_ids": calls.ids(at),
            "use_cache": False,
        }

    return call


def _seamless() -> Options:
    speech = {"layers": LAYERS, "attention_heads": HEADS, "intermediate_size": FEED_FORWARD}
    return {
        "vocab_size": VOCAB,
        "t2u_vocab_size": VOCAB,
        "char_vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "max_position_embeddings": LONGEST,
        **both_sides(),
        **{f"speech_encoder_{name}": value for name, value in speech.items()},
        "feature_projection_input_dim": 20,
        "num_adapter_layers": 1,
        "adaptor_kernel_size": 8,
        "adaptor_stride": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _values(at: Setting) -> Inputs:
    return {
        "past_values": _drawn(at.batch, 31),
        "past_time_features": _drawn(at.batch, 31, 1),
        "past_observed_mask": torch.ones(at.batch, 31),
        "future_values": _drawn(at.batch, 8),
        "future_time_features": _drawn(at.batch, 8, 1),
        "use_cache": False,
    }


SERIES: Options = {
    "prediction_length": 8,
    "context_length": 24,
    "lags_sequence": [1, 2, 3, 7],
    "num_time_features": 1,
    "d_model": WIDTH,
    **both_sides(),
    "cardinality": [0],
}

MODELS = (
    audio("wav2vec2", "Wav2Vec2", _wave2vec(), note="mask written in place"),
    audio("unispeech", "UniSpeech", _wave2vec()),
    audio("sew", "SEW", _wave2vec(squeeze_factor=2)),
    audio(
        "whisper",
        "Whisper",
        bart(
            num_mel_bins=16,
            max_source_positions=40,
            max_target_positions=64,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        inputs=lambda at: {
            "input_features": _drawn(at.batch, 16, 80),
            "decoder_input_ids": calls.ids(at),
            "use_cache": at.cache,
        },
    ),
    audio(
        "speech_to_text",
        "Speech2Text",
        bart(
            input_feat_per_channel=16,
            input_channels=1,
            conv_channels=32,
            num_conv_layers=2,
            max_source_positions=100,
            max_target_positions=64,
        ),
        inputs=_speech(16, 80),
        ways=WRITTEN,
    ),
    audio(
        "musicgen_melody_decoder",
        "MusicgenMelodyDecoder",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
            "num_codebooks": 2,
            "pad_token_id": 127,
            "bos_token_id": 127,
        },
        kind=".MusicgenMelodyModel",
        inputs=lambda at: {
            "input_ids": calls.ids(at, batch=at.batch * 2),
            "attention_mask": calls.keep(at),
            "use_cache": False,
        },
    ),
    audio("seamless_m4t_v2_s2t", "SeamlessM4Tv2", _seamless, kind="ForSpeechToText", inputs=_speech(20, 48)),
    audio(
        "bark_semantic",
        "BarkSemantic",
        {
            "input_vocab_size": VOCAB,
            "output_vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "block_size": 64,
        },
        inputs=calls.decoder,
        ways=WRITTEN,
    ),
    audio(
        "speecht5_enc",
        "SpeechT5",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            **both_sides(),
            "decoder_layers": 1,
            "max_text_positions": 64,
            "encoder_max_relative_position": 16,
        },
        kind="EncoderWithTextPrenet",
        inputs=lambda at: {"input_values": calls.ids(at), "attention_mask": calls.keep(at)},
        ways=WRITTEN,
        note="two products summed",
    ),
    audio(
        "clap_audio",
        "ClapAudio",
        {
            "window_size": 4,
            "num_mel_bins": 16,
            "spec_size": 64,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "patch_embeds_hidden_size": 16,
            "num_classes": 4,
            "hidden_size": 32,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
            "enable_fusion": False,
            "num_hidden_layers": 2,
        },
        inputs=lambda at: {"input_features": _drawn(at.batch, 1, 64, 16)},
        ways=WRITTEN,
    ),
    audio("clap_text", "ClapText", bert(), inputs=calls.text, ways=WRITTEN),
    audio(
        "parakeet_encoder",
        "ParakeetEncoder",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "intermediate_size": FEED_FORWARD,
            "num_mel_bins": 16,
            "subsampling_factor": 4,
            "subsampling_conv_channels": 16,
            "conv_kernel_size": 9,
            "max_position_embeddings": 128,
        },
        kind=".ParakeetEncoder",
        inputs=lambda at: {"input_features": calls.features(at, 96, 16), "attention_mask": calls.keep(at, 96)},
    ),
    series("time_series_transformer", "TimeSeriesTransformer", SERIES, ways=WRITTEN),
    series(
        "informer",
        "Informer",
        {**SERIES, "attention_type": "prob", "sampling_factor": 3},
        ways=WRITTEN,
        note="queries chosen by the data",
    ),
    series(
        "patchtst",
        "PatchTST",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "ffn_dim": FEED_FORWARD,
        },
        inputs=lambda at: {"past_values": _drawn(at.batch, 32, 3)},
    ),
)
