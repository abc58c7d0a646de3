"""The distinct patterns of a report: one for all sites that have it, with the density that is executed, in text, JSON and HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_sites import site
from test_report import decided, kept, layers, report, symbolic

from dilcompile.blocks.curve import Curve
from dilcompile.blocks.fullness import fullness
from dilcompile.forms import BlockSparse, Dense, Dilated, SlidingWindow, Union
from dilcompile.relation import Problem
from dilcompile.report.block_counts import count_of
from dilcompile.report.pair_cells import pair_cells
from dilcompile.report.rows import row_of
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
        "is_bound": False,
        "blocks": blocks,
        "unseen": [],
        "orders": [],
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


def test_densities_of_blocks_that_the_data_chooses_are_bounds() -> None:
    form = BlockSparse(16, {"topk": {"estimator": "pooled", "blocks": 2}})
    whole = report(decided(form, q_len=64, k_len=64))
    (pattern,), described = whole.patterns, whole.to_dict()
    assert pattern.title.startswith("block_sparse: at most ")
    assert described["patterns"][0]["is_bound"] is True  # type: ignore[index]
    assert described["graphs"][0]["sites"][0]["costs"]["is_bound"] is True  # type: ignore[index]
    assert list(pattern.pictures()) == []


def test_the_blocks_of_an_order_stand_beside_those_by_row() -> None:
    form = BlockSparse(64, {"any": [{"local": {}}, {"near": {"radius": 8}}]}, order="hilbert", grid=(64, 64), lead=1)
    whole = report(decided(form, q_len=4097, k_len=4097, mask=MaskSpec()))
    (pattern,) = whole.patterns
    own, by_row = (fullness(Curve(order, (64, 64), 1), 8, 64) for order in ("hilbert", "row"))
    described: Any = whole.to_dict()
    for shown, count, order in zip(described["patterns"][0]["orders"], (own, by_row), ("hilbert", "row"), strict=True):
        numbers = {"blocks": count.blocks, "full": count.full, "partial": count.partial, "density": count.density}
        assert shown == {"order": order, "radius": [8, 8], **numbers}
    assert own.full_share > 2 * by_row.full_share
    said = (
        f"pairs of tokens at most 8 apart are in {own.blocks:,} blocks by hilbert, {own.full:,} of them full of such pairs; "
        f"by row in {by_row.blocks:,}, {by_row.full:,} full"
    )
    assert said in str(pattern).splitlines()
    assert said in " ".join(str(row_of(whole.decisions[0])).split())
    *_, bars = pattern.svgs("pattern-0")
    widths = [float(part.get("width", 0)) for part in ElementTree.fromstring(bars).iter("rect")][:4]
    scale = 320 / by_row.blocks
    assert widths == pytest.approx([own.full * scale, own.partial * scale, by_row.full * scale, by_row.partial * scale], abs=0.11)
    assert bars in whole.to_html()
    # Rows by rows gain nothing, and a patch is no neighbourhood.
    for other in (replace(form, order="row"), replace(form, pattern={"local": {"before": 1}})):
        assert report(decided(other, q_len=4097, k_len=4097, mask=MaskSpec())).patterns[0].orders == ()


PARTS: list[dict[str, Any]] = [
    {"form": "sliding_window", "window": 7, "sinks": 2},
    {"form": "dilated", "segments": [8, 16], "rates": [1, 2]},
    {"form": "dilated", "segments": [12], "rates": [3], "union": "set", "offset": "own"},
    {"form": "block_sparse", "block": 16, "pattern": {"any": [{"global": {"columns": 1}}, {"random": {"blocks": 1, "by_head": True}}]}},
    {"form": "block_sparse", "block": [48, 17], "pattern": {"fixed": {"stride": 2}}},
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3, unique_by=str),
    st.sampled_from([3, 4]),
    st.booleans(),
    st.sampled_from([(70, 70, 0), (21, 90, 37)]),
    st.sampled_from([None, 29]),
)
def test_cells_of_blocks_beside_other_terms_hold_as_many_pairs(
    parts: list[dict[str, Any]], block: int, causal: bool, lengths: tuple[int, int, int], left: int | None
) -> None:
    q_len, k_len, offset = lengths
    relation = Union((PARTS[block], *parts), coverage="zero").relation(Problem(1, 4, 2, q_len, k_len, 8, 8, offset, causal, left))
    t, k = torch.arange(q_len)[:, None] + offset, torch.arange(k_len)
    for head in (0, 3):
        cells = pair_cells(relation, head, 20)
        assert cells is not None
        counted = relation.multiplicity(torch.tensor(head), t, k).double()
        for i, j in product(range(len(cells.q_edges) - 1), range(len(cells.k_edges) - 1)):
            rows = slice(*(int(edge) - offset for edge in cells.q_edges[i : i + 2]))
            share = counted[rows, int(cells.k_edges[j]) : int(cells.k_edges[j + 1])].mean().clamp(max=1)
            assert cells.full[i, j] + cells.partial[i, j] == pytest.approx(float(share), abs=1e-9)


def test_a_union_with_blocks_has_a_picture_of_each_kind_of_head() -> None:
    union = Union(({"form": "dilated", "segments": [64, 256], "rates": [1, 4]}, PARTS[3]))
    (pattern,) = report(decided(union, heads=2, kv_heads=2, q_len=512, k_len=512)).patterns
    drawn = list(pattern.pictures())
    assert [heads for heads, _ in drawn] == ["head 0; heads differ in the offset alone", "head 1; heads differ in the offset alone"]
    assert all(cells.unit == "pair" for _, cells in drawn)
