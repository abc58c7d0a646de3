"""``min_seq: auto``: sites are rewritten where the model of costs says that this is faster than dense attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from policy_sites import site
from torch import Tensor

import dilcompile
from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileError, DilcompileWarning
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering.choice import crossover as costs
from dilcompile.lowering.choice import rates
from dilcompile.lowering.choice.crossover import LONGEST, Setting, crossover
from dilcompile.lowering.choice.rates import Rate, rate_of
from dilcompile.policy import Policy, resolve
from dilcompile.policy.check import check, shadows
from dilcompile.relation import Problem
from dilcompile.report.faster import where_faster
from dilcompile.site import MaskSpec

CPU = torch.device("cpu")
WINDOW = {"form": "sliding_window", "window": 16}


@pytest.fixture(autouse=True)
def even_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Dense attention at no cost but its FLOPs; every kernel at the same rate, with the FLOPs of 256 x 256 pairs for a call."""
    of_a_call = 256 * 256 * 8 * 256 / 1e9
    kernels = {"dense": (0.0, 1e9), **dict.fromkeys(("native", "sdpa", "cpu", "reference"), (of_a_call, 1000000000.0))}
    return write(tmp_path / "rates.json", kernels, monkeypatch)


def write(path: Path, kernels: dict[str, tuple[float, float]], monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> Path:
    held = {name: {"overhead_s": cost, "flops_per_s": rate} for name, (cost, rate) in kernels.items()}
    both = {name: {"forward": found, "train": found} for name, found in held.items()}
    path.write_text(json.dumps({"device": device, "rates": dict.fromkeys(("float32", "bfloat16"), both)}))
    monkeypatch.setenv(rates.OPTION, str(path))
    rates._read.cache_clear()
    return path


def policy(apply: dict[str, Any], **match: Any) -> Policy:
    return Policy.load({"rules": [{"name": "long", "match": {"min_seq": "auto", **match}, "apply": apply}]})


def decide(length: Any, apply: dict[str, Any] = WINDOW, **changes: Any) -> Decision | Rejection:
    where = site(**{"k_len": length, "q_len": length, "mask": MaskSpec(), **changes})
    (verdict,) = resolve(policy(apply), [where], revise=where_faster)
    return verdict


def setting(form: Form, causal: bool = False, **changes: Any) -> Setting:
    problem = Problem(1, 8, 8, 4096, 4096, 64, 64, is_causal=causal)
    held: dict[str, Any] = {
        "form": form, "problem": problem, "grows": True, "plain": True, "device": CPU, "dtype": torch.float32, "train": False,
        "forward": "native",
    }  # fmt: skip
    return Setting(**{**held, **changes})


# The model


def test_the_crossover_is_where_the_saved_pairs_pay_for_the_call() -> None:
    """A window of 16 on both sides holds about 31 pairs a row: L * L > 256 * 256 + 31 * L from L = 272 on."""
    found = crossover(setting(SlidingWindow(16)), threads=1)
    assert found is not None
    assert 272 <= found <= 276


def test_just_below_dense_is_faster_and_from_there_on_the_form_is() -> None:
    for form in (SlidingWindow(16), SlidingWindow(300, sinks=4), Dilated([64, 256, 1024], [1, 4, 16]), Dilated()):
        for causal in (False, True):
            held = setting(form, causal)
            found = crossover(held, threads=1)
            assert found is not None
            times = [by_hand(held, keys) for keys in (found - max(1, found // 32), found)]
            assert times[0][0] >= times[0][1]
            assert times[1][0] < times[1][1]


def by_hand(held: Setting, keys: int) -> tuple[float, float]:
    """Seconds of the form and of dense attention, counted pair by pair."""
    causal = held.problem.is_causal
    problem = Problem(1, 8, 8, keys, keys, 64, 64, is_causal=causal)
    pairs = held.form.relation(problem).pairs()
    dense = 8 * (keys * (keys + 1) // 2 if causal else keys * keys)
    return 256 * 256 * 8 * 256 / 1e9 + 256 * pairs / 1e9, 256 * dense / 1e9


def test_a_dense_form_is_never_faster_than_dense_attention() -> None:
    assert crossover(setting(Dense(), forward="sdpa"), threads=1) is None


def test_an_exact_window_beats_a_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(1, 8, 8, 4096, 4096, 64, 64, is_causal=True, window_left=100)
    found = crossover(setting(Dense(), problem=problem, plain=False), threads=1)
    assert found is not None
    assert 256 < found < 400


def test_a_slower_kernel_needs_more_keys_and_more_threads_make_the_call_count_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = crossover(setting(SlidingWindow(64)), threads=1)
    many = crossover(setting(SlidingWindow(64)), threads=16)
    write(tmp_path / "slow.json", {"dense": (0.0, 1e9), "native": (1e-4, 1e8)}, monkeypatch)
    slow = crossover(setting(SlidingWindow(64)), threads=1)
    assert first is not None
    assert many is not None
    assert slow is not None
    assert first < many
    assert first < slow


def test_a_step_of_a_decoder_is_bound_by_what_it_reads() -> None:
    """One row: the form reads its window, dense attention all keys."""
    problem = Problem(1, 8, 8, 1, 4096, 64, 64, q_offset=4095, is_causal=True)
    held = setting(SlidingWindow(16), problem=problem, grows=False, plain=False)
    size = costs._problem(held, 1000)
    assert (size.q_len, size.k_len, size.q_offset) == (1, 1000, 999)
    assert costs._bytes(held.form.relation(size), held) == 8 * 16 * 128 * 4
    assert costs._bytes(Dense().relation(costs._seen_by_dense(held, size)), held) == 8 * 1000 * 128 * 4
    assert crossover(held, threads=1) is not None


def test_a_form_that_is_not_to_be_had_is_not_faster() -> None:
    grouped = Dilated([16] * 9, [1] * 9, heads="grouped")
    assert crossover(setting(grouped), threads=1) is None
    assert crossover(setting(grouped, problem=Problem(1, 9, 9, 4096, 4096, 64, 64)), threads=1) is not None


# The rates


def test_the_rates_of_the_package_are_those_that_were_measured() -> None:
    measured = Path(__file__).parents[1] / "benchmarks" / "results" / "rates-cpu.json"
    assert rates.MEASURED.read_text() == measured.read_text()


def test_every_kernel_of_a_cpu_has_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rates.OPTION)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for kernel in ("dense", "native", "sdpa", "cpu"):
            for train in (False, True):
                found = rate_of(CPU, dtype, kernel, train)
                assert found is not None
                assert 0 < found.overhead < 0.1
                assert 1e8 < found.flops < 1e12
    cuda = rate_of(torch.device("cuda"), torch.bfloat16, "triton", False)
    assert cuda is not None
    assert cuda.flops > 1e13
    assert rate_of(torch.device("mps"), torch.float32, "dense", False) is None


def test_a_file_of_rates_goes_before_the_packages_own(even_rates: Path) -> None:
    assert rate_of(CPU, torch.float32, "dense", False) == Rate(0.0, 1e9)
    assert rate_of(CPU, torch.float64, "dense", False) != Rate(0.0, 1e9)


@pytest.mark.parametrize("text", [None, "", "[]", '{"device": "cpu"}', '{"device": "cpu", "rates": {"float32": {"dense": {}}}}'])
def test_a_file_that_holds_no_rates(text: str | None, even_rates: Path) -> None:
    even_rates.unlink() if text is None else even_rates.write_text(text)
    rates._read.cache_clear()
    with pytest.raises(DilcompileError, match=r"DILCOMPILE_RATES: .* is no file of rates \(.*\); benchmarks/rates.py makes one"):
        decide(64)


def test_rates_that_are_no_rates(even_rates: Path) -> None:
    even_rates.write_text(even_rates.read_text().replace("1000000000.0", "0.0"))
    rates._read.cache_clear()
    with pytest.raises(DilcompileError, match="is no file of rates"):
        decide(64)


# The policy


def test_short_sites_stay_and_long_ones_are_rewritten() -> None:
    short, long = decide(128), decide(4096)
    assert isinstance(short, Rejection)
    assert short.asked
    assert short.reason.startswith("min_seq auto: dense is faster below 27")
    assert short.reason.endswith("keys on this device (cpu, kernel native, modelled)")
    assert isinstance(long, Decision)
    assert long.notes[-1].startswith("min_seq auto: faster than dense from 27")


def test_without_it_a_short_site_is_rewritten() -> None:
    where = site(k_len=128, q_len=128, mask=MaskSpec())
    rule = {"name": "all", "apply": WINDOW}
    (verdict,) = resolve(Policy.load({"rules": [rule]}), [where], revise=where_faster)
    assert isinstance(verdict, Decision)


def test_a_form_that_is_never_faster_leaves_every_site() -> None:
    verdict = decide(1 << 16, {"form": "dense"})
    assert isinstance(verdict, Rejection)
    assert verdict.reason.startswith(
        f"min_seq auto: dense is faster up to {LONGEST} keys and more on this device (cpu, kernel native"
    )


def test_without_rates_it_says_so_and_rewrites() -> None:
    verdict = decide(64, {**WINDOW, "kernel": "reference"}, dtype=torch.float64)
    assert isinstance(verdict, Decision)
    assert verdict.notes[-1] == "min_seq auto: rewritten whatever it costs: no rates of dense, reference on cpu in torch.float64"


def test_keep_and_what_is_refused_stay_what_they_are() -> None:
    kept = decide(4096, {"form": "keep"})
    assert isinstance(kept, Rejection)
    assert kept.reason == "the policy keeps it"
    with pytest.warns(DilcompileWarning, match="its mask could not be read"):
        refused = decide(64, WINDOW, mask=MaskSpec(unread="an unread mask"))
    assert isinstance(refused, Rejection)
    assert not refused.asked


def test_what_check_says() -> None:
    (found,) = check(policy({"form": "keep"}))
    assert "has min_seq auto but keeps its sites as they are: nothing could be faster than that" in str(found)
    assert check(policy(WINDOW, max_seq=64)) == []
    rules = Policy.load(
        {"rules": [*policy(WINDOW).plain()["rules"], {"match": {"min_seq": 64}, "apply": {"form": "keep"}}]}
    ).rules
    assert shadows(rules[0], rules[1])
    assert not shadows(rules[1], rules[0])


# A model


class Attention(torch.nn.Module):
    """Two heads over all keys."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def options() -> dict[str, Any]:
    return {"policy": policy(WINDOW), "inner": "eager"}


def is_rewritten(length: int, model: Any) -> bool:
    """By the numbers: a window of 16 changes them by tenths, rounding by a millionth."""
    x = torch.randn(1, 8, length, 64, generator=torch.Generator().manual_seed(0))
    return not torch.allclose(model(x), Attention()(x), rtol=1e-3, atol=1e-5)


def test_a_model_of_fixed_lengths() -> None:
    for length, rewritten in ((64, False), (600, True)):
        torch._dynamo.reset()
        assert is_rewritten(length, torch.compile(Attention(), backend="dilated", dynamic=False, options=options())) == rewritten


def test_a_symbolic_length_is_guarded() -> None:
    """One graph serves all lengths on a side of the crossover."""
    torch._dynamo.reset()
    graphs: list[int] = []
    model = torch.compile(Attention(), backend="dilated", dynamic=True, options=options())
    lengths = ((600, True), (64, False), (900, True), (100, False), (500, True))
    with torch._dynamo.config.patch(error_on_recompile=False):
        for length, rewritten in lengths:
            assert is_rewritten(length, model) == rewritten
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]
    assert graphs[1] == graphs[0] + 1


def test_the_report_says_from_where_on() -> None:
    x = torch.randn(1, 8, 64, 64)
    report = dilcompile.explain(Attention(), x, policy=policy(WINDOW))
    (rejection,) = report.rejections
    assert "dense is faster below 27" in rejection.reason
    shown = " ".join(str(report).split())
    assert "Kept as the policy asks" in shown
    assert "keys on this device (cpu, kernel native, modelled)" in shown
    long = dilcompile.explain(Attention(), torch.randn(1, 8, 600, 64), policy=policy(WINDOW))
    assert "min_seq auto: faster than dense from 27" in " ".join(str(long).split())
