"""The distinct patterns of a report: one for all sites that have it, with the density that is executed, in text, JSON and HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_sites import site
from test_report import decided, kept, layers, report, symbolic

from dilcompile.forms import BlockSparse, Dense, Dilated, SlidingWindow
from dilcompile.relation import Problem
from dilcompile.report.block_counts import count_of
from dilcompile.site import MaskSpec

BLOCKS = BlockSparse(16, {"any": [{"local": {"before": 1}}, {"global": {"columns": 1}}]})
BY_HEAD = {"any": [{"local": {}}, {"random": {"blocks": 2, "by_head": True}}]}


def by_pair(size: Problem, block: tuple[int, int], held: Any) -> tuple[float, int, int]:
    """Density, full and partial blocks of all heads, by looking at each pair; ``held(h, i, j)``: is the block there?"""
    seen, full, partial = 0, 0, 0
    for h in range(size.heads):
        t = size.q_offset + torch.arange(size.q_len)[:, None]
        k = torch.arange(size.k_len)
        allowed = (k <= t) if size.is_causal else torch.ones(size.q_len, size.k_len, dtype=torch.bool)
        for i in range(size.q_offset // block[0], (size.q_offset + size.q_len - 1) // block[0] + 1):
            for j in range((size.k_len - 1) // block[1] + 1):
                rows = slice(max(0, i * block[0] - size.q_offset), (i + 1) * block[0] - size.q_offset)
                pairs = allowed[rows, j * block[1] : (j + 1) * block[1]]
                if held(h, i, j) and pairs.any():
                    seen, full, partial = seen + int(pairs.sum()), full + bool(pairs.all()), partial + (not pairs.all())
    return seen / (size.heads * size.q_len * size.k_len), full, partial


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([16, (16, 32), (48, 16)]), st.integers(1, 100), st.booleans(), st.booleans(), st.data())
def test_density_and_counts_reported_are_those_executed(block: Any, length: int, causal: bool, heads: bool, data: Any) -> None:
    queries = data.draw(st.integers(1, length))
    form = BlockSparse(block, BY_HEAD if heads else BLOCKS.pattern)
    at = {
        "heads": 4,
        "kv_heads": 2,
        "q_len": queries,
        "k_len": length,
        "mask": MaskSpec(causal=causal, q_offset=length - queries),
    }
    (described,) = report(decided(form, **at)).patterns
    size = Problem(1, 4, 2, queries, length, 64, 64, length - queries, causal)
    generator = form.relation(size).terms[0].generator
    held = lambda h, i, j: bool(generator.pattern.contains(*map(torch.tensor, (h, i, j)), generator.grid))  # type: ignore[union-attr]  # noqa: E731
    density, full, partial = by_pair(size, form.sizes, held)
    counted = described.count
    assert counted is not None
    share = 1 if heads else 4
    assert described.density_of_all == pytest.approx(density, rel=1e-12)
    assert (counted.full * share, counted.partial * share) == (full, partial)
    assert (counted.heads, counted.q_block, counted.k_block) == (4 if heads else 1, *form.sizes)


def test_json_holds_what_a_pattern_says() -> None:
    described: Any = report(*layers(2, form=BLOCKS, q_len=64, k_len=64)).to_dict()
    (pattern,) = described["patterns"]
    blocks = {"q_block": 16, "k_block": 16, "rows": 4, "columns": 4, "heads": 1, "full": 5, "partial": 4, "empty": 7}
    assert pattern == {
        "form": str(BLOCKS),
        "lengths": "64 x 64 positions",
        "sites": [{"graph": "0/0", "index": n, "module": f"model.layers.{n}.self_attn"} for n in range(2)],
        "density_of_mask": pytest.approx((5 * 256 + 4 * 136) / (64 * 65 / 2)),
        "density_of_all": (5 * 256 + 4 * 136) / 64**2,
        "blocks": blocks,
        "unseen": [],
    }
    assert [held["blocks"] for held in described["graphs"][0]["sites"]] == [blocks, blocks]


def test_sites_of_one_pattern_share_a_picture() -> None:
    whole = report(*layers(3, form=BLOCKS), decided(BLOCKS, index=3, module="other", q_len=64, k_len=64), *layers(2, kept))
    first, second = whole.patterns
    assert first.modules == tuple(f"model.layers.{i}.self_attn" for i in range(3))
    assert (first.sites, second.sites) == ((("0/0", 0), ("0/0", 1), ("0/0", 2)), (("0/0", 3),))
    # Batch and head size change no picture; limits, heads and form do.
    alike = decided(BLOCKS, batch=3, head_dim=32, v_dim=8)
    assert len(report(decided(BLOCKS), alike).patterns) == 1
    others = (decided(BLOCKS, heads=4, kv_heads=4), decided(BLOCKS, mask=MaskSpec()), decided(replace(BLOCKS, block=32)))
    for other in others:
        assert len(report(decided(BLOCKS), other).patterns) == 2


def test_dense_attention_has_a_picture_only_under_a_window() -> None:
    assert report(decided(Dense()), decided(Dense(), mask=MaskSpec())).patterns == []
    (window,) = report(decided(Dense(), mask=MaskSpec(causal=True, left=255))).patterns
    assert window.density_of_mask == 1
    (heads, cells), *more = window.pictures()
    assert (heads, more) == ("", [])
    assert cells.unit == "pair"


def test_lengths_that_change_are_named_as_the_examples_without_a_guard() -> None:
    length = symbolic(100)
    (pattern,) = report(decided(BLOCKS, q_len=length, k_len=length)).patterns
    assert pattern.lengths == f"{length}=100 x {length}=100 positions, the example's lengths"
    assert pattern.count == count_of(BLOCKS.relation(Problem(1, 8, 8, 100, 100, 64, 64, is_causal=True)))
    assert length.node.shape_env.guards == []


def test_what_depends_on_data_is_said_to_be_left_out() -> None:
    (pattern,) = report(decided(BLOCKS, mask=MaskSpec(causal=True, key_padding=True, documents=True))).patterns
    assert pattern.unseen == ("document", "padding")
    assert "document and padding of the mask left out" in pattern.lines[0]


def test_heads_that_are_alike_share_a_picture() -> None:
    form = BlockSparse(16, BY_HEAD)
    (few,) = report(decided(form, heads=3, kv_heads=3, q_len=512, k_len=512)).patterns
    assert [heads for heads, _ in few.pictures()] == ["head 0", "head 1", "head 2"]
    (many,) = report(decided(form, q_len=512, k_len=512)).patterns
    assert [heads for heads, _ in many.pictures()] == [f"head {h}, of 8 groups that differ" for h in range(4)]
    # Two blocks in all: each head draws both.
    (alike,) = report(decided(form, q_len=20, k_len=20)).patterns
    assert [heads for heads, _ in alike.pictures()] == [""]
    grouped = Dilated(segments=(64, 128), rates=(1, 1), heads="grouped")
    (groups,) = report(decided(grouped, q_len=256, k_len=256)).patterns
    assert [heads for heads, _ in groups.pictures()] == ["heads 0-3", "heads 4-7"]
    (offsets,) = report(decided(Dilated(segments=(64, 128), rates=(1, 2)))).patterns
    assert [heads for heads, _ in offsets.pictures()] == ["all heads; heads differ in the offset alone"]


def test_the_page_shows_each_pattern_once_and_no_script() -> None:
    verdicts = [*layers(3, form=BLOCKS), decided(SlidingWindow(window=256, sinks=4), module="<b>")]
    html = report(*verdicts).to_html()
    drawn = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(drawn) == html.count("<figure>") == 2
    ids = [part.get("id") for svg in drawn for part in ElementTree.fromstring(svg).iter() if part.get("id")]
    assert len({*ids}) == len(ids) == 4
    assert "<script" not in html
    assert "<b>model.layers.{0-2}.self_attn</b>" in html
    assert "<b>&lt;b&gt;</b>" in html
    assert "509 full, 256 partial and 64,771 empty of 256 x 256 blocks" in html
    assert "<figure>" not in report(decided(Dense())).to_html()


def test_the_table_counts_blocks() -> None:
    assert "9 full, 4 partial and 3 empty of 4 x 4 blocks" not in str(report(decided(Dense())))
    text = " ".join(str(report(decided(BLOCKS, q_len=64, k_len=64))).split())
    assert "5 full, 4 partial" in text
    assert "7 empty of 4 x 4" in text


def test_a_pattern_prints_its_picture() -> None:
    (pattern,) = report(*layers(2, form=BLOCKS, q_len=64, k_len=64)).patterns
    assert str(pattern).splitlines()[:8] == [
        "model.layers.{0-1}.self_attn: block_sparse(block=16, pattern={'any': [{'local': {'before': 1}}, {'global': {'columns': 1}}]})",
        "block_sparse: 44.5 % of all pairs",
        "87.7 % of the pairs of the model's own mask, at 64 x 64 positions",
        "5 full, 4 partial and 7 empty of 4 x 4 blocks",
        "▓▓······",
        "██▓▓····",
        "████▓▓··",
        "██··██▓▓",
    ]


def test_a_block_longer_than_the_sequence_is_one_block() -> None:
    form = BlockSparse((256, 128), {"local": {}})
    relation = form.relation(Problem(1, 2, 2, 100, 100, 8, 8, is_causal=True))
    assert relation.pairs() == 2 * 5050
    counted = count_of(relation)
    assert counted is not None
    assert (counted.rows, counted.columns, counted.full, counted.partial, counted.empty) == (1, 1, 0, 1, 0)
    whole = count_of(form.relation(Problem(1, 2, 2, 100, 100, 8, 8)))
    assert whole is not None
    assert (whole.full, whole.partial) == (1, 0)


EXPLICIT = {"explicit": {"starts": [0, 1, 3], "columns": [0, 0, 9]}}


def test_blocks_of_a_list_beyond_the_site_are_told() -> None:
    form = BlockSparse(16, EXPLICIT, "zero")
    at = {"q_len": 100, "k_len": 100}
    assert form.notes(site(**at)) == (
        "the pattern lists the block in row 1, column 9, but 100 positions have 7 rows and 7 columns of blocks: what lies beyond is "
        "not computed; list blocks of this length",
    )
    assert form.notes(site(q_len=20, k_len=16)) != ()
    # There it fits, isn't known, or is not the whole sequence.
    assert form.notes(site(q_len=160, k_len=160)) == ()
    assert form.notes(site(q_len=symbolic(100), k_len=symbolic(100))) == ()
    assert form.notes(site(phase="decode", **at)) == ()


def test_lengths_at_which_nothing_is_seen_are_told() -> None:
    form = BlockSparse(16, {"fixed": {"stride": 4, "offset": 2}}, "zero")
    assert form.notes(site(q_len=32, k_len=32)) == (
        "no block of the pattern shows a query any key at 32 positions: every output is 0; add {local: {}} under `any`",
    )
    assert form.notes(site(q_len=33, k_len=33)) == ()
