"""What is shown of memory: `dilcompile plan --memory`, the report, what was measured beside what was predicted."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache
from typer.testing import CliRunner

from dilcompile import DilcompileError
from dilcompile.cli import app
from dilcompile.inner import BY_INDUCTOR, NOT_UNDER_GRAD
from dilcompile.memory.watch import Watch
from dilcompile.memory_plan import at_length

MODELS = '''
import torch
from models import NoAttention, SdpaAttention, Stack

class Scaled(torch.nn.Module):
    """With buffers that nothing keeps."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(SdpaAttention)

    def forward(self, x):
        return (self.stack((x * 2 + 1) * 3) * 2 + 1) * 3

def stack():
    return Scaled(), torch.randn(2, 24, 32)

class Breaking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(SdpaAttention() for _ in range(2))

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x)

def breaking():
    return Breaking(), torch.randn(2, 24, 32)

def nothing():
    return NoAttention(), torch.randn(2, 24, 32)

class Counting(torch.nn.Module):
    ran = 0

    def __init__(self):
        super().__init__()
        self.inner = Scaled()

    def forward(self, x):
        return self.inner(torch.ops.dilcompile_tests.counted(x))

def counting():
    return Counting(), torch.randn(1, 24, 32)
'''
POLICY = """
version: 1
rules:
  - apply: {form: dilated, segments: [8, 24], rates: [1, 3], offset: own}
    memory: {pool: private, reuse: across_layers}
"""
PLAIN = POLICY.replace("    memory: {pool: private, reuse: across_layers}\n", "")
RAN: list[int] = []


@torch.library.custom_op("dilcompile_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    RAN.append(x.shape[1])
    return x.clone()


@counted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


counted.register_autograd(lambda ctx, grad: grad)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("planned")
    (made / "planned_models.py").write_text(MODELS)
    (made / "policy.yaml").write_text(POLICY)
    (made / "plain.yaml").write_text(PLAIN)
    return made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def invoke(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["plan", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def test_a_length_is_planned_without_computing_it(run: Any, folder: Path) -> None:
    RAN.clear()
    long = run(
        "planned_models:counting", "--memory", "--policy", "policy.yaml", "--length", "1048576", "--html", "plan.html"
    ).stdout
    assert RAN == []
    assert long.startswith("memory of 2 graphs at 1,048,576 tokens\n\n")
    assert re.search(r"^0 forward +\d+ +\d+ +[\d.]+ [MG]iB ", long, re.M)
    assert re.search(r"^0 backward: the largest buffers\n  \w+ of inner[\w.]*: \d+ MiB at \d+, steps \d+ to \d+, \w+", long, re.M)
    page = (folder / "plan.html").read_text()
    assert page.count('<svg class="arena"') == 2
    assert not re.search(r"https?:|<script|@import", page)


def test_sizes_grow_with_the_length_and_with_it_alone(run: Any) -> None:
    def graphs(*more: str) -> Any:
        told = json.loads(run("planned_models:stack", "--memory", "--policy", "policy.yaml", "--json", *more).stdout)
        return told["memory"]["graphs"]

    short, long = graphs(), graphs("--length", "24000")
    assert [graph["direction"] for graph in short] == ["forward", "backward"]
    for one, other in zip(short, long, strict=True):
        assert one["steps"] == other["steps"]
        # Where gradients of weights are most of what is held, fewer buffers lie in saved tensors.
        assert one["buffers"] + one["over_saved"]["buffers"] == other["buffers"] + other["over_saved"]["buffers"]
        assert 20 < other["planned"] / one["planned"] <= 1000, "workspaces and gradients of weights grow less"
        assert other["live_at_once"] <= other["planned"] <= 1.05 * other["live_at_once"]
        assert other["planned"] <= other["without_reuse"]
        assert [arena["planned"] for arena in other["arenas"]] == [other["planned"]]
    (inference,) = graphs("--no-train")
    assert inference["direction"] == "inference"


def test_a_policy_that_does_not_plan_is_told_of(run: Any) -> None:
    found = run("planned_models:stack", "--memory", "--policy", "plain.yaml").stdout
    assert "no rule says memory.reuse: planned as across_layers would be\n" in found


def test_the_ladder_of_a_budget_is_shown(run: Any, folder: Path) -> None:
    plain = (folder / "plain.yaml").read_text()

    def planned(budget: str | int, *more: str) -> Any:
        (folder / "bounded.yaml").write_text(f"{plain}\ndefaults: {{memory: {{budget: {budget}, reuse: across_layers}}}}\n")
        return run("planned_models:stack", "--memory", "--policy", "bounded.yaml", *more)

    (short,) = json.loads(planned("1KiB", "--json").stdout)["memory"]["budgets"]
    assert short["taken"] is None
    assert "defaults: memory.budget of 1 KiB is " in short["error"]
    first, least = short["tried"][0], min(short["tried"], key=lambda rung: rung["peak"])
    assert first["peak"] > least["peak"]
    assert f"  not kept: {short['error']}\n" in planned("1KiB").stdout

    page = folder / "bounded.html"
    text = planned(least["peak"], "--html", str(page)).stdout
    told = json.loads(planned(least["peak"], "--json").stdout)["memory"]
    (kept,) = told["budgets"]
    assert (kept["taken"], kept["error"]) == (least["name"], "")
    assert [rung["name"] for rung in kept["tried"]] == [rung["name"] for rung in short["tried"]][: len(kept["tried"])]
    # The graphs are planned as they then run.
    assert sum(arena["planned"] for graph in told["graphs"] for arena in graph["arenas"]) == least["arenas"]
    for rung in kept["tried"]:
        assert f"  {rung['name']}: " in text
    assert f"  kept by {kept['taken']}\n" in text
    assert f"kept by {kept['taken']}" in page.read_text()

    # The same ladder as that of the model when it is compiled.
    model, x = importlib.import_module("planned_models").stack()
    torch._dynamo.reset()
    report = folder / "bounded.json.html"
    options = {"policy": str(folder / "bounded.yaml"), "inner": "aot_eager", "report": str(report.with_suffix(".json"))}
    torch.compile(model, backend="dilated", options=options)(x)
    (graph,) = json.loads(report.with_suffix(".json").read_text())["graphs"]
    assert [(rung["name"], rung["peak"]) for rung in graph["budget"]["tried"]] == [
        (rung["name"], rung["peak"]) for rung in kept["tried"]
    ]


def test_breaks_are_planned_at_the_length_of_the_example(run: Any) -> None:
    found = json.loads(run("planned_models:breaking", "--memory", "--policy", "policy.yaml", "--json").stdout)
    names = [(graph["graph"], graph["direction"]) for graph in found["memory"]["graphs"]]
    assert names == [("0", "forward"), ("0", "backward"), ("1", "forward"), ("1", "backward")]
    refused = run("planned_models:breaking", "--memory", "--policy", "policy.yaml", "--length", "4800")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("the model breaks into several graphs (")
    assert "plan it at the length of the example, or mend the break" in refused.stderr


def test_mesh_and_memory_are_told_together(run: Any) -> None:
    arguments = ("planned_models:stack", "--memory", "--mesh", "cp=2", "--policy", "policy.yaml")
    both = run(*arguments).stdout
    assert both.startswith("cp=2, ")
    assert "\n\nmemory of 2 graphs\n" in both
    told = json.loads(run(*arguments, "--json").stdout)
    assert (told["mesh"], len(told["memory"]["graphs"])) == ({"cp": 2}, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to plan: give --mesh AXIS=RANKS, --memory, or both"),
        (("--mesh", "cp=2", "--html", "x.html"), "--html shows what --memory plans: give --memory, too"),
        (("--memory", "--html", "x.json"), "--html x.json: name it .html; --json prints the JSON"),
        (("--memory", "--html", "x.pdf"), "report: 'x.pdf' ends in '.pdf'; name it .html or .json"),
    ],
)
def test_wrong_options_are_named(run: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run("planned_models:stack", *arguments)
    assert (result.exit_code, result.stderr.strip()) == (1, message)


def test_a_model_without_attention_has_no_length_to_change(run: Any) -> None:
    result = run("planned_models:nothing", "--memory", "--policy", "policy.yaml", "--length", "48")
    assert result.exit_code == 1
    assert result.stderr.startswith("--length: the model has no self-attention: give the example the length")


# The report of a compiled model.


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(folder))
    torch.manual_seed(0)
    torch._dynamo.reset()
    return importlib.import_module("planned_models").stack()


def compiled_with(net: Any, path: Path, folder: Path, inner: str) -> Any:
    options = {"policy": str(folder / "policy.yaml"), "inner": inner, "report": str(path)}
    return torch.compile(net, backend="dilated", options=options)


def test_the_first_call_is_measured_and_it_is_what_was_predicted(model: Any, folder: Path) -> None:
    net, x = model
    compiled = compiled_with(net, folder / "run.json", folder, "aot_eager")
    compiled(x).sum().backward()
    (graph,) = json.loads((folder / "run.json").read_text())["graphs"]
    assert [held["direction"] for held in graph["memory"]] == ["forward", "backward"]
    for held in graph["memory"]:
        assert held["runs"]["measured"] == held["predicted"] > held["planned"] > 0
        assert (held["runs"]["calls"], held["runs"]["plans"]) == (1, 1)
    compiled(x).sum().backward()
    (graph,) = json.loads((folder / "run.json").read_text())["graphs"]
    for held in graph["memory"]:
        assert (held["runs"]["calls"], held["runs"]["plans"], held["runs"]["lease_hits"] >= 1) == (2, 1, True)


def test_what_is_measured_is_what_operators_hold() -> None:
    x = torch.randn(1000)
    with Watch([x]) as watch:
        y = x.sin().cos()
        z = y.view(10, 100)[3]
        del y
    assert (watch.most, watch.now) == (8000, 4000)
    del z
    assert watch.now == 0


@pytest.mark.parametrize("grad", [False, True])
def test_eager_is_planned_where_no_gradient_is_asked_for(model: Any, folder: Path, grad: bool) -> None:
    net, x = model
    with torch.set_grad_enabled(grad):
        expected = torch.compile(net, backend="dilated", options={"policy": str(folder / "plain.yaml"), "inner": "eager"})(x)
        found = compiled_with(net, folder / "eager.json", folder, "eager")(x)
    assert torch.allclose(found, expected, atol=1e-6)
    graph = json.loads((folder / "eager.json").read_text())["graphs"][-1]
    assert [held["direction"] for held in graph["memory"]] == ([] if grad else ["inference"])
    assert (NOT_UNDER_GRAD in graph["notes"]) == grad


def test_inductors_buffers_that_are_ours_are_listed(model: Any, folder: Path) -> None:
    net, x = model
    with fresh_cache(), torch.no_grad():
        compiled_with(net, folder / "inductor.json", folder, "inductor")(x)
    (graph,) = json.loads((folder / "inductor.json").read_text())["graphs"]
    assert BY_INDUCTOR in graph["notes"]
    (inference,) = graph["memory"]
    assert (inference["planner"], inference["direction"], inference["runs"]) == ("inductor", "inference", None)
    # The output and the LSE of each of two layers.
    assert inference["buffers"] == 4
    assert inference["without_reuse"] >= 2 * (2 * 24 * 32 * 4)


def test_explain_plans_what_the_policy_would_plan(model: Any, folder: Path) -> None:
    import dilcompile

    net, x = model
    report = dilcompile.explain(net, x, policy=str(folder / "policy.yaml"))
    assert [held.direction for held in report.memory] == ["forward", "backward"]
    assert "<h2>Memory</h2>" in report.to_html()
    assert dilcompile.explain(net, x, policy=str(folder / "plain.yaml")).memory == ()


def test_an_input_without_the_length_is_refused() -> None:
    with pytest.raises(DilcompileError, match="no input of the example has a size of 7"):
        at_length((torch.zeros(2, 3),), {}, 7, 9)
