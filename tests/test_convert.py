"""``dilcompile.convert``: the same finder, the model's own class, nothing of the model changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dilcompile

WINDOW = {"version": 1, "rules": [{"name": "near", "apply": {"form": "sliding_window", "window": 5}}]}


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_it_computes_what_the_compiled_model_computes(tmp_path: Path) -> None:
    model, ids = llama(), torch.arange(40).view(2, 20)
    before = model(ids).logits
    keys = list(model.state_dict())
    converted = dilcompile.convert(model, WINDOW, report=tmp_path / "report.json")
    assert type(converted) is type(model)
    assert list(converted.state_dict()) == keys
    compiled = torch.compile(model, backend="dilated", options={"policy": WINDOW, "inner": "eager"})
    torch.testing.assert_close(converted(ids).logits, compiled(ids).logits, rtol=0, atol=0)
    assert not torch.allclose(converted(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert (tmp_path / "report.json").read_text().count('"verdict": "rewritten"') == 2


def test_the_exact_policy_generates_the_same_tokens() -> None:
    model, ids = llama(), torch.arange(6)[None]
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(dilcompile.convert(model, "exact").generate(ids, **asked), model.generate(ids, **asked))


def test_training_reaches_the_shared_parameters() -> None:
    model = llama().train()
    converted = dilcompile.convert(model, WINDOW)
    ids = torch.arange(20)[None]
    converted(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not converted(ids).logits.any()


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"convert takes a torch\.nn\.Module, not function; for a function use torch\.compile"):
        dilcompile.convert(lambda x: x)  # type: ignore[type-var]
    with pytest.raises(dilcompile.PolicyError, match="sliding_windo"):
        dilcompile.convert(nn.Linear(2, 2), {"version": 1, "rules": [{"name": "x", "apply": {"form": "sliding_windo"}}]})
