"""What a user gets: the wheel's content, a cheap import, the backend found by name, and guarded folder names."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import scripts

import dilcompile

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return scripts.run(code, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tracked tree, so that no `build/` or egg-info of a checkout leaks into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    kept = ["pyproject.toml", "README.md", "LICENSE", "dilcompile", "passes", "lowering"]
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in kept), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-qq",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    listed = set(wheel.namelist())
    for room, prefix in (("passes", "dilcompile/passes"), ("lowering", "dilcompile/lowering"), ("dilcompile", "dilcompile")):
        modules = {f"{prefix}/{file.relative_to(ROOT / room)}" for file in (ROOT / room).rglob("*.py")}
        assert modules
        assert modules <= listed


def test_the_wheel_holds_the_data_files(wheel: zipfile.ZipFile) -> None:
    listed = set(wheel.namelist())
    data = ["py.typed", *(f"policy/presets/{file.name}" for file in (ROOT / "dilcompile/policy/presets").glob("*.yaml"))]
    assert len(data) > 1, "no presets in dilcompile/policy/presets"
    assert {f"dilcompile/{name}" for name in data} <= listed
    sources = [file for file in (ROOT / "lowering").rglob("*") if file.suffix in (".cpp", ".h", ".txt")]
    assert {f"dilcompile/lowering/{file.relative_to(ROOT / 'lowering')}" for file in sources} <= listed


def test_the_wheel_holds_nothing_but_the_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dilcompile"}


def test_the_wheel_declares_its_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    points = ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert points["torch_dynamo_backends"]["dilated"] == "dilcompile.backend:dilated"
    assert points["console_scripts"]["dilcompile"] == "dilcompile.cli:main"


def test_every_module_of_the_wheel_imports_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    optional = ("dilcompile.lowering.triton",)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib, pkgutil, dilcompile\n"
        f"names = [m.name for m in pkgutil.walk_packages(dilcompile.__path__, 'dilcompile.') if not m.name.startswith({optional!r})]\n"
        "files = [importlib.import_module(name).__file__ for name in names if not name.endswith('__main__')]\n"
        f"assert all(file.startswith({str(tmp_path)!r}) for file in files), files\n"
        "print(len(files))"
    )
    done = run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize("folder", ["passes", "lowering"])
def test_a_bare_folder_import_says_what_to_import(folder: str) -> None:
    done = run(f"import {folder}", cwd=ROOT)
    assert done.returncode != 0
    assert f"ImportError: import dilcompile.{folder}: this folder is part of the package dilcompile" in done.stderr


def test_import_loads_nothing_heavy_beyond_torch(tmp_path: Path) -> None:
    # torch's own flop counter imports Triton where it is installed.
    code = (
        "import sys, json, torch, torch.utils.flop_counter; before = set(sys.modules); import dilcompile; "
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    done = run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    added = set(json.loads(done.stdout))
    assert not added & {"triton", "pydantic", "yaml", "typer", "rich", "plotly", "transformers", "sympy"}


def test_the_backend_is_listed_without_importing_dilcompile(tmp_path: Path) -> None:
    code = (
        "import sys, torch; names = torch._dynamo.list_backends(); "
        "print('dilated' in names, any(name.split('.')[0] == 'dilcompile' for name in sys.modules))"
    )
    done = run(code, cwd=tmp_path)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("name", dilcompile.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(dilcompile, name) is not None
    assert name in dir(dilcompile)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"module 'dilcompile' has no attribute 'exlpain'; it has .*explain"):
        dilcompile.exlpain  # type: ignore[attr-defined]  # noqa: B018
