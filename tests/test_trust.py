"""A compiled kernel's numbers are checked once for each class of calls: what is refused, what is kept, and what nothing disturbs."""

from __future__ import annotations

import json
import logging
import os
import timeit
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import over_ranks
from test_kernels import FORMS, drawn, run, setting_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dilcompile.decision import Decision
from dilcompile.errors import DilcompileError, DilcompileWarning, KernelError
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import native, reference, select, triton
from dilcompile.lowering.call import Call, problem_of, relation_of
from dilcompile.lowering.choice import probing, trust, verdicts
from dilcompile.lowering.choice.miniature import kinds, miniature
from dilcompile.lowering.choice.verdicts import Verdict
from dilcompile.lowering.triton import plan, split
from dilcompile.lowering.triton.config import INTERPRETED
from dilcompile.relation import Problem
from dilcompile.report.kernels import kernel_of, refusal_of
from dilcompile.report.rows import row_of
from dilcompile.site import AttentionSite, MaskSpec

FORM = Dilated([8, 16], [1, 2])


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checks that are made."""
    made: list[str] = []
    right = trust.check

    def counted(kernel: Any, call: Call, backward: bool) -> Verdict:
        made.append("backward" if backward else "forward")
        return right(kernel, call, backward)

    monkeypatch.setattr(trust, "check", counted)
    return made


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(trust.OPTION, "disk")
    monkeypatch.setattr(verdicts, "folder", lambda: tmp_path / "trust")
    return tmp_path / "trust"


def qkv(length: int = 20, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return drawn(q_len=length, k_len=length, **{"dtype": torch.float32, **more})


def call_of(form: Form = FORM, length: int = 20, causal: bool = True, **more: Any) -> Call:
    q, k, v = qkv(length, **{name: held for name, held in more.items() if name in ("dim", "v_dim", "heads", "kv_heads", "dtype")})
    problem = problem_of(q, k, v, causal, None, None, more.get("q_offset", 0))
    made = Call(q, k, v, None, None, None, None, relation_of(form, problem), 0.3)
    return replace(made, **{name: held for name, held in more.items() if name in {field.name for field in fields(Call)}})


def attend(kernel: str | None = None, length: int = 20) -> Tensor:
    q, k, v = qkv(length)
    out: Tensor = run(q, k, v, FORM, kernel, setting_of(q, k, causal=True))[0]
    return out


# What is wrong is seen


def perturbed_forward(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = native.forward

    def wrong(call: Call) -> tuple[Tensor, Tensor]:
        out, lse = right(call)
        if name == "a factor":
            out *= 1.05
        elif name == "one row":
            out[0, 0, -1] += 1
        elif name == "a number that is none":
            out[0, 0, 3, 0] = torch.nan
        elif name == "rows without keys":
            lse[lse == -torch.inf] = 0
        elif name == "the LSE":
            lse += 0.1
        else:
            out, lse = right(replace(call, relation=replace(call.relation, terms=call.relation.terms[:1])))
        return out, lse

    monkeypatch.setattr(native, "forward", wrong)


WRONG = ["a factor", "one row", "a number that is none", "the LSE", "a branch left out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_forward_is_seen(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.check(native, call_of(dtype=dtype), False).passes
    perturbed_forward(monkeypatch, name)
    verdict = trust.check(native, call_of(dtype=dtype), False)
    assert not verdict.passes
    assert verdict.of == ("lse" if name == "the LSE" else verdict.of)


def test_an_lse_of_rows_without_keys_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = torch.ones(2, 20, dtype=torch.bool)
    assert trust.check(native, call_of(key_padding=keep), False).passes
    perturbed_forward(monkeypatch, "rows without keys")
    assert trust.check(native, call_of(key_padding=keep), False).error == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_wrong_gradient_is_seen(index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.check(native, call_of(dtype=dtype), True).passes
    right = native.backward

    def wrong(*arguments: Any) -> Any:
        grads = list(right(*arguments))
        grads[index] = grads[index] * 1.1
        return tuple(grads)

    monkeypatch.setattr(native, "backward", wrong)
    verdict = trust.check(native, call_of(dtype=dtype), True)
    assert not verdict.passes
    assert verdict.of == f"the gradient of {'qkv'[index]}"


def test_a_forgotten_gradient_of_the_lse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.backward
    monkeypatch.setattr(native, "backward", lambda call, out, lse, grad, grad_lse: right(call, out, lse, grad, None))
    assert not trust.check(native, call_of(), True).passes


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_right_kernels_pass(form: Form) -> None:
    for call in (call_of(form), call_of(form, causal=False, dtype=torch.bfloat16, heads=6)):
        for backward in (False, True):
            if select.refusal(native, call, backward) is None:
                assert trust.check(native, call, backward).passes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_kernels_pass_with_every_operand(dtype: torch.dtype) -> None:
    biases = [torch.zeros(shape, dtype=of) for shape in ((1,), (20,), (20, 1), (2, 4, 20, 20)) for of in (dtype, torch.float32)]
    for more in (*DIFFERENT.values(), *({"bias": bias} for bias in biases)):
        call = call_of(**{"dtype": dtype, **more})
        for backward in (False, True):
            if select.refusal(native, call, backward) is None:
                verdict = trust.check(native, call, backward)
                assert verdict.passes, (more, verdict)


# What follows from it


FIGURE = (
    r"its numbers are wrong on cpu \w+ in float32 \(forward of .*\): the error of out is \d\.\d+e[-+]\d+, more than \d\.\d+e-\d+"
)


def test_the_next_kernel_computes_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = attend("reference")
    perturbed_forward(monkeypatch, "a factor")
    with pytest.warns(DilcompileWarning, match=rf"^kernel 'native' is not used: {FIGURE}") as told:
        found = attend()
    assert len(told) == 1
    torch.testing.assert_close(found, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(attend(length=25), attend("reference", length=25))


def test_asked_for_by_name_it_is_an_error_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed_forward(monkeypatch, "a factor")
    with pytest.raises(KernelError, match=rf"kernel 'native' can't compute this attention: {FIGURE}.*; kernel 'cpu' can"):
        attend("native")


def test_a_kernel_that_raises_is_passed_over_and_not_remembered(monkeypatch: pytest.MonkeyPatch, on_disk: Path) -> None:
    def broken(call: Call) -> Any:
        raise RuntimeError("no such instruction\nat 0x0")

    monkeypatch.setattr(native, "forward", broken)
    with pytest.warns(
        DilcompileWarning, match=r"its check on .* failed: RuntimeError: no such instruction; the next one computes"
    ):
        attend()
    assert not on_disk.exists()


def test_a_want_of_memory_says_nothing_about_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.forward

    def full(call: Call) -> Any:
        raise MemoryError

    monkeypatch.setattr(native, "forward", full)
    with pytest.warns(DilcompileWarning, match="there was no memory left to check its numbers"):
        attend()
    monkeypatch.setattr(native, "forward", right)
    attend("native")


def test_a_report_says_which_kernel_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    perturbed_forward(monkeypatch, "a factor")
    f32, cpu = torch.float32, torch.device("cpu")
    site = AttentionSite(0, "m", "", "sdpa", "self", 2, 4, 2, 20, 20, 8, 8, f32, f32, cpu, 0.3, MaskSpec(causal=True))
    decision = Decision(site, "r", FORM, "approximate")
    assert kernel_of(decision).forward == "native"
    with pytest.warns(DilcompileWarning):
        attend()
    choice = kernel_of(decision)
    assert choice.forward == "cpu"
    assert choice.passed_over is not None
    assert choice.passed_over.startswith("kernel native is not used: its numbers are wrong on cpu")
    assert choice.passed_over in row_of(decision).notes
    assert "its numbers are wrong" in (refusal_of(replace(decision, kernel="native")) or "")


# When it is made


def test_one_check_for_a_class_of_calls(checks: list[str]) -> None:
    for length in (20, 33, 50):
        attend(length=length)
        attend("native", length)
    assert checks == ["forward"]
    q, k, v = (x.requires_grad_() for x in qkv())
    for _ in range(2):
        run(q, k, v, FORM, None, setting_of(q, k, causal=True))[0].sum().backward()
    assert checks == ["forward", "backward"]


DIFFERENT: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": torch.bfloat16},
    "head size": {"dim": 16, "v_dim": 8},
    "values' size": {"v_dim": 16},
    "group": {"heads": 8},
    "mask": {"causal": False},
    "form": {"form": Dense()},
    "place": {"q_offset": 3},
    "few rows": {"length": 3},
    "softcap": {"softcap": 2.0},
    "padding": {"key_padding": torch.ones(2, 20, dtype=torch.bool)},
    "documents": {"documents": torch.zeros(1, 20, dtype=torch.int64)},
    "documents of rows": {"documents": torch.zeros(2, 20, dtype=torch.int64)},
    "limits": {"row_limits": torch.zeros(2, 1, 20, dtype=torch.int64)},
    "dropout": {"dropout_p": 0.1, "dropout_seed": torch.tensor([1])},
    "bias": {"bias": torch.zeros(20, 20)},
    "bias of heads": {"bias": torch.zeros(4, 20, 20)},
    "bias dtype": {"bias": torch.zeros(20, 20, dtype=torch.bfloat16)},
    "LSE": {"dtype": torch.bfloat16, "exact_lse": False},
}


def test_other_classes_are_checked_by_themselves() -> None:
    keys = [trust._key(native, call_of(**more), False) for more in ({}, *DIFFERENT.values())]
    assert len(set(keys)) == len(keys)
    assert trust._key(native, call_of(), True) not in keys
    assert trust._key(native, call_of(length=33), False) == keys[0]
    assert trust._key(native, call_of(Dilated([16, 32, 64], [1, 2, 4]), 300), False) == trust._key(
        native, call_of(Dilated([16, 64], [1, 8]), 700), False
    )


def test_every_part_of_a_call_is_thought_of() -> None:
    """A field that is added to ``Call`` belongs into the class of calls and into what stands for it, or here."""
    by_shape = {"q", "k", "v", "relation"}
    in_the_class = {
        "key_padding", "documents", "bias", "dropout_seed", "softcap", "dropout_p", "merge_grad", "row_limits", "pairs", "flat",
        "bias_grad", "pages", "exact_lse", "selection", "held",
    }  # fmt: skip
    # Any scale is a factor; a narrow softmax is the reference's alone; where results lie changes no number.
    of_no_matter = {"scale", "narrow", "room"}
    assert {field.name for field in fields(Call)} == by_shape | in_the_class | of_no_matter


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kernel", ["native", "triton"])
def test_what_stands_for_a_call_is_taken_by_the_kernel(kernel: str, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    for more in ({}, *DIFFERENT.values()):
        call = call_of(**{"form": form, **more})
        for backward in (False, True):
            if select.refusal(select.KERNELS[kernel], call, backward) is None:
                small = miniature(call)
                assert select.refusal(select.KERNELS[kernel], small, backward) is None
                assert kinds(small.relation) == kinds(call.relation)
                assert trust._key(native, small, backward) == trust._key(native, call, backward)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 80), st.sampled_from([1, 2, 3, 4, 7, 8, 16, 24, 64, 128]), st.sampled_from([1, 200, 255, 256, 5000, 1 << 20])
)
def test_what_stands_for_few_rows_goes_to_the_same_kernel(q_len: int, group: int, k_len: int) -> None:
    size = Problem(3, 2 * group, 2, q_len, k_len, 64, 64, q_offset=5)
    small = miniature(replace(call_of(), relation=Dense().relation(size))).problem
    assert split.is_decode(small) == split.is_decode(size)
    if split.is_decode(size) and group <= 64:
        assert split.rows_of_tile(small, split.packed(small)) == split.rows_of_tile(size, split.packed(size))


@pytest.mark.parametrize(
    "form",
    [Dense(), SlidingWindow(4096), Dilated([2048, 8192], [1, 4]), Dilated([2048, 8192], [1, 4], offset="own", sinks=4)],
    ids=str,
)
def test_what_stands_for_a_decode_step_is_shared_out(form: Form) -> None:
    """As on a device that runs 264 programs at once."""
    problem = Problem(1, 32, 8, 1, 1 << 17, 64, 64, q_offset=(1 << 17) - 1, is_causal=True)
    small = miniature(replace(call_of(), relation=form.relation(problem))).relation
    made = plan.plan_of_few(small, 4, False, torch.device("cpu"))
    assert split.parts_of(small, made, INTERPRETED, 264) > 1


def test_keys_in_pages_are_those_in_a_row() -> None:
    call = call_of()
    pool = [torch.randn(7, 2, 16, 64) for _ in range(2)]
    paged = replace(call, k=pool[0], v=pool[1], pages=torch.zeros(2, 3, dtype=torch.int32))
    assert trust._key(triton, paged, False) != trust._key(triton, call, False)
    for found, expected in zip(reference.forward(miniature(paged)), reference.forward(miniature(call)), strict=True):
        # The pages are drawn between the keys and the rest, which is of no matter here.
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_same_small_call_every_time() -> None:
    torch.testing.assert_close(miniature(call_of()).q, miniature(call_of()).q, rtol=0, atol=0)


def test_nothing_is_computed_for_operands_without_data(checks: list[str]) -> None:
    with FakeTensorMode():
        call = call_of()
        assert select.select(call) is native
        assert select.select(call, "native", backward=True) is native
    assert checks == []
    attend()
    assert checks == ["forward"]


def test_tracing_checks_nothing(checks: list[str]) -> None:
    q, k, v = qkv()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, FORM, is_causal=True)
        assert isinstance(out, Tensor)
        return out * 2

    seen: list[int] = []

    def watched(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(len(checks))
        return gm.forward

    compiled = torch.compile(layer, backend=watched, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    assert seen == [0]
    assert checks == ["forward"]
    aot = torch.compile(layer, backend="aot_eager", fullgraph=True)
    q, k, v = (x.requires_grad_() for x in qkv(length=21))
    aot(q, k, v).sum().backward()
    assert checks == ["forward", "backward"]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    state = [True]
    monkeypatch.setattr(probing, "captured", lambda device: state[0])
    return state


def test_while_a_graph_is_captured_only_what_is_known_is_used(captured: list[bool], checks: list[str]) -> None:
    with pytest.warns(DilcompileWarning, match=r"were never checked .*, and a CUDA graph is being captured; call it once before"):
        attend()
    with pytest.raises(KernelError, match="call it once before capturing; kernel 'cpu' can"):
        attend("native")
    assert checks == []
    captured[0] = False
    attend()
    captured[0] = True
    attend("native")
    assert checks == ["forward"]


# What it leaves alone


def test_nothing_of_the_callers_state_changes(checks: list[str]) -> None:
    torch.manual_seed(7)
    q, k, v = (x.requires_grad_() for x in qkv())
    before = torch.random.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        run(q, k, v, FORM, None, setting_of(q, k, causal=True))[0].sum().backward()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert checks == ["forward", "backward"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_what_the_caller_has_switched_on_does_not_reach_it(checks: list[str]) -> None:
    q, k, v = qkv()
    at = setting_of(q, k, causal=True)
    with torch.device("meta"), torch.inference_mode():
        run(q, k, v, FORM, None, at)
    trust.forget()
    counter = FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", dtype=torch.bfloat16):
        run(q, k, v, FORM, None, at)
    counted = counter.get_total_flops()
    with FlopCounterMode(display=False) as again, torch.autocast("cpu", dtype=torch.bfloat16):
        run(q, k, v, FORM, None, at)
    assert counted == again.get_total_flops()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        trust.forget()
        run(q, k, v, FORM, None, at)
    finally:
        torch.set_default_dtype(default)
    assert len(checks) == 3


def test_the_look_up_is_quick() -> None:
    call = call_of()
    trust.doubt(native, call, False)
    seconds = min(timeit.repeat(lambda: trust.doubt(native, call, False), number=1000, repeat=20)) / 1000
    # 3 microseconds; the rest is for machines that are busy.
    assert seconds < 20e-6


# What is kept


def test_a_verdict_is_kept_on_disk(on_disk: Path, checks: list[str]) -> None:
    attend()
    trust.forget()
    attend()
    assert checks == ["forward"]
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    assert held["about"]["kernel"] == "native"
    assert f"torch {torch.__version__}" in held["about"]["made from"]
    assert held["verdict"]["error"] <= held["verdict"]["bound"]


def test_a_wrong_kernel_is_remembered_and_told_of_again(
    on_disk: Path, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbed_forward(monkeypatch, "a factor")
    for _ in range(2):
        with pytest.warns(DilcompileWarning, match=FIGURE):
            attend()
        trust.forget()
    assert checks == ["forward"]


@pytest.mark.parametrize("part", ["made from", "device", "checked by", "kernel", "class", "switches", "dtype"])
def test_a_verdict_about_anything_else_is_none(part: str, on_disk: Path, checks: list[str]) -> None:
    """Written under this name, but about another kernel, device or version."""
    attend()
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    held["about"][part] = "another"
    file.write_text(json.dumps(held))
    trust.forget()
    attend()
    assert checks == ["forward", "forward"]
    assert json.loads(file.read_text())["about"][part] != "another"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"about": 3}', b"\xff\xfe".decode("latin1"), "KEEP", "NUMBERS", "NAN"],
)
def test_a_file_that_is_none_is_made_again(text: str, on_disk: Path, checks: list[str]) -> None:
    attend()
    (file,) = on_disk.iterdir()
    held = json.loads(file.read_text())
    changed = {
        "KEEP": {"about": held["about"]},
        "NUMBERS": held | {"verdict": {"of": "out", "error": "none", "bound": []}},
        "NAN": held | {"verdict": {"of": "out", "error": float("nan"), "bound": 1.0}},
    }
    file.write_bytes((json.dumps(changed[text]) if text in changed else text).encode("latin1"))
    trust.forget()
    attend()
    assert checks == ["forward", "forward"]
    assert json.loads(file.read_text()) == held


def test_a_folder_that_can_not_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trust.OPTION, "disk")
    monkeypatch.setattr(verdicts, "folder", lambda: tmp_path / "file" / "trust")
    with caplog.at_level(logging.INFO, "dilcompile.lowering.choice.verdicts"):
        attend()
    attend()
    assert checks == ["forward"]
    assert "the verdict about kernel native could not be kept" in caplog.text


def said_in_a_process(rank: int, folder: Path) -> str:
    """What is logged when the first call of a process comes, at the same time in all of them."""
    os.environ[trust.OPTION] = "disk"
    verdicts.folder = lambda: folder
    said = StringIO()
    logging.basicConfig(level=logging.INFO, stream=said, format="%(message)s")
    torch.distributed.barrier()
    x = torch.randn(1, 2, 40, 8)
    attention(x, x, x, FORM)
    return said.getvalue()


def test_processes_at_once_and_after_each_other(tmp_path: Path) -> None:
    attend("native")
    said = over_ranks({"at once": 2}, said_in_a_process, tmp_path)
    assert any("checked kernel native" in text for text in said)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    (later,) = over_ranks({"after": 1}, said_in_a_process, tmp_path)
    assert "checked kernel" not in later


def test_the_option(monkeypatch: pytest.MonkeyPatch, on_disk: Path, checks: list[str]) -> None:
    monkeypatch.setenv(trust.OPTION, "off")
    attend("native")
    assert checks == []
    monkeypatch.setenv(trust.OPTION, "memory")
    attend("native")
    assert checks == ["forward"]
    assert not on_disk.exists()
    trust.forget()
    monkeypatch.setenv(trust.OPTION, "of")
    with pytest.raises(DilcompileError, match=r"DILCOMPILE_TRUST takes disk, memory, off, got 'of' \(did you mean 'off'\?\)"):
        attend("native")


def test_files_lie_in_torchs_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert verdicts.folder() == tmp_path / "dilcompile" / "trust"


def test_only_what_is_compiled_is_checked(checks: list[str]) -> None:
    for kernel in ("cpu", "reference"):
        attend(kernel)
    q, k, v = qkv(kv_heads=4)
    run(q, k, v, Dense(), "sdpa", setting_of(q, k, causal=True))
    assert checks == []
    assert reference.fingerprint(call_of()) is None


def test_triton_goes_before_flash_and_its_interpreter_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(select.KERNELS)
    assert names.index("triton") < names.index("flash")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    dropped = call_of(dropout_p=0.1, dropout_seed=torch.tensor([1]))
    assert select.refusal(triton, dropped, False) is None
    assert select.select(dropped) is not triton
    assert triton.fingerprint(dropped) is None
