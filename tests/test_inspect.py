"""explain: every graph of a model, found without compiling it, and nothing of it changed."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CausalAttention, NoAttention, SdpaAttention, Stack
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dilcompile
from dilcompile import PolicyError
from dilcompile.errors import DilcompileWarning
from dilcompile.passes.dialect.normalize import NormalizeError

WINDOW: dict[str, Any] = {
    "version": 1,
    "name": "near",
    "rules": [{"name": "w", "apply": {"form": "sliding_window", "window": 4}}],
}
REFUSING: dict[str, Any] = {**WINDOW, "defaults": {"fallback": {"unsupported": "error", "unmatched": "error"}}}


def x(length: int = 16) -> Tensor:
    return torch.randn(2, length, 32)


def hugging_face(kind: str, attention: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "llama":
        config = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=32,
            attn_implementation=attention,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=32, attn_implementation=attention)).eval()


@pytest.mark.parametrize(
    ("kind", "path", "kv_heads"), [("llama", "model.layers.{}.self_attn", 2), ("gpt2", "transformer.h.{}.attn", 4)]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_models(kind: str, path: str, kv_heads: int, attention: str) -> None:
    model, ids = hugging_face(kind, attention), torch.randint(0, 32, (1, 24))
    report = dilcompile.explain(model, input_ids=ids, use_cache=False, policy=WINDOW)
    assert [site.module for site in report.sites] == [path.format(0), path.format(1)]
    assert all((site.heads, site.kv_heads, site.q_len, site.head_dim) == (4, kv_heads, 24, 8) for site in report.sites)
    assert all(site.mask.words == ("causal",) for site in report.sites)
    assert all(
        (decision.fidelity, str(decision.form)) == ("approximate", "sliding_window(window=4)") for decision in report.decisions
    )
    assert (len(report.decisions), report.misses, report.unused_rules) == (2, (), ())
    assert path.format("{0-1}") in str(report)


def test_a_plain_model() -> None:
    report = dilcompile.explain(CausalAttention(), x(), policy="exact")
    (site,) = report.sites
    assert (site.spelling, site.mask.formula, site.phase) == ("matmul-softmax", "k <= q", "train")
    with torch.no_grad():
        assert dilcompile.explain(CausalAttention(), x(), policy="exact").sites[0].phase == "prefill"


def test_a_model_without_attention() -> None:
    report = dilcompile.explain(NoAttention(), x(), policy="exact")
    assert (report.sites, report.misses) == ((), ())
    assert "no attention was found" in str(report)
    assert "matched no site: there are no attention sites" in report.unused_rules[0]


def test_every_graph_of_a_broken_model() -> None:
    report = dilcompile.explain(Stack(broken=True), x(), policy=WINDOW)
    assert [len(graph.verdicts) for graph in report.graphs if graph.verdicts] == [1, 1]
    assert len({graph.graph for graph in report.graphs}) == len(report.graphs)


def test_a_function() -> None:
    def attend(q: Tensor, *, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=causal)

    (site,) = dilcompile.explain(attend, torch.randn(1, 2, 16, 8), causal=True, policy="exact").sites
    assert (site.module, site.mask.words) == ("", ("causal",))
    assert site.source.startswith("test_inspect.py:")


def test_an_argument_may_be_called_model() -> None:
    def attend(model: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(model, model, model)

    assert len(dilcompile.explain(attend, model=torch.randn(1, 2, 16, 8), policy="exact").sites) == 1


def test_what_torch_compile_reports_is_what_explain_says(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, path = Stack(SdpaAttention), tmp_path / "r.json"
    options = {"policy": WINDOW, "inner": "eager", "report": str(path)}
    torch.compile(model, backend="dilated", options=options)(x())
    compiled, explained = json.loads(path.read_text()), dilcompile.explain(model, x(), policy=WINDOW).to_dict()
    for described in (compiled, explained):
        for graph in described["graphs"]:
            del graph["seconds"], graph["graph"]
        for pattern in described["patterns"]:
            for site in pattern["sites"]:
                del site["graph"]
    assert compiled == explained


def test_compiled_models_are_explained_as_what_they_wrap() -> None:
    model = torch.compile(Stack(), backend="eager")
    assert len(dilcompile.explain(model, x(), policy=WINDOW).decisions) == 2

    @torch.compile(backend="eager")
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    assert len(dilcompile.explain(attend, torch.randn(1, 2, 16, 8), policy=WINDOW).decisions) == 1


class Stateful(nn.Module):
    """Buffers, random numbers and dropout around an attention; counts its real runs."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.norm, self.broken, self.runs = nn.BatchNorm1d(32), broken, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.norm(x.flatten(0, 1))
        q = F.dropout(x, 0.5)[:, None]
        if self.broken:
            torch._dynamo.graph_break()
        self.runs += 1
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_of_the_model_is_changed(broken: bool) -> None:
    model, value = Stateful(broken).train(), x()
    before, random, given = copy.deepcopy(model.state_dict()), torch.get_rng_state(), value.clone()
    assert len(dilcompile.explain(model, value, policy=WINDOW).decisions) == 1
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(value, given)
    assert model.training
    # Plain Python state is only safe where the model needs no run.
    assert model.runs == int(broken)


def test_a_model_of_one_graph_is_not_run() -> None:
    """Its scores alone would take 64 GiB."""

    def attend(q: Tensor) -> Tensor:
        return (q @ q.mT).softmax(-1) @ q

    report = dilcompile.explain(attend, torch.empty(1, 1, 131072, 1).expand(1, 1, 131072, 4), policy="exact")
    assert report.sites[0].q_len == 131072


def test_a_meta_model() -> None:
    model, value = SdpaAttention().to("meta"), torch.empty(1, 1 << 20, 32, device="meta")
    report = dilcompile.explain(model, value, policy="longnet")
    (site,) = report.sites
    assert site.q_len == 1 << 20
    assert "a meta tensor has no device to choose for" in str(report)


@pytest.mark.parametrize("broken", [False, True])
def test_compilations_before_and_after_are_not_affected(broken: bool) -> None:
    torch._dynamo.reset()
    compilations: list[int] = []

    def count(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        compilations.append(len(compilations))
        return gm.forward

    model = Stack(broken=broken)
    compiled = torch.compile(model, backend=count)
    compiled(x())
    own = len(compilations)
    for length in (16, 20, 24, 28, 32, 36, 40, 44, 48, 52):
        assert [site.q_len for site in dilcompile.explain(model, x(length), policy=WINDOW).sites] == [length, length]
    compiled(x())
    assert len(compilations) == own
    if broken and "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        return
    # Dynamo still compiles: the explanations did not use up its limit on recompilations.
    compiled(x(20))
    assert len(compilations) > own


def test_explaining_counts_nothing() -> None:
    counters.clear()
    dilcompile.explain(Stack(), x(), policy=WINDOW)
    assert not counters["dilcompile"]


def test_nothing_warns_and_no_fallback_raises() -> None:
    """Queries and keys of two sequences: no window can be given to the site."""

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)

    with warnings.catch_warnings():
        warnings.simplefilter("error", DilcompileWarning)
        report = dilcompile.explain(attend, torch.randn(1, 2, 16, 8), torch.randn(1, 2, 24, 8), policy=REFUSING)
    (rejection,) = report.rejections
    assert not rejection.asked
    assert rejection.reason.startswith("sliding_window can't be given to it: ")
    assert "cross" in rejection.reason
    assert rejection.cure


def test_a_failure_to_normalise_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise NormalizeError("an operator nobody knows")

    monkeypatch.setattr("dilcompile.pipeline.normalize", fail)
    report = dilcompile.explain(SdpaAttention(), x(), policy=REFUSING)
    assert list(report.notes) == ["graph 0: left as it is: it could not be normalised (an operator nobody knows)"]


def test_symbolic_lengths() -> None:
    value = x(24)
    torch._dynamo.mark_dynamic(value, 1)
    report = dilcompile.explain(SdpaAttention(), value, policy="longnet")
    (site,) = report.sites
    assert isinstance(site.q_len, torch.SymInt)
    assert f"S {site.q_len}=24" in str(report)
    json.dumps(report.to_dict())


def test_bad_policies_and_wrong_calls_raise_what_they_are() -> None:
    with pytest.raises(PolicyError, match="no such file"):
        dilcompile.explain(SdpaAttention(), x(), policy="nowhere.yaml")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        dilcompile.explain(SdpaAttention(), policy="exact")
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        dilcompile.explain(SdpaAttention(), torch.randn(2, 16, 31), policy="exact")


def test_the_default_policy_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILCOMPILE_POLICY", "exact")
    assert dilcompile.explain(SdpaAttention(), x()).policy.startswith("policy exact")


def test_structured_trace(tmp_path: Path) -> None:
    """A run under TORCH_TRACE holds one dilcompile_report artifact a graph, which tlparse shows."""
    code = textwrap.dedent("""
        import torch
        from models import Stack
        for broken in (False, True):
            torch.compile(Stack(broken=broken), backend="dilated", options={"policy": "exact", "inner": "eager"})(torch.randn(2, 16, 32))
    """)
    env = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)
    (log,) = tmp_path.glob("*.log")
    artifacts = _artifacts(log.read_text().splitlines(), "dilcompile_report")
    sites = [[site for graph in report["graphs"] for site in graph["sites"]] for report in artifacts]
    whole, *parts = [held for held in sites if held]
    assert [(site["module"], site["verdict"]) for site in whole] == [("layers.0", "rewritten"), ("layers.1", "rewritten")]
    assert [len(part) for part in parts] == [1] * len(parts)
    assert parts
    assert {report["schema"] for report in artifacts} == {"dilcompile.report"}


def _artifacts(lines: list[str], name: str) -> list[Any]:
    """Payloads of the log's artifacts of this name: a line of metadata, then the payload on lines that start with a tab."""
    found: list[list[str]] = []
    inside = False
    for line in lines:
        if line.startswith("\t"):
            if inside:
                found[-1].append(line[1:])
            continue
        metadata = json.loads(line[line.index("{") :]) if "{" in line else {}
        inside = metadata.get("artifact", {}).get("name") == name
        if inside:
            assert metadata["artifact"]["encoding"] == "json"
            found.append([])
    return [json.loads("\n".join(payload)) for payload in found]
