"""Text encoders."""

from __future__ import annotations

from zoo import calls
from zoo.hugging_face import WRITTEN, Family
from zoo.model import Inputs, Setting
from zoo.sizes import FEED_FORWARD, HEAD_DIM, HEADS, LAYERS, LONGEST, VOCAB, WIDTH, bert, llama

encoder = Family("encoder", calls.text)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def _ids(at: Setting) -> Inputs:
    return {"input_ids": calls.ids(at)}


MODELS = (
    encoder("bert", "Bert", bert()),
    encoder("roberta", "Roberta", bert()),
    encoder(
        "distilbert",
        "DistilBert",
        {
            "vocab_size": VOCAB,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
        },
    ),
    encoder("albert", "Albert", bert(embedding_size=32), note="one layer's weights for all"),
    encoder("electra", "Electra", bert(embedding_size=32)),
    encoder(
        "deberta_v2",
        "DebertaV2",
        bert(
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=32,
            max_relative_positions=64,
            share_att_key=True,
        ),
        ways=WRITTEN,
        note="several products summed; queries padded too",
    ),
    encoder("ernie", "Ernie", bert()),
    encoder("modernbert", "ModernBert", bert(local_attention=16, global_attn_every_n_layers=2, **TOKENS), note="band"),
    encoder("eurobert", "EuroBert", llama()),
    encoder("mobilebert", "MobileBert", bert(embedding_size=32, intra_bottleneck_size=WIDTH, true_hidden_size=WIDTH)),
    encoder("convbert", "ConvBert", bert(embedding_size=32), ways=WRITTEN, note="beside a kernel that a softmax makes"),
    encoder("longformer", "Longformer", bert(attention_window=16), ways=WRITTEN, note="a band written in slices"),
    encoder("big_bird_full", "BigBird", bert(attention_type="original_full"), ways=WRITTEN),
    encoder(
        "big_bird_sparse",
        "BigBird",
        bert(attention_type="block_sparse", block_size=4, num_random_blocks=2),
        ways=WRITTEN,
        note="block sparse, score parts concatenated",
    ),
    encoder(
        "nystromformer",
        "Nystromformer",
        bert(num_landmarks=8, segment_means_seq_len=48),
        inputs=_ids,
        ways=WRITTEN,
        attention=False,
        note="three softmaxes around a pseudo-inverse",
    ),
    encoder("rembert", "RemBert", bert(input_embedding_size=32, output_embedding_size=32), ways=WRITTEN),
    encoder(
        "xlm",
        "XLM",
        {"vocab_size": VOCAB, "emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": LONGEST},
        ways=WRITTEN,
        note="mask filled in place",
    ),
    encoder("ibert", "IBert", bert(quant_mode=False), ways=WRITTEN),
    encoder("layoutlm", "LayoutLM", bert()),
    encoder("esm", "Esm", bert(position_embedding_type="rotary", pad_token_id=1, mask_token_id=3)),
    encoder("bert_generation", "BertGeneration", bert(), kind="Encoder"),
    encoder("splinter", "Splinter", bert(), ways=WRITTEN),
    encoder("data2vec_text", "Data2VecText", bert()),
    encoder(
        "xlnet",
        "XLNet",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "d_inner": FEED_FORWARD,
            "use_mems_eval": False,
        },
        ways=WRITTEN,
        note="two products summed, one shifted",
    ),
    encoder("yoso", "Yoso", bert(), ways=WRITTEN, attention=False, note="no softmax"),
    encoder(
        "fnet",
        "FNet",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "intermediate_size": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
        },
        inputs=_ids,
        ways=WRITTEN,
        attention=False,
        note="Fourier transforms",
    ),
    encoder(
        "canine",
        "Canine",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": FEED_FORWARD,
            "max_position_embeddings": LONGEST,
            "local_transformer_stride": 16,
            "num_hash_functions": 4,
            "num_hash_buckets": 64,
        },
        ways=WRITTEN,
        note="chunks one by one",
    ),
    encoder(
        "reformer",
        "Reformer",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "attention_head_size": HEAD_DIM,
            "num_attention_heads": HEADS,
            "attn_layers": ["local", "lsh"],
            "num_hidden_layers": 2,
            "feed_forward_size": FEED_FORWARD,
            "axial_pos_shape": [8, 6],
            "axial_pos_embds_dim": [32, 32],
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
            "num_buckets": 2,
            "is_decoder": False,
            "max_position_embeddings": 48,
            "hash_seed": 0,
        },
        ways=WRITTEN,
        note="logsumexp form, random hashes",
    ),
)
