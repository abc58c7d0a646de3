"""explain says of each site what it is and where it stands, and of each miss what stopped it and what to do."""

from __future__ import annotations

import html
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Stack
from test_module_paths import paths
from torch import Tensor, nn
from typer.testing import CliRunner

import dilcompile
from dilcompile.cli import app

WINDOW: dict[str, Any] = {
    "version": 1,
    "name": "near",
    "rules": [{"name": "w", "apply": {"form": "sliding_window", "window": 4}}],
}


class Everything(nn.Module):
    """Grouped heads, a scale of its own, a soft cap, a learned bias, causal and padded, softmax in float32, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.bias = nn.Linear(64, 64), nn.Linear(64, 64), nn.Parameter(torch.randn(4, 12, 12))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2).repeat_interleave(2, 1) for part in self.kv(x).chunk(2, -1))
        scores = torch.tanh(q @ k.mT * 0.3 / 20) * 20 + self.bias
        at = torch.arange(12)
        seen = (at <= at[:, None]) & keep[:, None, None, :].bool()
        probs = scores.masked_fill(~seen, -1e9).softmax(-1, dtype=torch.float32).to(q.dtype)
        return (F.dropout(probs, 0.1) @ v).transpose(1, 2).flatten(2)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Everything()])

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.layers[0](x, keep)


def everything() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Holder().bfloat16(), (torch.randn(2, 12, 64, dtype=torch.bfloat16), torch.ones(2, 12, dtype=torch.int64))


@pytest.fixture(scope="module")
def report() -> Any:
    torch.manual_seed(0)
    model, args = everything()
    return dilcompile.explain(model, *args, policy="exact")


def test_a_site_says_everything(report: Any) -> None:
    (site,) = report.to_dict()["graphs"][0]["sites"]
    assert site["module"] == "layers.0"
    assert site["source"].startswith("test_explain.py:")
    assert (site["spelling"], site["kind"]) == ("matmul-softmax", "self")
    assert set(site["operands"]) == {"q", "k", "v"}
    assert all("[" in held for held in site["operands"].values())
    assert (site["heads"], site["kv_heads"], site["head_dim"]) == (4, 2, 16)
    assert site["mask"]["words"] == ["causal", "padding"]
    assert "k <= q" in site["mask"]["formula"]
    assert "keep[b, k]" in site["mask"]["formula"]
    assert (site["softcap"], site["dropout_p"]) == (20.0, pytest.approx(0.1))
    assert site["scale"] == pytest.approx(0.3)
    (bias,) = site["bias"]
    assert (bias["word"], bias["slopes"]) == ("tensor", [])
    assert bias["tensor"]
    assert (site["dtype"], site["softmax_dtype"]) == ("bfloat16", "float32")


def test_the_table_shows_it(report: Any) -> None:
    text = str(report)
    for part in (
        "layers.0",
        "test_explain.py:",
        "self matmul-softmax",
        "H 4/2",
        "causal & padding",
        "bfloat16, softmax in float32",
        "scale 0.3, soft cap 20, bias tensor, dropout 0.1",
    ):
        assert part in text.replace("\n", " ") or part in " ".join(text.split())
    (site,) = report.sites
    assert site.operands[0].split()[0] in text


def test_the_page_shows_it(report: Any) -> None:
    page = html.unescape(report.to_html())
    (site,) = report.sites
    for part in (
        "layers.0",
        site.source,
        "self matmul-softmax",
        "H 4/2",
        "causal & padding",
        site.mask.formula,
        "bfloat16, softmax in float32",
        "scale 0.3, soft cap 20, bias tensor, dropout 0.1",
        *(f"{role} {tensor}" for role, tensor in zip("qkv", site.operands, strict=True)),
        f"bias {site.bias[0].tensor}",
        '<span class="tag exact">exact</span>',
    ):
        assert part in page, part


@pytest.mark.parametrize(
    ("dtype", "softmax"), [(torch.float64, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float32")]
)
def test_a_call_computes_in_float32_at_least(dtype: torch.dtype, softmax: str) -> None:
    def flash(q: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]

    with torch.no_grad():
        report = dilcompile.explain(flash, torch.randn(1, 2, 16, 8).to(dtype), policy="exact")
    described: Any = report.to_dict()
    own = str(dtype).removeprefix("torch.")
    (site,) = described["graphs"][0]["sites"]
    assert (site["dtype"], site["softmax_dtype"]) == (own, softmax)
    text = " ".join(str(report).split())
    assert ("softmax in" in text) == (own != softmax)


@pytest.mark.parametrize(("policy", "fidelity"), [("exact", "exact"), (WINDOW, "approximate")])
def test_exact_or_not_is_said(policy: Any, fidelity: str) -> None:
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    report = dilcompile.explain(attend, torch.randn(1, 2, 16, 8), policy=policy)
    assert [decision.fidelity for decision in report.decisions] == [fidelity]
    assert f" {fidelity} " in " ".join(str(report).split())


def test_operands_are_the_unexpanded_tensors(report: Any) -> None:
    """Keys are named before they are repeated for each query head."""
    (site,) = report.sites
    q, k, v = site.operands
    assert q.endswith("[2, 4, 12, 16]") or "64" in q
    assert "repeat_interleave" not in k + v


def talking(q: Tensor, mix: Tensor) -> Tensor:
    scores = torch.einsum("bhqk,hg->bgqk", q @ q.mT, mix)
    return scores.softmax(-1) @ q


def weights_too(q: Tensor) -> tuple[Tensor, Tensor]:
    probs = (q @ q.mT).softmax(-1)
    return probs @ q, probs


@pytest.mark.parametrize("call", [talking, weights_too])
def test_a_miss_says_where_why_and_what_to_do(call: Any) -> None:
    args = (torch.randn(1, 4, 8, 8), torch.randn(4, 4))[: 2 if call is talking else 1]
    report = dilcompile.explain(call, *args, policy="exact")
    (miss,) = report.misses
    assert report.sites == ()
    assert miss.node
    assert miss.reason
    assert miss.cure
    assert miss.source.startswith("test_explain.py:")
    described: Any = report.to_dict()
    assert described["graphs"][0]["misses"] == [
        {"module": miss.module, "source": miss.source, "node": miss.node, "reason": miss.reason, "cure": miss.cure}
    ]
    page = html.unescape(report.to_html())
    assert all(part in page for part in (miss.source, f"{miss.node}: {miss.reason}", miss.cure))
    text = " ".join(str(report).split())
    assert "Missed: looks like attention and was left alone" in text
    assert f"{miss.node}: {miss.reason}" in text
    assert f"-> {miss.cure}" in text


MODELS = """
import torch
from test_explain import Holder, everything as made, talking

class Talking(torch.nn.Module):
    def forward(self, q, mix):
        return talking(q, mix)

def everything():
    return made()

def missed():
    return Talking(), (torch.randn(1, 4, 8, 8), torch.randn(4, 4))
"""


@pytest.mark.parametrize(("name", "strict", "code"), [("everything", True, 0), ("missed", False, 0), ("missed", True, 1)])
def test_the_command(name: str, strict: bool, code: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"explained_{name}_{strict}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    arguments = ["inspect", f"explained_{name}_{strict}:{name}", "--policy", "exact", *(["--fail-on-miss"] if strict else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert "attention in 1 graph" in result.stdout or "no attention was found in 1 graph" in result.stdout


def test_sites_that_differ_in_names_alone_share_a_row() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Everything(), Everything()])

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, keep)
            return x

    report = dilcompile.explain(Two(), torch.randn(2, 12, 64), torch.ones(2, 12, dtype=torch.int64), policy="exact")
    first, second = report.sites
    assert first.operands != second.operands
    assert "layers.{0-1}" in str(report)


@torch._dynamo.disable
def _by_itself(q: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_a_graph_break_is_noted_with_its_reason() -> None:
    report = dilcompile.explain(lambda q: _by_itself(q * 2) + 1, torch.randn(1, 2, 8, 4), policy="exact")
    assert report.sites == ()
    (note,) = report.notes
    assert "torch.compile broke the graph; attention that ran in between is not seen" in note
    assert "torch.compiler.disable" in note


def test_a_process_explains_as_many_models_as_it_likes() -> None:
    """More than Dynamo compiles of one function, and as many by name."""
    for _ in range(10):
        report = dilcompile.explain(Stack(), torch.randn(1, 8, 32), policy=WINDOW)
        assert [site.module for site in report.sites] == ["layers.0", "layers.1"]


def test_a_function_is_explained_as_it_is_compiled() -> None:
    """Module paths don't depend on who looks."""
    model, x = Stack(), torch.randn(2, 16, 32)

    class Holder:
        def __init__(self) -> None:
            self.net = model

        def call(self, x: Tensor, *, twice: bool = True) -> Tensor:
            return self.net(x) * (2 if twice else 1)

    calls = (lambda x: model(x), Holder().call, model, model.forward)
    for call in calls:
        explained = [site.module for site in dilcompile.explain(call, x, policy="exact").sites]
        assert explained == paths(call, lambda call, backend: torch.compile(call, backend=backend))
        assert [path.removeprefix("net.") for path in explained] == ["layers.0", "layers.1"]
