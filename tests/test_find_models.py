"""Whole Hugging Face models of random weights: all sites, their masks, no square tensor left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spellings import Found, compiled, square_tensors

transformers = pytest.importorskip("transformers")
LENGTH = 37  # a prime that is no other size in these models


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()


def _small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
        **more,
    }


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**_small(num_key_value_heads=2, **more))


def mistral() -> Any:
    return transformers.MistralConfig(**_small(num_key_value_heads=2, sliding_window=11))


def bert() -> Any:
    return transformers.BertConfig(**_small())


def gpt2() -> Any:
    return transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99)


def gemma2() -> Any:
    return transformers.Gemma2Config(**_small(num_key_value_heads=2, head_dim=12, sliding_window=11))


MODELS = {"llama": llama, "mistral": mistral, "bert": bert, "gpt2": gpt2, "gemma2": gemma2}
MASKS = {
    "llama": ["causal & padding"] * 2,
    "mistral": ["causal & window(10, 0) & padding"] * 2,
    "bert": ["padding"] * 2,
    "gpt2": ["causal & padding"] * 2,
    "gemma2": ["causal & window(10, 0) & padding", "causal & padding"],
}


def _agreeing(config: Any, attention: str, left: bool, train: bool = False, dynamic: bool | None = None) -> Found:
    torch.manual_seed(0)
    causal = type(config).__name__ != "BertConfig"
    maker = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = maker.from_config(config, attn_implementation=attention).eval()
    ids = torch.randint(0, 99, (2, LENGTH))
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, : 4 if left else LENGTH] = 0
    if not left:
        mask[1, : LENGTH - 5] = 1
    run, found = compiled(model, dynamic=dynamic)
    more = {"use_cache": False} if causal else {}
    with torch.set_grad_enabled(train):
        wanted, got = (call(input_ids=ids, attention_mask=mask, **more)[0].detach() for call in (model, run))
        exact = model.double()(input_ids=ids, attention_mask=mask, **more)[0].detach()
    # Padding's rows see no key: their lowest number of float64 is minus infinity in the softmax, which is of float32 always.
    exact = torch.where(exact.isfinite(), exact, wanted)
    # As good as the model itself in float32.
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (wanted - exact).abs().max() + rounding
    return found


@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in MODELS for a in ("eager", "sdpa") if (n, a) != ("gemma2", "sdpa")]
)
def test_masks_are_read_and_no_square_tensor_is_left(name: str, attention: str) -> None:
    # A mask reads alike in both implementations, so that each situation is met in one of them.
    for left, train in ((True, False), (False, True)) if attention == "eager" else ((False, False),):
        found = _agreeing(MODELS[name](), attention, left, train)
        assert found.misses == []
        assert found.masks == MASKS[name]
        assert found.refusals == []
        for gm in found.graphs:
            assert square_tensors(gm, LENGTH) == []


def test_symbolic_lengths() -> None:
    found = _agreeing(llama(), "eager", left=False, dynamic=True)
    assert (found.masks, found.refusals) == (["causal & padding"] * 2, [])
