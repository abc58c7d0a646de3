"""The backend as users call it: every way of compiling gives the model's own numbers under the exact policy."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CausalAttention, MaskedBlock, NoAttention, SdpaAttention, Stack, llama
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dilcompile.errors import DilcompileWarning

EXACT = {"policy": "exact", "inner": "eager"}
WINDOW = {"policy": {"version": 1, "rules": [{"name": "w", "match": {}, "apply": {"form": "sliding_window", "window": 4}}]}}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, options: dict[str, Any] | None = None, **how: Any) -> Any:
    return torch.compile(model, backend="dilated", options=options or EXACT, **how)


def tally(name: str) -> int:
    return counters["dilcompile"][name]


def x64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [CausalAttention, SdpaAttention])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_forward_and_gradients(kind: type[nn.Module], inner: str) -> None:
    model, x = Stack(kind).double(), x64(2, 24, 32).requires_grad_()
    expected = model(x)
    expected.pow(2).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None] + [x.grad.clone()]
    model.zero_grad()
    x.grad = None
    found = compiled(model, {"policy": "exact", "inner": inner}, fullgraph=True)(x)
    found.pow(2).sum().backward()
    assert_same(found, expected)
    for ours, theirs in zip([*(p.grad for p in model.parameters() if p.grad is not None), x.grad], grads, strict=True):
        assert_same(ours, theirs)
    assert tally("sites_rewritten") == 2


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_lengths_change(dynamic: bool | None) -> None:
    model = Stack().double()
    fast = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for length in (16, 24, 40):
            x = x64(2, length, 32)
            assert_same(fast(x), model(x))
    assert tally("sites_rewritten") == 2 * tally("graphs")
    assert tally("graphs") == {True: 1, None: 2, False: 3}[dynamic]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_hugging_face(implementation: str, dynamic: bool) -> None:
    model = llama(implementation)
    ids = torch.randint(0, 96, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 14:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        found = compiled(model, dynamic=dynamic)(input_ids=ids, attention_mask=mask)[0]
    # Float32 all the way, so the bound is the model's own rounding.
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :14], expected[1, :14])
    assert tally("sites_rewritten") == 2


def test_the_policy_changes_the_numbers() -> None:
    model, x = Stack(SdpaAttention).double(), x64(2, 24, 32)
    windowed = compiled(model, {**WINDOW, "inner": "eager"})(x)
    assert not torch.allclose(windowed, model(x))

    class Windowed(nn.Module):
        def __init__(self, inner: SdpaAttention) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p.unflatten(-1, (4, -1)).transpose(1, 2) for p in self.inner.qkv(x).chunk(3, -1))
            t = torch.arange(x.shape[1])
            near = (t[:, None] >= t[None]) & (t[:, None] - t[None] < 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
            return out.transpose(1, 2).flatten(2)

    expected = x
    for layer in model.layers:
        expected = expected + Windowed(layer)(expected)
    assert_same(windowed, expected)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_activation_checkpoint(inner: str) -> None:
    model = Stack(SdpaAttention, checkpointed=True).double()
    x = x64(2, 24, 32).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).pow(2).sum(), x)
    (found,) = torch.autograd.grad(compiled(model, {"policy": "exact", "inner": inner})(x).pow(2).sum(), x)
    assert_same(found, expected)
    assert tally("sites_rewritten") == 2


def test_a_mask_from_outside_a_checkpoint() -> None:
    model = MaskedBlock().double()
    x, padding = x64(2, 24, 32).requires_grad_(), torch.ones(2, 24, dtype=torch.bool)
    padding[1, 17:] = False
    (expected,) = torch.autograd.grad(model(x, padding).pow(2).sum(), x)
    (found,) = torch.autograd.grad(compiled(model)(x, padding).pow(2).sum(), x)
    assert_same(found, expected)
    assert tally("sites_rewritten") == 1


def test_autocast_inside_and_outside() -> None:
    model, x = Stack(), torch.randn(2, 24, 32)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = inside(x)
    reference = copy.deepcopy(model).double()(x.double())
    for how in ("inside", "outside"):
        torch._dynamo.reset()
        if how == "inside":
            found = torch.compile(inside, backend="dilated", options=EXACT)(x)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found = compiled(model)(x)
        assert found.dtype is expected.dtype
        error = (found.double() - reference).abs().max()
        assert error <= 2 * (expected.double() - reference).abs().max()
    assert tally("sites_rewritten") == 4


def test_no_attention_is_left_untouched() -> None:
    model, x = NoAttention(), torch.randn(2, 8, 32)
    assert torch.equal(compiled(model)(x), model(x))
    assert tally("graphs") == 1
    assert tally("sites_found") == tally("misses") == 0


def test_a_graph_break_in_the_middle() -> None:
    model, x = Stack(broken=True).double(), x64(2, 24, 32)
    assert_same(compiled(model)(x), model(x))
    assert tally("graphs") == 2
    assert tally("sites_rewritten") == 2


def test_dropout_in_training() -> None:
    model, x = CausalAttention(dropout=0.5).double(), x64(2, 24, 32)
    fast = compiled(model)
    assert not torch.allclose(fast(x), fast(x)), "dropout must draw anew"
    model.eval()
    assert_same(fast(x), model(x))
    model.train()
    torch.manual_seed(1)
    # Every batch row draws for itself: 600 draws of each of the two.
    wide = x.repeat(100, 1, 1)
    drawn, spread = (torch.cat([one(wide).unflatten(0, (100, 2)) for _ in range(6)]) for one in (fast, model))
    error = (drawn.mean(0) - model.eval()(x)).abs().max()
    # The mean of many draws is the value without dropout, within five standard errors.
    assert error < 5 * spread.std(0).max() / 600**0.5
    # Of two batch rows the draws are as far apart as eager attention's, not the same.
    assert (drawn.std(0) / spread.std(0) - 1).abs().max() < 0.5


def test_weights_and_state_are_never_changed() -> None:
    model, x = Stack(), torch.randn(2, 24, 32)
    before = copy.deepcopy(model.state_dict())
    compiled(model, {"inner": "eager", "policy": "longnet"})(x)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert_same(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_mask_buffer_that_changes_is_noticed() -> None:
    model, x = CausalAttention().double(), x64(2, 24, 32)
    fast = compiled(model)
    assert_same(fast(x), model(x))
    assert tally("sites_rewritten") == 1
    model.mask.fill_(1.0)
    assert_same(fast(x), model(x))


def test_second_call_and_deepcopy() -> None:
    model, x = Stack().double(), x64(2, 24, 32)
    fast = compiled(model)
    first = fast(x)
    assert torch.equal(fast(x), first)
    assert_same(compiled(copy.deepcopy(model))(x), first)


def test_fuel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILCOMPILE_FUEL", "1")
    model, x = Stack().double(), x64(2, 24, 32)
    assert_same(compiled(model)(x), model(x))
    assert tally("sites_rewritten") == 1
    assert tally("sites_found") == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"polcy": "exact"},
            r"options: unknown key 'polcy' \(did you mean 'policy'\?\); the keys are policy, mode, inner, report",
        ),
        ({"inner": "nvfuser"}, "options: inner must be one of inductor, aot_eager, eager, not 'nvfuser'"),
        ({"inner": 3}, "options: inner must be one of inductor, aot_eager, eager, not 3"),
        ({"mode": 3}, "options: mode must be one of default, .*, not 3"),
        ({"policy": 3}, "a policy is a path, a preset's name, a dict or a Policy, not 3"),
        ({"policy": ""}, "a policy is a path, a preset's name, a dict or a Policy, not an empty text"),
        ({"report": 3}, "options: report must be the path of an .html or .json file, not 3; leave it out for no report"),
        ({"report": True}, "options: report must be the path of an .html or .json file, not True; leave it out for no report"),
        ({"mode": "fast"}, "options: mode must be one of default, .*, not 'fast'"),
        ({"mode": "max-autotune", "inner": "eager"}, "options: mode 'max-autotune' is Inductor's, but inner is 'eager'"),
        ({"policy": "exact", "inner": "eager", "report": "x.pdf"}, r"\.pdf"),
        ({"policy": "no-such-preset"}, "no-such-preset"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(Exception, match=text):
        compiled(Stack(), options)(torch.randn(2, 8, 32))


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_the_mode_is_inductors(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gets the settings that torch.compile gives it for a mode, and the graph with its attention."""
    seen = []

    def compile_fx(gm: Any, example_inputs: Any, inner_compile: Any, config_patches: Any) -> Any:
        seen.append((config_patches, sum("dilcompile.attention" in str(node.target) for node in gm.graph.nodes)))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, x = Stack().double(), x64(2, 24, 32)
    assert_same(compiled(model, {"policy": "exact"} | ({} if mode is None else {"mode": mode}))(x), model(x))
    assert seen == [({} if mode is None else torch._inductor.list_mode_options(mode), 2)]
    assert mode != "reduce-overhead" or seen[0][0]["triton.cudagraphs"]


def _rule(**fallback: str) -> dict[str, Any]:
    rule = {"name": "w", "match": {}, "apply": {"form": "dense"}}
    return {"policy": {"version": 1, "defaults": {"fallback": fallback}, "rules": [rule]}, "inner": "eager"}


@pytest.mark.parametrize("fallback", ["warn", "keep", "error"])
def test_a_failed_rewrite(fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise LookupError("planted")

    monkeypatch.setattr("dilcompile.rewriting.rewrite_site", fail)
    model, x = Stack().double(), x64(2, 16, 32)
    fast = compiled(model, _rule(unsupported=fallback))
    message = r"layers\.\d \(models\.py:\d+\): the rewrite failed: LookupError: planted"
    if fallback == "error":
        with pytest.raises(Exception, match=message):
            fast(x)
        return
    with pytest.warns(DilcompileWarning, match=message) if fallback == "warn" else contextlib.nullcontext():
        found = fast(x)
    assert_same(found, model(x))
    assert tally("sites_rewritten") == 0


def test_environment_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nrules:\n  - {name: all, match: {}, apply: {form: dense}}\n")
    monkeypatch.setenv("DILCOMPILE_POLICY", str(path))
    model, x = Stack(), torch.randn(2, 16, 32)
    compiled(model, {"inner": "eager"})(x)
    assert tally("sites_rewritten") == 2


def test_report_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    compiled(Stack(broken=True), {**EXACT, "report": str(path)})(torch.randn(2, 16, 32))
    held = json.loads(path.read_text())
    assert len(held["graphs"]) == 2
    assert json.dumps(held).count("matmul-softmax") >= 2


SECOND_PROCESS = textwrap.dedent(
    """
    import json, sys, torch
    from torch._dynamo.utils import counters
    sys.path.insert(0, sys.argv[1])
    from models import Stack
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, requires_grad=True)
    # A kernel that is not compiled itself.
    policy = {"rules": [{"name": "all", "apply": {"form": "dense", "kernel": "cpu"}}]}
    torch.compile(Stack(), backend="dilated", options={"policy": policy})(x).sum().backward()
    assert "dilcompile" in sys.modules, "the entry point loads it"
    print(json.dumps({"aot": dict(counters["aot_autograd"]), "ours": dict(counters["dilcompile"])}))
    """
)


def test_a_second_process_hits_the_caches(tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SECOND_PROCESS, os.path.dirname(__file__)],
            env=env, capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        return dict(json.loads(done.stdout.splitlines()[-1]))

    first, second = run(), run()
    assert first["ours"]["sites_rewritten"] == second["ours"]["sites_rewritten"] == 2
    assert first["aot"]["autograd_cache_miss"] == 1
    assert second["aot"].get("autograd_cache_hit") == 1
    assert "autograd_cache_miss" not in second["aot"]


def test_a_policy_that_matches_nothing_says_so() -> None:
    rule = {"name": "far", "match": {"module": "layers.*.atn"}, "apply": {"form": "dense"}}
    model, x = Stack(SdpaAttention), torch.randn(2, 16, 32)
    with pytest.warns(
        DilcompileWarning, match=r"no rule of the policy p takes any of the 2 attention sites .* nearest is rule far"
    ):
        found = compiled(model, {"policy": {"name": "p", "rules": [rule]}, "inner": "eager"})(x)
    torch.testing.assert_close(found, model(x))


def test_a_graph_without_sites_is_not_unmatched() -> None:
    """The break splits the model; warnings are errors here."""
    rule = {"name": "all", "match": {"kind": "self"}, "apply": {"form": "dense"}}
    model, x = nn.Sequential(NoAttention(), Stack(SdpaAttention, broken=True), NoAttention()), torch.randn(2, 16, 32)
    compiled(model, {"policy": {"rules": [rule]}, "inner": "eager"})(x)
    assert tally("graphs") > 1
    assert tally("sites_rewritten") == tally("sites_found") >= 1


def _policy(form: str) -> dict[str, Any]:
    return {"rules": [{"name": "r", "apply": {"form": form}}]}


def _rewrites(policy: Any) -> int:
    """How many sites the same function has rewritten since, compiled once more."""
    counters.clear()
    compiled(_SAME, {"policy": policy, "inner": "eager"})(torch.randn(1, 8, 32))
    return tally("sites_rewritten")


_SAME = SdpaAttention()


def test_options_that_differ_compile_anew() -> None:
    assert [_rewrites(_policy(form)) for form in ("keep", "dense")] == [0, 1]


def test_an_edited_policy_is_read_after_a_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/policy.md: Dynamo keeps what it compiled for equal options."""
    path, held = tmp_path / "p.json", _policy("keep")
    sources: list[tuple[Any, Any]] = [(str(path), lambda form: path.write_text(json.dumps(_policy(form))))]
    sources.append((held, lambda form: held.update(_policy(form))))
    sources.append((None, lambda form: monkeypatch.setenv("DILCOMPILE_POLICY", str(tmp_path / f"{form}.json"))))
    for form in ("keep", "dense"):
        (tmp_path / f"{form}.json").write_text(json.dumps(_policy(form)))
    for source, write in sources:
        write("keep")
        assert _rewrites(source) == 0
        write("dense")
        torch._dynamo.reset()
        assert _rewrites(source) == 1
        torch._dynamo.reset()
