"""`dilcompile policy`, in process and as users run it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import jsonschema
import pytest
import scripts
import torch
from policy_sites import site
from typer.testing import CliRunner

from dilcompile.cli import app
from dilcompile.cli.model import load_example
from dilcompile.errors import DilcompileError
from dilcompile.policy import Policy

runner = CliRunner()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_check_prints_the_rules_in_effect(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "name: p\nextends: exact\nrules:\n- {name: c, match: {kind: cross}, apply: {form: keep}}\n")
    done = runner.invoke(app, ["policy", "check", path])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (
        f"policy p\n  c ({path}:4): kind: 'cross' -> keep\n  exact-all (preset exact:8): every site -> keep_structure\n"
        f"{path}: rules: 2, errors: 0, warnings: 0\n"
    )


def test_check_prints_every_problem_to_stderr(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "rules:\n- match: {casual: true}\n  apply: {form: kep}\n")
    done = runner.invoke(app, ["policy", "check", path])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"{path}:2:11: rules[0].match.casual: unknown key (did you mean 'causal'?)\n"
        f"{path}:3:17: rules[0].apply.form: unknown form 'kep': this version has keep, ring, dense, sliding_window, dilated, block_sparse"
        ", keep_structure, union"
        " (did you mean 'keep'?)\n"
    )


def test_check_fails_on_rules_that_never_act(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "rules:\n- {name: a, apply: {form: keep}}\n- {name: b, apply: {form: dense}}\n")
    done = runner.invoke(app, ["policy", "check", path])
    assert done.exit_code == 1
    assert f"error: rule b ({path}:3) is never reached: rule a ({path}:2) takes all of its sites\n" in done.stderr


def test_check_refuses_an_unknown_kernel(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "rules:\n- {name: b, apply: {form: dense, kernel: flesh}}\n")
    done = runner.invoke(app, ["policy", "check", path])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        f"{path}:2:42: rules[0].apply.kernel: expected 'native', 'sdpa', 'flash_band', 'triton', 'flash_attn', 'cudnn', 'efficient', 'flex', 'flash', 'cpu' or 'reference', got 'flesh'"
        " (did you mean 'flash'?)\n"
    )


def test_check_on_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder is another module's business: here it is a stand-in that checks what it is called with."""

    def explain(model: torch.nn.Module, *args: torch.Tensor, policy: Policy, **kwargs: torch.Tensor) -> object:
        assert isinstance(model, torch.nn.Identity)
        assert [tuple(arg.shape) for arg in args] == [(2, 3)]
        assert (policy.name, kwargs) == ("p", {})
        return types.SimpleNamespace(sites=[site()])

    monkeypatch.setitem(sys.modules, "dilcompile.inspect", types.SimpleNamespace(explain=explain))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny_model_for_check.py", "import torch\ndef make():\n    return torch.nn.Identity(), torch.zeros(2, 3)\n")
    path = write(tmp_path / "p.yaml", "name: p\nrules:\n- {name: a, match: {module: model.layer.*}, apply: {form: keep}}\n")
    done = runner.invoke(app, ["policy", "check", path, "--model", "tiny_model_for_check:make"])
    assert done.exit_code == 0, done.stderr
    assert done.stderr == (
        f"warning: rule a ({path}:3) matched no site: module 'model.layer.*' (nearest: 'model.layers.0.self_attn')\n"
    )
    assert done.stdout.endswith("rules: 1, errors: 0, warnings: 1\n")
    done = runner.invoke(app, ["policy", "check", path, "--model", "tiny_model_for_check:mk"])
    assert (done.exit_code, done.stderr) == (
        1,
        "--model tiny_model_for_check:mk: the module tiny_model_for_check has no function 'mk'\n",
    )


def example_module(made: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(make=lambda: made)


def test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = torch.nn.Identity(), torch.zeros(1)
    good: dict[str, tuple[object, object]] = {
        "tensor": ((model, x), ((x,), {})),
        "tuple": ((model, (x, x)), ((x, x), {})),
        "dict": ((model, {"x": x}), ((), {"x": x})),
        "both": ((model, (x,), {"y": 1}), ((x,), {"y": 1})),
    }
    for name, (made, expected) in good.items():
        monkeypatch.setitem(sys.modules, f"example_{name}", example_module(made))
        found = load_example(f"example_{name}:make")
        assert (found.args, found.kwargs) == expected
    for made in (model, (model,), (x, model), (model, 3), (model, x, x)):
        monkeypatch.setitem(sys.modules, "example_bad", example_module(made))
        with pytest.raises(DilcompileError, match=r"must return \(model, inputs\) or \(model, args, kwargs\)"):
            load_example("example_bad:make")
    with pytest.raises(DilcompileError, match=r"--model takes module:function, got 'x'"):
        load_example("x")
    with pytest.raises(DilcompileError, match=r"--model no_such_module:f: No module named 'no_such_module'"):
        load_example("no_such_module:f")


BROKEN = """
import torch
def raises():
    raise RuntimeError("no weights\\nat home")
class Broken(torch.nn.Module):
    def forward(self, x):
        raise KeyError("gate")
def make():
    return Broken(), torch.zeros(2, 3)
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("raises", "raises() raised RuntimeError: no weights"),
        ("make", "calling the model raised KeyError: 'gate'"),
    ],
)
@pytest.mark.parametrize("command", ["policy", "inspect"])
def test_users_code_that_raises(command: str, name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "broken_for_check.py", BROKEN)
    spec = f"broken_for_check:{name}"
    arguments = ["policy", "check", "exact", "--model", spec] if command == "policy" else ["inspect", spec, "--policy", "exact"]
    what = "--model" if command == "policy" else "MODULE:FUNCTION"
    done = runner.invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (1, f"{what} {spec}: {line}\n(--traceback shows where)\n")
    done = runner.invoke(app, [*arguments, "--traceback"])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"{what} {spec}: {line}\n")
    assert "Traceback (most recent call last):\n" in done.stderr
    assert "broken_for_check.py" in done.stderr


def test_a_module_that_raises_when_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "unfinished_for_check.py", "def make(:\n")
    done = runner.invoke(app, ["policy", "check", "exact", "--model", "unfinished_for_check:make"])
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert first.startswith(
        "--model unfinished_for_check:make: importing unfinished_for_check raised SyntaxError: invalid syntax"
    )
    assert second == "(--traceback shows where)"


def test_schema_and_show() -> None:
    schema = json.loads(runner.invoke(app, ["policy", "schema"]).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == Policy.json_schema()
    shown = runner.invoke(app, ["policy", "show", "longnet"])
    assert Policy.from_yaml(shown.stdout) == Policy.load("longnet")
    wrong = runner.invoke(app, ["policy", "show", "lognet"])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("lognet: no preset or file of this name")


def test_a_real_process(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "rules: []\n")
    command = "from dilcompile.cli import main; main()"
    bad = scripts.run(command, ["policy", "check", path])
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == f"{path}:1:8: rules: expected at least one entry, got an empty list\n"
    good = scripts.run(command, ["policy", "check", "pretrained-safe"])
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("pretrained-safe: rules: 3, errors: 0, warnings: 0\n")


def test_importing_the_package_leaves_the_readers_alone() -> None:
    code = "import sys, dilcompile; print([m for m in ('pydantic', 'yaml', 'typer', 'rich') if m in sys.modules])"
    done = scripts.run(code)
    assert done.stdout.strip() == "[]", done.stderr
