"""Exported programs go through the same passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import CausalAttention, NoAttention, SdpaAttention, Stack, llama
from torch.export import Dim, export

from dilcompile import rewrite_exported
from dilcompile.errors import DilcompileError, PolicyError

ATTENTION = torch.ops.dilcompile.attention.default


def calls(ep: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return list(ep.graph.find_nodes(op="call_function", target=ATTENTION))


@pytest.mark.parametrize("kind", [CausalAttention, SdpaAttention])
@pytest.mark.parametrize("dynamic", [False, True])
def test_same_numbers(kind: Any, dynamic: bool) -> None:
    model, x = Stack(kind).eval(), torch.randn(2, 16, 32)
    shapes = ({1: Dim("length", min=2, max=48)},) if dynamic else None
    ep = export(model, (x,), dynamic_shapes=shapes)
    rewritten = rewrite_exported(ep, "exact")
    assert len(calls(rewritten)) == 2
    assert not calls(ep), "the program given is not changed"
    for length in (16, 40) if dynamic else (16,):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(rewritten.module()(x), model(x))


def test_a_module_is_no_program() -> None:
    with pytest.raises(DilcompileError, match=r"takes an ExportedProgram, not NoAttention; export it first: torch.export.export"):
        rewrite_exported(NoAttention(), "exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hugging_face(implementation: str) -> None:
    model = llama(implementation).eval()
    ids, mask = torch.randint(0, 96, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    ep = export(model, (), {"input_ids": ids, "attention_mask": mask}, strict=False)
    rewritten = rewrite_exported(ep, "exact")
    assert len(calls(rewritten)) == 2
    square = [node for node in rewritten.graph.nodes if tuple(getattr(node.meta.get("val"), "shape", ()))[-2:] == (20, 20)]
    assert not square, "no S x S tensor is left"
    found, expected = (run(input_ids=ids, attention_mask=mask)[0] for run in (rewritten.module(), model))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :15], expected[1, :15])


def test_no_attention() -> None:
    x = torch.randn(2, 8, 32)
    ep = export(NoAttention(), (x,))
    assert torch.equal(rewrite_exported(ep, "exact").module()(x), ep.module()(x))


def test_save_load_and_weights(tmp_path: Any) -> None:
    model, x = Stack().eval(), torch.randn(2, 16, 32)
    before = copy.deepcopy(model.state_dict())
    rewritten = rewrite_exported(export(model, (x,)), "exact")
    torch.export.save(rewritten, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    torch.testing.assert_close(loaded.module()(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_bad_policy() -> None:
    with pytest.raises(PolicyError, match="no-such"):
        rewrite_exported(export(NoAttention(), (torch.randn(2, 8, 32),)), "no-such")


def test_aot_inductor(tmp_path: Any) -> None:
    model, x = Stack().eval(), torch.randn(2, 16, 32)
    rewritten = rewrite_exported(export(model, (x,), dynamic_shapes=({1: Dim("length", min=2, max=48)},)), "exact")
    path = torch._inductor.aoti_compile_and_package(rewritten, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for length in (16, 33):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x), model(x))
