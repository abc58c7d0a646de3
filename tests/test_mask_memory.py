"""No square tensor is built or held: what is allocated while attention runs over 32k tokens is watched, one allocation at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spellings import compiled
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dilcompile.policy import Policy

LENGTH, WINDOW, FEATURES = 32_768, 64, 8
# A byte for each pair would be 1 GiB. What kernels hold of the pairs at hand is the largest there is.
MOST_BYTES = 1 << 26
NARROW = Policy.load(
    {
        "version": 1,
        "rules": [{"name": "w", "match": {}, "apply": {"form": "sliding_window", "window": WINDOW}}],
        "defaults": {"fallback": {"unmatched": "keep"}},
    }
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _largest(call: Callable[[], Any]) -> int:
    """Bytes of the largest single allocation while ``call`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    sizes = [event.nbytes() for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes, "nothing was watched"
    return max(sizes)


Mask = Callable[[Tensor, Tensor, Tensor], Tensor]


def _numbers() -> Tensor:
    return (torch.arange(LENGTH) // 5000 % 3)[None]


MASKS: dict[str, tuple[str, Mask]] = {
    "causal": ("causal", lambda q, k, n: k <= q),
    "window": ("causal & window(99, 0)", lambda q, k, n: (k <= q) & (k > q - 100)),
    "band": ("window(50, 50)", lambda q, k, n: (q - k).abs() <= 50),
    "chunks": ("causal & chunk", lambda q, k, n: (k <= q) & (k // 8192 == q // 8192)),
    "prefix": ("prefix", lambda q, k, n: (k <= q) | (k < 1000)),
    "padding": ("causal & padding", lambda q, k, n: (k <= q) & (n != 1)[:, None, None, :]),
    "query padding": ("rows & padding", lambda q, k, n: ((n != 1)[:, None, None, :]) & ((n != 1)[:, None, :, None])),
    "documents": ("causal & document", lambda q, k, n: _same((n == 1).cumsum(-1)) & (k <= q)),
    "labels": ("causal & label", lambda q, k, n: _same(n) & (k <= q)),
    "images": ("pairs", lambda q, k, n: (_same(n) & (n > 0)[:, None, :, None]) | (k <= q)),
    "a cache of fixed size": ("causal", lambda q, k, n: k <= q + n[0, 0]),
}


def _same(labels: Tensor) -> Tensor:
    return labels[:, None, :, None] == labels[:, None, None, :]


def _masked(mask: Mask, fused: bool) -> Callable[..., Tensor]:
    def call(x: Tensor, numbers: Tensor) -> Tensor:
        q, k, v = x, x * 0.5, x.sin()
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        keep = mask(rows, columns, numbers)
        if fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.expand(1, 1, q.shape[2], k.shape[2]))
        return (q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v

    return call


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask(name: str, fused: bool) -> None:
    text, mask = MASKS[name]
    run, found = compiled(_masked(mask, fused), NARROW)
    x, numbers = torch.randn(1, 1, LENGTH, FEATURES), _numbers()
    with torch.no_grad():
        assert _largest(lambda: run(x, numbers)) <= MOST_BYTES
    assert (found.masks, found.refusals, found.misses) == ([text], [], [])


def test_what_is_watched_sees_a_square() -> None:
    """The same mask left as it is: a table for each pair, and its scores."""
    length = 8192
    x = torch.randn(1, 1, length, FEATURES)
    keep, numbers = Policy.load({"version": 1, "rules": [{"name": "k", "match": {}, "apply": {"form": "keep"}}]}), _numbers()
    run, _ = compiled(_masked(MASKS["causal"][1], False), keep)
    with torch.no_grad():
        assert _largest(lambda: run(x, numbers[:, :length])) >= length * length


def _small(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": LENGTH, **more,
    }  # fmt: skip


def _model(name: str, attention: str) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    configs = {
        "llama": lambda: transformers.LlamaConfig(**_small()),
        "mistral": lambda: transformers.MistralConfig(**_small(sliding_window=4096)),
        "gemma": lambda: transformers.GemmaConfig(**_small(head_dim=8)),
        "llama4": lambda: transformers.Llama4TextConfig(
            **_small(head_dim=8, attention_chunk_size=8192, num_local_experts=2, intermediate_size_mlp=16, moe_layers=[])
        ),
    }
    config = configs[name]()
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "llama4"])
def test_models(name: str, attention: str) -> None:
    model = _model(name, attention)
    ids = torch.randint(0, 32, (1, LENGTH))
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    mask[:, :100] = 0
    run, found = compiled(model, NARROW)
    with torch.no_grad():
        call = lambda: run(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)  # noqa: E731
        assert _largest(call) <= MOST_BYTES
    assert (found.refusals, found.misses) == ([], [])
    assert "padding" in found.sites[0].mask.words


def test_a_table_of_biases_is_said_to_be_one() -> None:
    """A bias for each pair is what such a model adds: it stays, and the site names it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    run, found = compiled(model, NARROW)
    with torch.no_grad():
        largest = _largest(lambda: run(input_ids=torch.randint(0, 32, (1, 2048))))
    assert largest >= 2048 * 2048
    (site,) = found.sites
    assert site.bias
