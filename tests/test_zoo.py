"""The zoo: every attention of every model is found and classified, and what is rewritten still computes the same.

The default lane runs a sample of diverse models, ``--slow`` all of them. ``docs/zoo.md`` is the same measurement, written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from zoo import ZOO
from zoo.causes import BOUND, UNEXPLAINED
from zoo.measure import Row, compiles, measure
from zoo.record import ROOT, key
from zoo.regimes import REGIMES
from zoo.table import load, table

# Each for something that no other one has.
SAMPLE = """
    bert eager inference          albert sdpa training         modernbert eager left        deberta_v2 eager training
    xlm eager inference           xlnet eager inference        canine eager inference       convbert eager training
    gpt2 eager cache              gpt_neo eager training       bloom eager training         mpt eager left
    openai_gpt eager training     swinv2 eager training
    falcon sdpa inference         mistral eager left           gemma2 eager training        llama eager dynamic
    qwen3_next eager inference    gpt_oss eager inference      llama4_text sdpa inference   deepseek_v3 eager training
    t5 eager training             t5 sdpa cache                bart eager none              longt5_tglobal eager inference
    pegasus_x eager inference     beit eager training          swin2sr eager inference      segformer eager inference
    sam eager inference           conditional_detr eager inference                          levit eager inference
    paligemma eager inference     perceiver eager inference    wav2vec2 eager inference     speecht5_enc eager inference
    nn_encoder_kpm native inference                            nn_transformer native training
    hw_einsum_transposed_scores native training                hw_gqa_five_dims native dynamic
    hw_shifted_windows native training                         hw_talking_heads native inference
    hw_baddbmm native dynamic                                  hw_blocked_local native inference
    neg_channel_attention native training                      neg_slot native inference
    neg_linear_attention native inference                      neg_contrast native training
""".split()
WRITTEN = ROOT / "benchmarks" / "results" / "zoo.json"
TRIPLES = list(zip(SAMPLE[::3], SAMPLE[1::3], SAMPLE[2::3], strict=True))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def hold(row: Row) -> None:
    """What must be true of every row."""
    assert row.forward is not None
    if row.cause == "":
        assert row.regime == "bf16" or max(row.forward, row.gradient or 0.0) <= BOUND
    assert row.cause != UNEXPLAINED, f"off by {row.forward:.1e} forward, {row.gradient} in a gradient"
    if row.after is not None:
        assert row.after <= BOUND or row.cause.startswith("the model differs from itself")
    if not ZOO[row.model].attention:
        assert row.rewritten == 0
        return
    assert row.listed == row.reached, "an attention that no list speaks of, or something listed that is none"
    assert all(reason for reason in (*row.refused, *row.missed))


@cache
def written_down() -> dict[tuple[str, str, str], Row]:
    return {key(row): row for row in load(WRITTEN)[1]}


def test_the_page_is_made_of_the_rows() -> None:
    assert (ROOT / "docs" / "zoo.md").read_text() == table(WRITTEN)


def test_the_rows_are_of_this_zoo() -> None:
    """Whoever adds a model or a regime measures it: ``PYTHONPATH=tests python -m zoo``."""
    wanted = {
        (model.name, implementation, regime.name)
        for regime in REGIMES.values()
        for model in ZOO.values()
        if regime.takes(model)
        for implementation in model.implementations
    }
    assert set(written_down()) == wanted


def test_every_row_holds() -> None:
    for row in written_down().values():
        if row.error:
            assert row.error.startswith("torch.compile without any rewriting fails alike")
        else:
            hold(row)


def test_a_row_that_does_not_hold_is_noticed() -> None:
    row = written_down()["bert", "eager", "inference"]
    for wrong in ({"forward": 1e-6}, {"cause": UNEXPLAINED}, {"rewritten": 0, "found": 0}, {"missed": {"": 1}, "found": 1}):
        with pytest.raises(AssertionError):
            hold(replace(row, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "implementation", "regime"), TRIPLES, ids=["-".join(triple) for triple in TRIPLES])
def test_a_sample(name: str, implementation: str, regime: str) -> None:
    row = measure(ZOO[name], implementation, REGIMES[regime], inductor=False)
    hold(row)
    assert row.rewritten >= written_down()[key(row)].rewritten, "fewer are rewritten than docs/zoo.md says"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_every_model(name: str) -> None:
    for regime in REGIMES.values():
        for implementation in ZOO[name].implementations if regime.takes(ZOO[name]) else ():
            if compiles(ZOO[name], implementation, regime):
                hold(measure(ZOO[name], implementation, regime, inductor=False))
