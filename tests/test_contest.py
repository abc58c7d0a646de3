"""Kernels are timed once for each class of calls: what is chosen, what is kept, what is left out, and when nothing is timed."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock
from ranks import over_ranks
from test_trust import call_of, qkv
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dilcompile.decision import Decision
from dilcompile.errors import DilcompileError, DilcompileWarning
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import cpu, native, reference, sdpa, select
from dilcompile.lowering.call import Call
from dilcompile.lowering.choice import contest, probing, trust
from dilcompile.report.kernels import kernel_of
from dilcompile.report.rows import row_of
from dilcompile.site import AttentionSite, MaskSpec

RIVALS = ("native", "sdpa", "cpu", "reference")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(contest.OPTION, "memory")
    contest.forget()
    trust.forget()
    yield
    contest.forget()
    trust.forget()


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(contest.OPTION, "disk")
    monkeypatch.setattr(contest, "folder", lambda: tmp_path / "tune")
    return tmp_path / "tune"


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Kernels of the CPU are timed, and take these seconds in their order."""

    def of(*seconds: float) -> Clock:
        clock = Clock(*seconds)
        monkeypatch.setitem(select.RIVALS, "cpu", RIVALS)
        monkeypatch.setattr(contest, "timer_of", lambda device: clock)
        return clock

    return of


def dense(length: int = 20, **more: Any) -> Call:
    return call_of(Dense(), length, kv_heads=4, **more)


# What is chosen


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [((1, 2, 3, 4), native), ((2, 1, 3, 4), sdpa), ((9, 8, 1, 4), cpu), ((5, 5, 5, 4), reference), ((3, 3, 3, 3), native)],
)
@pytest.mark.parametrize("backward", [False, True])
def test_the_fastest_computes(seconds: tuple[float, ...], wanted: object, backward: bool, clocked: Any) -> None:
    clock = clocked(*seconds)
    for _ in range(3):
        assert select.select(dense(), backward=backward) is wanted
    assert clock.runs == 4


def test_forward_and_backward_are_timed_apart(clocked: Any) -> None:
    clock = clocked(4, 3, 2, 1, 1, 2, 3, 4)
    assert select.select(dense()) is reference
    assert select.select(dense(), backward=True) is native
    assert clock.runs == 8


def test_only_what_is_able_and_trusted_is_timed(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked(3, 2, 1)
    # sdpa takes no windows.
    assert select.select(call_of(SlidingWindow(5), kv_heads=4)) is reference
    assert clock.runs == 3
    right = native.forward
    monkeypatch.setattr(native, "forward", lambda call: tuple(x * 1.1 for x in right(call)))
    trust.forget()
    contest.forget()
    clock = clocked(3, 2)
    with pytest.warns(DilcompileWarning, match="kernel 'native' is not used"):
        assert select.select(call_of(SlidingWindow(5), kv_heads=4)) is reference
    assert clock.runs == 2


def test_a_winner_that_can_not_compute_a_call_of_its_class_gives_way(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(4, 1, 2, 3)
    assert select.select(dense()) is sdpa
    monkeypatch.setattr(sdpa, "supports", lambda call, backward: "not now")
    assert select.select(dense()) is cpu


def test_real_kernels_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator: the reference, which is far slower at this length, is never the one."""
    monkeypatch.setitem(select.RIVALS, "cpu", RIVALS)
    monkeypatch.setattr(contest, "_RUNS", 3)
    q, k, v = (x.float() for x in qkv(600, kv_heads=4, dim=32, v_dim=32))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, Dense(), is_causal=True)
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out.sum(), leaves)
    wanted = attention(*leaves, Dense(), is_causal=True, kernel="reference")
    # Which kernel is taken is asked here, not how exact: float32 sums over 600 keys in another order.
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)
    for backward in (False, True):
        times = contest.known(call_of(Dense(), 600, kv_heads=4, dim=32, v_dim=32), backward)
        assert times is None or list(times)[-1] == "reference"
    assert contest.num_known() == 2
    assert all(set(times) == set(RIVALS) for times in contest._times.values())
    assert all(max(times, key=lambda name: times[name]) == "reference" for times in contest._times.values())


def test_a_hopeless_candidate_runs_once_and_a_slow_one_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    ticks = iter(range(100))
    monkeypatch.setattr(contest.time, "perf_counter", lambda: 0.01 * next(ticks))
    # Each run takes one tick of this clock: more than twice the best, then not.
    contest._by_clock(lambda: ran.append(1), 0.003)
    assert len(ran) == 2
    contest._by_clock(lambda: ran.append(1), 0.006)
    assert len(ran) == 2 + 1 + contest._RUNS
    monkeypatch.setattr(contest.time, "perf_counter", lambda: 0.3 * next(ticks))
    contest._by_clock(lambda: ran.append(1), float("inf"))
    assert len(ran) == 2 + 1 + contest._RUNS + 1 + 2


def test_without_memory_for_a_backwards_operands_the_first_computes(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked()

    def full(*arguments: object, **options: object) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(contest, "empty_output", full)
    for _ in range(2):
        assert select.select(dense(), backward=True) is native
    assert clock.runs == 0


class Events:
    """Device events that a clock stands behind."""

    now, synchronized = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Events.now

    def synchronize(self) -> None:
        Events.synchronized += 1

    def elapsed_time(self, other: Events) -> float:
        """Milliseconds."""
        assert Events.synchronized
        return (other.at - self.at) * 1e3


def test_device_events_give_the_median_after_a_run_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Events)
    taken = iter([9.0, 0.03, 0.01, 0.02, 0.09, 0.04, 7.0, 0.08])
    runs: list[float] = []

    def run() -> None:
        runs.append(next(taken))
        Events.now += runs[-1]

    timer = contest.timer_of(torch.device("cuda"))
    assert timer(run, float("inf")) == pytest.approx(0.03)
    assert runs == [9.0, 0.03, 0.01, 0.02, 0.09, 0.04]
    # More than twice the best: no further run.
    assert timer(run, 0.03) == pytest.approx(0.08)
    assert len(runs) == 8


# A class


def test_lengths_inside_a_class_are_not_timed_again(clocked: Any) -> None:
    clock = clocked(4, 3, 2, 1)
    for length in (520, 600, 777, 1023):
        assert select.select(dense(length)) is reference
    assert clock.runs == 4


@pytest.mark.parametrize(
    "other",
    [
        lambda: dense(40), lambda: dense(heads=4, dtype=torch.bfloat16), lambda: dense(dim=16, v_dim=16),
        lambda: dense(causal=False), lambda: dense(key_padding=torch.ones(2, 20, dtype=torch.bool)),
        lambda: replace(dense(), merge_grad="detach"), lambda: call_of(Dense(), heads=8, kv_heads=8),
    ],
)  # fmt: skip
def test_other_classes_are(other: Callable[[], Call], clocked: Any) -> None:
    clock = clocked(4, 3, 2, 1, 4, 3, 2, 1)
    select.select(dense())
    before = clock.runs
    select.select(other())
    assert clock.runs > before


@pytest.mark.parametrize("form", [Dense(), SlidingWindow(256), Dilated([256, "seq"], [1, 4])])
def test_a_class_has_few_densities(form: Form) -> None:
    """Between two powers of two, a window's share of the pairs halves once at most."""
    classes = {contest._key(call_of(form, length), False) for length in range(1024, 2048, 100)}
    assert len(classes) <= 2
    assert len({contest._key(call_of(Dense(), length), False) for length in range(1024, 2048, 100)}) == 1


# A candidate that raises


def test_a_candidate_that_raises_is_left_out_with_a_warning(clocked: Any, monkeypatch: pytest.MonkeyPatch, on_disk: Path) -> None:
    clocked(1, 3, 2)

    def broken(call: Call) -> Any:
        raise RuntimeError("too many registers\nat 0x0")

    monkeypatch.setattr(sdpa, "forward", broken)
    with pytest.warns(
        DilcompileWarning, match=r"^kernel 'sdpa' is left out of the choice by speed: RuntimeError: too many registers$"
    ):
        assert select.select(dense()) is native
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select.select(dense()) is native
    # It may not raise another time.
    assert not on_disk.exists()


def test_if_all_raise_the_first_computes(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked()

    def full(call: Call) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setenv(trust.OPTION, "off")
    for kernel in (native, sdpa, cpu, reference):
        monkeypatch.setattr(kernel, "forward", full)
    with pytest.warns(DilcompileWarning, match="OutOfMemoryError"):
        assert select.select(dense()) is native


# When nothing is timed


def test_without_rivals_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" not in select.RIVALS
    monkeypatch.setattr(contest, "timer_of", None)
    assert select.select(dense()) is native
    assert contest.num_known() == 0


def test_one_candidate_is_not_timed(clocked: Any) -> None:
    clock = clocked()
    # Only the reference repeats the rounding of such a softmax.
    assert select.select(replace(dense(dtype=torch.float64), narrow=True)) is reference
    assert clock.runs == 0


def test_off(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked(4, 3, 2, 1)
    monkeypatch.setenv(contest.OPTION, "off")
    assert select.select(dense()) is native
    assert clock.runs == 0
    monkeypatch.setenv(contest.OPTION, "memory")
    assert select.select(dense()) is reference
    monkeypatch.setenv(contest.OPTION, "off")
    assert select.select(dense()) is native


def test_an_unknown_value_is_an_error(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked()
    monkeypatch.setenv(contest.OPTION, "on")
    with pytest.raises(DilcompileError, match=r"DILCOMPILE_TUNE takes disk, memory, off, got 'on'"):
        select.select(dense())


def test_operands_without_data_a_captured_graph_and_determinism_time_nothing(
    clocked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clocked(4, 3, 2, 1)
    with FakeTensorMode():
        assert select.select(dense()) is native
    with monkeypatch.context() as patch:
        patch.setattr(probing, "captured", lambda device: True)
        patch.setenv(trust.OPTION, "off")
        assert select.select(dense()) is native
    torch.use_deterministic_algorithms(True)
    try:
        assert select.select(dense()) is native
    finally:
        torch.use_deterministic_algorithms(False)
    assert clock.runs == 0
    assert select.select(dense()) is reference
    # What is known by then counts where nothing can be timed, but not where a clock must not decide.
    with FakeTensorMode():
        assert select.select(dense()) is reference
    with monkeypatch.context() as patch:
        patch.setattr(probing, "captured", lambda device: True)
        assert select.select(dense()) is reference
    torch.use_deterministic_algorithms(True)
    try:
        assert select.select(dense()) is native
    finally:
        torch.use_deterministic_algorithms(False)


def test_while_the_clock_does_not_decide_nobody_else_is_asked(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking may check numbers, which warns while a graph is captured."""
    clock, asked = clocked(), []
    right = select.refusal

    def watched(kernel: Any, call: Call, backward: bool) -> str | None:
        asked.append(kernel)
        return right(kernel, call, backward)

    monkeypatch.setattr(select, "refusal", watched)
    monkeypatch.setenv(contest.OPTION, "off")
    select.select(dense())
    monkeypatch.setenv(contest.OPTION, "memory")
    monkeypatch.setattr(probing, "captured", lambda device: True)
    monkeypatch.setenv(trust.OPTION, "off")
    select.select(dense())
    assert asked == [native, native]
    assert contest.fastest([native, sdpa], dense(), False) is native
    assert clock.runs == 0


def test_a_named_kernel_is_not_timed(clocked: Any) -> None:
    clock = clocked()
    assert select.select(dense(), "cpu") is cpu
    assert clock.runs == 0


def test_nothing_of_the_callers_is_disturbed(clocked: Any) -> None:
    clocked(1, 2, 3, 4, 1, 2, 3, 4)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        select.select(dense())
        select.select(dense(), backward=True)
    assert torch.equal(torch.rand(3), wanted)


# What is kept


def test_times_are_kept_on_disk(on_disk: Path, clocked: Any) -> None:
    clocked(4, 3, 2, 1)
    assert select.select(dense()) is reference
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    assert held["times"] == {"native": 4, "sdpa": 3, "cpu": 2, "reference": 1}
    assert f"torch {torch.__version__}" in held["about"]["versions"]
    contest.forget()
    clock = clocked()
    assert select.select(dense()) is reference
    with FakeTensorMode():
        contest.forget()
        assert select.select(dense()) is reference
    assert clock.runs == 0


@pytest.mark.parametrize("part", ["kernels", "versions", "device", "class", "timed by"])
def test_times_of_anything_else_are_none(part: str, on_disk: Path, clocked: Any) -> None:
    clocked(4, 3, 2, 1)
    select.select(dense())
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    held["about"][part] = "another"
    file.write_text(json.dumps(held))
    contest.forget()
    clock = clocked(1, 2, 3, 4)
    assert select.select(dense()) is native
    assert clock.runs == 4


def test_another_version_of_a_kernel_is_timed_anew(on_disk: Path, clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(4, 3, 2, 1)
    select.select(dense())
    contest.forget()
    monkeypatch.setattr(sdpa, "fingerprint", lambda call: "of tomorrow")
    clock = clocked(1, 2, 3, 4)
    assert select.select(dense()) is native
    assert clock.runs == 4
    assert len(list(on_disk.iterdir())) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"about": 3}', "\xff\xfe", "KEEP", "LIST", "WORD", "NAN", "NEGATIVE", "EMPTY", "INFINITE"]
)
def test_a_file_that_is_none_is_made_again(text: str, on_disk: Path, clocked: Any) -> None:
    clocked(4, 3, 2, 1)
    select.select(dense())
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    times = {"LIST": [1, 2], "WORD": {"native": "quick"}, "NAN": {"native": float("nan")}, "NEGATIVE": {"native": -1.0}, "EMPTY": {},
             "INFINITE": {"native": float("inf")}}  # fmt: skip
    changed = {name: held | {"times": value} for name, value in times.items()} | {"KEEP": {"about": held["about"]}}
    file.write_bytes((json.dumps(changed[text]) if text in changed else text).encode("latin1"))
    contest.forget()
    clock = clocked(4, 3, 2, 1)
    assert select.select(dense()) is reference
    assert clock.runs == 4
    assert json.loads(file.read_text()) == held


def test_a_folder_that_can_not_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clocked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    clocked(4, 3, 2, 1)
    monkeypatch.setenv(contest.OPTION, "disk")
    monkeypatch.setattr(contest, "folder", lambda: tmp_path / "file" / "tune")
    with caplog.at_level(logging.INFO, "dilcompile.lowering.choice.contest"):
        assert select.select(dense()) is reference
    assert select.select(dense()) is reference
    assert "could not be kept" in caplog.text


def said_in_a_process(rank: int, folder: Path) -> str:
    """What is logged when the first call of a process comes, at the same time in all of them."""
    os.environ[contest.OPTION] = "disk"
    contest.folder = lambda: folder
    select.RIVALS["cpu"] = RIVALS
    said = StringIO()
    logging.basicConfig(level=logging.INFO, stream=said, format="%(message)s")
    torch.distributed.barrier()
    x = torch.randn(1, 2, 300, 8)
    attention(x, x, x, {"form": "dense"})
    (times,) = contest._times.values()
    assert sorted(times) == sorted(RIVALS)
    return said.getvalue()


def test_processes_at_once_and_after_each_other(tmp_path: Path) -> None:
    said = over_ranks({"at once": 2}, said_in_a_process, tmp_path)
    assert any("timed forward of" in text for text in said)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    before = next(tmp_path.iterdir()).read_text()
    (later,) = over_ranks({"after": 1}, said_in_a_process, tmp_path)
    assert "timed forward of" not in later
    assert next(tmp_path.iterdir()).read_text() == before


def test_files_lie_in_torchs_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert contest.folder() == tmp_path / "dilcompile" / "tune"


# What is said


def test_a_report_says_what_was_measured(clocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(4e-3, 3e-3, 2e-3, 1e-3)
    f32, device = torch.float32, torch.device("cpu")
    site = AttentionSite(0, "m", "", "sdpa", "self", 2, 4, 4, 20, 20, 8, 8, f32, f32, device, 0.3, MaskSpec(causal=True))
    decision = Decision(site, "r", Dense(), "exact")
    assert kernel_of(decision).forward == "native"
    assert kernel_of(decision).remarks == ()
    assert select.select(dense()) is reference
    choice = kernel_of(decision)
    assert choice.forward == "reference"
    assert choice.remarks == ("timed here (forward): reference 1 ms, cpu 2 ms, sdpa 3 ms, native 4 ms",)
    assert choice.remarks[0] in row_of(decision).notes


def test_on_cuda_all_that_run_there_are_rivals() -> None:
    others = {"native", "sdpa", "cpu", "reference"}
    assert set(select.RIVALS["cuda"]) == set(select.KERNELS) - others
