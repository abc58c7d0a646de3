"""Encoder-decoder models of text."""

from __future__ import annotations

from zoo import calls
from zoo.hugging_face import WRITTEN, Family
from zoo.sizes import HEAD_DIM, LONGEST, VOCAB, bart, llama, t5

seq2seq = Family("seq2seq", calls.seq2seq)


def _gemma() -> dict[str, object]:
    side = llama(head_dim=HEAD_DIM, sliding_window=16)
    return {"encoder": dict(side), "decoder": dict(side), "vocab_size": VOCAB}


MODELS = (
    seq2seq("t5", "T5", t5(), note="relative position buckets"),
    seq2seq("umt5", "UMT5", t5(), note="buckets in each layer"),
    seq2seq(
        "longt5_tglobal",
        "LongT5",
        t5(local_radius=7, global_block_size=4, encoder_attention_type="transient-global"),
        ways=WRITTEN,
        note="blocks and global tokens",
    ),
    seq2seq("bart", "Bart", bart()),
    seq2seq("mbart", "MBart", bart()),
    seq2seq(
        "pegasus_x",
        "PegasusX",
        bart(num_global_tokens=8, block_size=16, stagger_local_blocks=True),
        ways=WRITTEN,
        note="score parts concatenated",
    ),
    seq2seq("m2m_100", "M2M100", bart()),
    seq2seq(
        "led",
        "LED",
        bart(attention_window=[16, 16], max_encoder_position_embeddings=LONGEST, max_decoder_position_embeddings=LONGEST),
        ways=WRITTEN,
        note="a band written in slices",
    ),
    seq2seq("bigbird_pegasus", "BigBirdPegasus", bart(attention_type="original_full"), ways=WRITTEN),
    seq2seq(
        "bigbird_pegasus_sparse",
        "BigBirdPegasus",
        bart(attention_type="block_sparse", block_size=4, num_random_blocks=2),
        ways=WRITTEN,
        note="block sparse",
    ),
    seq2seq("t5gemma", "T5Gemma", _gemma, ways=WRITTEN, note="soft cap, band"),
)
