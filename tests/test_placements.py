"""Schedules of placements against pairs asked one by one: coverage, matching sends, bytes, balance; and what is refused."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dilcompile.cli import app
from dilcompile.errors import FormError
from dilcompile.forms import BlockSparse, Dense, Dilated, Form, KeepStructure, SlidingWindow, Union
from dilcompile.placements import ORDERS, PLACEMENTS, RankSchedule, Rows, Shards
from dilcompile.placements.account import imbalance, pairs_by_rank, traffic
from dilcompile.placements.check import check, wrong_with
from dilcompile.placements.choose import Chosen, Site, choose, choose_order
from dilcompile.placements.cost import estimate, estimate_ulysses
from dilcompile.placements.device import DEVICES
from dilcompile.placements.picture import describe
from dilcompile.position_sets import disjoint, meet, reached, without
from dilcompile.progression import Progression
from dilcompile.relation import Problem, Relation

MILLION = 1 << 20
PATTERNS = (
    {"local": {}},
    {"any": [{"local": {}}, {"random": {"blocks": 1, "by_head": True}}]},
    {"any": [{"global": {"columns": 1}}, {"strided": {"stride": 2}}]},
)


def progressions(most: int = 30) -> st.SearchStrategy[Progression]:
    return st.builds(
        lambda start, size, step: Progression(start, start + size, step), *[st.integers(0, most)] * 2, st.integers(1, 9)
    )


def of(*parts: Progression) -> set[int]:
    """The positions, each of which must be there once."""
    found = [position for part in parts for position in part.positions()]
    assert len(found) == len(set(found))
    return set(found)


@given(progressions(), progressions(), st.lists(progressions(), max_size=5))
@settings(max_examples=150, deadline=None)
def test_sets_of_positions(one: Progression, other: Progression, parts: list[Progression]) -> None:
    assert of(meet(one, other)) == of(one) & of(other)
    assert of(*without(one, other)) == of(one) - of(other)
    assert of(*disjoint(parts)) == {position for part in parts for position in part.positions()}


@given(progressions(), st.integers(1, 6), *[st.none() | st.integers(-4, 20)] * 2, st.integers(0, 30), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_positions_that_rows_reach(
    rows: Progression, step: int, left: int | None, right: int | None, low: int, high: int
) -> None:
    expected = {
        k
        for k in range(low, high)
        for t in rows.positions()
        if (k - t) % step == 0 and (left is None or t - k <= left) and (right is None or k - t <= right)
    }
    assert {k for part in reached(rows, step, left, right, low, high) for k in part.positions()} == expected


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """A form of any kind, small."""
    kind = draw(st.sampled_from(["dense", "window", "dilated", "blocks", "union", "chunks"]))
    window = SlidingWindow(draw(st.integers(1, 16)), draw(st.integers(0, 2)), draw(st.integers(1, 4)))
    if kind in ("dense", "window", "chunks"):
        return {"dense": Dense(), "window": window, "chunks": KeepStructure(draw(st.integers(1, 20)))}[kind]
    blocks = BlockSparse(16, draw(st.sampled_from(PATTERNS)), coverage="zero")
    if kind == "blocks":
        return blocks
    rates = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dilated = Dilated(
        segments=[rate * draw(st.integers(1, 12)) for rate in rates],
        rates=rates,
        offset=draw(st.sampled_from(["head_mod", "head_block", "branch", "zero", "own"])),
        union=draw(st.sampled_from(["multiset", "set"])),
        heads=draw(st.sampled_from(["all", "grouped"])),
        sinks=draw(st.integers(0, 2)),
        local=draw(st.integers(0, 3)),
        coverage="zero",
    )
    return dilated if kind == "dilated" else Union((dilated, draw(st.sampled_from([window, blocks]))), coverage="zero")


@st.composite
def relations(draw: st.DrawFn, most: int = 70) -> Relation:
    """A form over a whole sequence, with a mask of its own at times."""
    kv_heads, length = draw(st.integers(1, 4)), draw(st.integers(1, most))
    limits = (draw(st.none() | st.integers(0, 20)) for _ in range(2))
    size = Problem(1, kv_heads * draw(st.integers(1, 2)), kv_heads, length, length, 4, 4, 0, draw(st.booleans()), *limits)
    try:
        return draw(forms()).relation(size)
    except FormError:
        assume(False)
        raise


def counts(relation: Relation) -> torch.Tensor:
    """Multiplicities [H, S, S], pair by pair."""
    size = relation.problem
    axes = (torch.arange(number) for number in (size.heads, size.q_len, size.k_len))
    return relation.multiplicity(*torch.meshgrid(*axes, indexing="ij"))


def keys(rows: tuple[Rows, ...]) -> Counter[tuple[int, int]]:
    """(key head, position) of rows."""
    return Counter(
        (head, p) for each in rows for head in range(*each.kv_heads) for part in each.positions for p in part.positions()
    )


@given(relations(), progressions(60), st.data())
@settings(max_examples=120, deadline=None)
def test_keys_needed_by_rows_of_a_step_and_slices_of_heads(relation: Relation, rows: Progression, data: st.DataObject) -> None:
    size, found = relation.problem, counts(relation)
    inside = [t for t in rows.positions() if t < size.q_len]
    for head in range(size.kv_heads):
        read = found[head * size.group : (head + 1) * size.group, inside].sum((0, 1)).nonzero().flatten().tolist()
        rows = Progression(rows.start, min(rows.stop, size.q_len), rows.step)
        assert {k for part in relation.keys_needed(rows, head) for k in part.positions()} == set(read)
    start = data.draw(st.integers(0, size.kv_heads - 1))
    stop = data.draw(st.integers(start + 1, size.kv_heads))
    assert torch.equal(counts(relation.of_heads(start, stop)), found[start * size.group : stop * size.group])


@given(relations(), st.integers(1, 5), st.sampled_from(ORDERS), st.sampled_from(sorted(PLACEMENTS)))
@settings(max_examples=250, deadline=None)
def test_each_key_that_is_read_comes_once(relation: Relation, ranks: int, order: str, name: str) -> None:
    size, placement = relation.problem, PLACEMENTS[name]
    shards = Shards(size.k_len, ranks, order)  # type: ignore[arg-type]
    assume(placement.reject(relation, shards) is None)
    found, schedules = counts(relation), [placement.schedule(relation, shards, rank) for rank in range(ranks)]
    held = [[t for run in shards.runs(rank) for t in run.positions.positions()] for rank in range(ranks)]
    assert check(placement, relation, shards) == []
    for rank, one in enumerate(schedules):
        attended = sum((keys(step.attended) for step in one.steps), Counter())
        grouped = found[:, held[rank]].reshape(size.kv_heads, -1, size.k_len).sum(1)
        read = {tuple(pair) for pair in grouped.nonzero().tolist()}
        received = sum((keys(transfer.rows) for step in one.steps for transfer in step.receives), Counter())
        assert set(attended.values()) <= {1}
        assert read <= set(attended)
        assert not any(position in held[rank] for _, position in received)
        assert not placement.ONLY_NEEDED or set(received) <= read
        for number, step in enumerate(one.steps):
            for transfer in step.receives:
                assert transfer.count
                assert all(position in held[transfer.peer] for _, position in keys(transfer.rows))
                assert transfer.rows in [to.rows for to in schedules[transfer.peer].steps[number].sends if to.peer == rank]
                assert name != "ring" or (transfer.peer == (rank - number) % ranks or len(one.steps) < ranks)
                assert name != "ring" or read & set(keys(transfer.rows))
    volume = placement.volume(relation, shards)
    for rows, what in ((volume.received, "rows_received"), (volume.sent, "rows_sent")):
        assert rows.T.tolist() == [[getattr(step, what) for step in one.steps] for one in schedules]
    assert pairs_by_rank(relation, shards).tolist() == [int(found[:, part].sum()) for part in held]


def test_a_wrong_schedule_is_found() -> None:
    relation = Dilated([4, 16], [1, 2]).relation(Problem(1, 2, 2, 32, 32, 4, 4))
    shards = Shards(32, 4)
    right = [PLACEMENTS["gather_needed"].schedule(relation, shards, rank) for rank in range(4)]
    assert wrong_with(right, relation, shards, True) == []

    def changed(**parts: object) -> list[RankSchedule]:
        step = replace(right[1].steps[1], **parts)  # type: ignore[arg-type]
        return [replace(one, steps=(one.steps[0], step)) if one.rank == 1 else one for one in right]

    (transfer,) = right[1].steps[1].receives
    first = transfer.rows[0]
    dropped = replace(transfer, rows=(replace(first, positions=(Progression(2, 8, 2),)), *transfer.rows[1:]))
    doubled = replace(transfer, rows=(*transfer.rows, first))
    unread = replace(transfer, rows=(replace(first, positions=(Progression(0, 8, 1),)), *transfer.rows[1:]))
    for wrong, text in ((dropped, "does not attend to"), (doubled, "more than once"), (unread, "no query reads")):
        problems = wrong_with(changed(receives=(wrong,)), relation, shards, True)
        assert any(text in problem for problem in problems), problems
        assert any("expects" in problem for problem in problems)
    own = (Rows((0, 2), (Progression(8, 16),)),)
    assert any(
        "holds" in problem for problem in wrong_with(changed(receives=(replace(transfer, rows=own),)), relation, shards, True)
    )
    assert wrong_with([replace(right[0], steps=right[0].steps[:1]), *right[1:]], relation, shards, True) == [
        "the ranks have [1, 2, 2, 2] steps"
    ]


LONGNET = Dilated()
CASES = [(LONGNET, False), (LONGNET, True), (SlidingWindow(4096, sinks=4), True), (SlidingWindow(4096), False)]


def of_a_million(form: Form, causal: bool) -> Relation:
    return form.relation(Problem(1, 32, 8, MILLION, MILLION, 128, 128, 0, causal))


def test_bytes_are_those_of_the_formulas() -> None:
    shards, kappa = Shards(MILLION, 8), 2 * 8 * 128 * 2
    n = shards.places
    bytes_of = lambda name, form, causal: traffic(PLACEMENTS[name], of_a_million(form, causal), shards, 2).received  # noqa: E731
    assert set(bytes_of("ring", LONGNET, False)) == set(bytes_of("all_gather", LONGNET, False)) == {7 * n * kappa}
    assert 7 * n * kappa == 3_758_096_384
    # Nested branches longer than a shard: (w_i - max(n, w_(i-1))) / r_i rows each.
    branches = [(2048 << i, 1 << i) for i in range(10)]
    remote = [(w, r, before) for (before, _), (w, r) in pairwise([(0, 1), *branches]) if w > n]
    rows = sum((w - max(n, before)) // r for w, r, before in remote)
    assert set(bytes_of("gather_needed", LONGNET, False)) == {rows * kappa} == {12_582_912}
    # A window's rows come from the left, and the sinks once.
    assert bytes_of("gather_needed", *CASES[2]).tolist() == [0] + [(4095 + 4) * kappa] * 7
    assert bytes_of("halo", *CASES[2]).tolist() == [0] + [(4095 + 4) * kappa] * 7
    assert bytes_of("gather_needed", SlidingWindow(4096), False).tolist() == [4095 * kappa] + [2 * 4095 * kappa] * 6 + [
        4095 * kappa
    ]
    short = Dilated([2048, n], [1, 16])
    assert not bytes_of("gather_needed", short, True).any()
    # Causal, one branch over all: rank j needs every r-th row of the j shards before it.
    alone = Dilated([MILLION], [64], offset="zero", coverage="zero")
    assert bytes_of("gather_needed", alone, True).tolist() == [j * n // 64 * kappa for j in range(8)]


def test_gradients_go_back_in_float32_and_what_is_not_held_comes_again() -> None:
    relation, shards = of_a_million(LONGNET, True), Shards(MILLION, 8)
    found = traffic(PLACEMENTS["gather_needed"], relation, shards, 2)
    assert (found.sent_backward == 2 * found.received).all()
    assert (found.received_backward == 2 * found.sent).all()
    ring = traffic(PLACEMENTS["ring"], relation, shards, 2)
    assert (ring.sent_backward == 2 * ring.received + ring.sent).all()
    assert ring.extra.max() == 2 * shards.places * 2 * 8 * 128 * 2


@pytest.mark.parametrize(("form", "causal"), CASES)
def test_contiguous_shards_are_even(form: Form, causal: bool) -> None:
    assert imbalance(pairs_by_rank(of_a_million(form, causal), Shards(MILLION, 8))) <= 1.02


def test_causal_dense_is_even_on_zigzag() -> None:
    even = {order: imbalance(pairs_by_rank(of_a_million(Dense(), True), Shards(MILLION, 8, order))) for order in ORDERS}
    assert even["zigzag"] == 1
    assert 1 < even["striped"] < 1.0001
    assert even["contiguous"] == pytest.approx(15 / 8, rel=1e-5)


def test_1024_ranks_in_seconds() -> None:
    started, shards = time.process_time(), Shards(MILLION, 1024)
    for name, form in (("halo", SlidingWindow(4096, sinks=4)), ("gather_needed", SlidingWindow(4096, sinks=4))):
        relation = of_a_million(form, True)
        schedules = [PLACEMENTS[name].schedule(relation, shards, rank) for rank in range(1024)]
        assert schedules[1023].rows_received == 8 * (4095 + 4)
        assert sum(one.rows_sent for one in schedules) == sum(one.rows_received for one in schedules)
    assert time.process_time() - started < 5


def test_what_is_refused_says_the_cure() -> None:
    size = Problem(1, 4, 2, 64, 64, 4, 4, 0, True)
    dense, dilated, shards = Dense().relation(size), Dilated([8, 64], [1, 2]).relation(size), Shards(64, 4)
    halo = PLACEMENTS["halo"].reject
    assert "take gather_needed" in str(halo(dense, shards))
    assert "longer than a shard of 16" in str(halo(dilated, shards))
    window = SlidingWindow(8).relation(size)
    assert halo(window, shards) is None
    assert "contiguous" in str(halo(window, replace(shards, order="zigzag")))
    chosen = BlockSparse(16, {"topk": {"estimator": "pooled", "blocks": 2}}).relation(size)
    for name, placement in PLACEMENTS.items():
        assert "take ulysses" in str(placement.reject(chosen, shards))
        assert placement.reject(window, shards, documents=True) is None
        refused = placement.reject(Dilated([8], [1]).relation(size), shards, documents=True)
        assert refused is None if name in ("ring", "all_gather") else "document" in str(refused)


def test_documents_may_start_anywhere() -> None:
    # Segments of 8 that start with a document reach over the edges of shards of 8.
    relation = Dilated([8], [1]).relation(Problem(1, 1, 1, 32, 32, 4, 4, 0, True))
    ring = PLACEMENTS["ring"].schedule
    assert [one.peer for step in ring(relation, Shards(32, 4), 2).steps for one in step.receives] == []
    assert [one.peer for step in ring(relation, Shards(32, 4), 2, True).steps for one in step.receives] == [1]


def test_one_rank_moves_nothing() -> None:
    relation = LONGNET.relation(Problem(1, 2, 1, 100, 100, 4, 4, 0, True))
    for placement in PLACEMENTS.values():
        if placement.reject(relation, Shards(100, 1)) is None:
            (step,) = placement.schedule(relation, Shards(100, 1), 0).steps
            assert (step.sends, step.receives, step.local) == ((), (), (Rows((0, 1), (Progression(0, 100),)),))


def test_a_schedule_is_printed() -> None:
    relation = Dense().relation(Problem(1, 1, 1, 8, 8, 4, 4, 0, True))
    assert describe(PLACEMENTS["ring"], relation, Shards(8, 2)).splitlines() == [
        "ring, 2 ranks, contiguous, 8 positions: everything & causal",
        "",
        "        step 0  step 1",
        "rank 0  0       .",
        "rank 1  1       0",
        "",
        "step  rank  from  to  rows in  rows out  attends to  mask",
        "0     0     .     .   0        0         0:4         10 of 16 pairs",
        "0     1     .     .   0        0         4:8         10 of 16 pairs",
        "1     0     .     1   0        4         .           .",
        "1     1     0     .   4        0         0:4         all pairs",
    ]


H100 = DEVICES["h100"]


def test_auto_takes_what_is_fastest_and_says_why() -> None:
    shards = Shards(MILLION, 8)
    chosen = choose(Site(of_a_million(SlidingWindow(4096, sinks=4), True)), shards, H100)
    assert isinstance(chosen, Chosen)
    assert chosen.best.method == "gather_needed"
    assert chosen.why.startswith("gather_needed over contiguous: 16.8 MB in ")
    assert "hidden behind" in chosen.why
    assert "would move 3.76 GB" in chosen.why
    # 64 ranks: no heads to deal, and contiguous shards would leave most ranks waiting.
    dense = Site(of_a_million(Dense(), True))
    found = choose_order([dense], Shards(MILLION, 64), H100)
    order = found.order
    assert order == "zigzag"
    assert "against contiguous" in found.why
    assert found.faster_than("contiguous") == "zigzag"
    assert found.faster_than("zigzag") is None
    chosen = choose(dense, Shards(MILLION, 64, order), H100)
    assert isinstance(chosen, Chosen)
    assert chosen.best.method == "ring"
    assert "can't be dealt" in chosen.refused["ulysses"]
    # Keys of the whole sequence don't fit in the budget; two shards do.
    chosen = choose(dense, Shards(MILLION, 64, order), H100, budget=200_000_000)
    assert isinstance(chosen, Chosen)
    assert chosen.best.method == "ring"
    assert "more than the budget of 200 MB" in chosen.refused["all_gather"]
    assert "budget" in str(choose(dense, Shards(MILLION, 64, order), H100, budget=1))


def test_thousands_of_calls_are_not_chosen() -> None:
    """Striped shards of branches whose rates don't go by the ranks: each branch, head and rank is a call."""
    site, shards = Site(of_a_million(LONGNET, True), train=False), Shards(MILLION, 64, "striped")
    costly, free = (choose(site, shards, replace(H100, call=call)) for call in (H100.call, 1e-12))
    assert isinstance(costly, Chosen)
    assert isinstance(free, Chosen)
    gathered = next(one for one in (costly.best, *costly.others) if one.method == "gather_needed")
    assert gathered.calls > 1000
    assert gathered.compute > 1000 * H100.call
    assert costly.best.calls < 200 < free.best.calls
    contiguous = estimate("gather_needed", site.relation, replace(shards, order="contiguous"), H100, 2)
    assert contiguous.calls < 100


def test_a_slow_wire_is_waited_for() -> None:
    relation, shards = of_a_million(SlidingWindow(4096), True), Shards(MILLION, 8)
    slow = replace(H100, bandwidth=1e6)
    fast, waiting = (estimate("ring", relation, shards, device, 2) for device in (H100, slow))
    assert fast.hidden
    assert not waiting.hidden
    assert waiting.wire == pytest.approx(MILLION // 8 * 8 * 512 / 1e6, rel=1e-3)
    assert waiting.seconds == pytest.approx(waiting.wire, rel=0.01)
    assert fast.compute == pytest.approx(relation.flops() / 8 / H100.flops, rel=0.01)
    heads = estimate_ulysses(relation, shards, H100, 2)
    # (P - 1) / P * n * (2 H D + 2 Hkv D) numbers of 2 bytes.
    assert heads.received == 7 * (MILLION // 8) // 8 * (2 * 32 * 128 + 2 * 8 * 128) * 2


class _Layer(torch.nn.Module):
    """Attention over its own input, and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def two_layers() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """What the command line is given."""
    return torch.nn.Sequential(_Layer(), _Layer()), (torch.zeros(1, 4, 64, 8),)


def test_the_command_plans_1024_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "version: 1\nmesh: {cp: {size: 2}}\nrules:\n"
        "  - {name: a, match: {layers: '0'}, apply: {form: sliding_window, window: 512}, shard: {mesh: cp}}\n"
        "  - {name: b, match: {module: '*'}, apply: {form: keep}, shard: {mesh: cp, method: all_gather}}\n"
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    common = ["plan", "test_placements:two_layers", "--policy", str(policy), "--length", "65536"]
    found = CliRunner().invoke(app, [*common, "--mesh", "cp=1024", "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.output)
    window, dense = told["sites"]
    assert (window["method"], window["received"]) == ("gather_needed", 511 * 4 * 2 * 8 * 4)
    assert (dense["method"], dense["received"]) == ("all_gather", (65536 - 64) * 4 * 2 * 8 * 4)
    assert told["totals"]["received"] == window["received"] + dense["received"]
    text = CliRunner().invoke(app, [*common, "--mesh", "cp=8"]).output
    assert "gather_needed over" in text
    assert "all sites, of the rank that has most: receives" in text
    assert "AXIS=RANKS" in CliRunner().invoke(app, [*common, "--mesh", "cp"]).output


class _Decoded(torch.nn.Module):
    """One query over all keys."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)


def one_query() -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """What the command line is given."""
    return _Decoded(), (torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 64, 8))


def test_the_command_plans_two_axes_decoding_and_measured_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    policy, device = tmp_path / "p.yaml", tmp_path / "device.json"
    policy.write_text("version: 1\nrules:\n  - {apply: {form: sliding_window, window: 512}}\n")
    replace(H100, source="measured yesterday").save(device)
    common = ["plan", "test_placements:two_layers", "--policy", str(policy), "--length", "65536", "--json"]
    for mesh in (["--mesh", "cp=8,heads=4"], ["--mesh", "cp=8", "--mesh", "heads=4"]):
        found = CliRunner().invoke(app, [*common, *mesh, "--device", str(device)])
        assert found.exit_code == 0, found.output
        told = json.loads(found.output)
        (site,) = told["sites"]
        assert told["device"]["source"] == "measured yesterday"
        assert (told["mesh"], site["method"], site["moving"]) == ({"cp": 8, "heads": 4}, "usp", "gather_needed")
        # Of the other three ranks q, k, v and the output of one head; then 511 rows of that head from the left.
        assert site["received"] == 3 * 65536 // 32 * 4 * 8 * 4 + 511 * 2 * 8 * 4
        assert site["packing"] > 0
    for mesh in (["--mesh", "cp=8,cp=4"], ["--mesh", "cp=8,heads"]):
        assert "or two as in cp=8,heads=4" in CliRunner().invoke(app, [*common, *mesh]).output.replace("\n", " ")
    decoded = ["plan", "test_placements:one_query", "--policy", "exact", "--length", "65536", "--json", "--no-train"]
    told = json.loads(CliRunner().invoke(app, [*decoded, "--mesh", "cp=8"]).output)
    (site,) = told["sites"]
    # The other seven ranks' output and LSE of four heads, in float32.
    assert (site["method"], site["received"], site["imbalance"]) == ("tree", 7 * 4 * (8 + 1) * 4, 1.0)


def test_waiting_for_every_exchange_takes_longer() -> None:
    relation, shards = of_a_million(Dense(), True), Shards(MILLION, 8, "zigzag")
    hidden, waiting = (estimate("ring", relation, shards, H100, 2, prefetch=prefetch) for prefetch in (True, False))
    assert waiting.seconds == pytest.approx(waiting.compute + waiting.wire + waiting.packing)
    assert waiting.seconds > hidden.seconds
    assert waiting.received == hidden.received
