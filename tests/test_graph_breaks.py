"""Graphs without a sharded attention, in front of graph breaks and behind them: what would be wrong in them is refused, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import SdpaAttention
from ranks import over_ranks
from torch import Tensor, nn

import dilcompile
from dilcompile import distributed
from dilcompile.placements.marks import MARKS

ROWS = 12


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    torch._dynamo.reset()
    MARKS.forget()
    yield
    MARKS.forget()


def policy(**match: Any) -> dict[str, Any]:
    rule = {"match": match, "apply": {"form": "keep"}, "shard": {"mesh": "cp", "method": "ring"}}
    return {"mesh": {"cp": {"size": 2}}, "rules": [rule, {"apply": {"form": "keep"}}]}


class Broken(nn.Module):
    """Something, a causal attention and something else, each in a graph of its own."""

    def __init__(self, before: Callable[[Any, Any], Any], behind: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.before, self.behind, self.attend = before, behind, SdpaAttention()
        self.register_buffer("table", torch.randn(64, 32))
        self.register_buffer("numbers", torch.arange(64))

    def forward(self, x: Tensor) -> Any:
        x = self.before(self, x)
        torch._dynamo.graph_break()
        x, *more = x if isinstance(x, tuple) else (x,)
        x = self.attend(x)
        torch._dynamo.graph_break()
        return self.behind(self, (x, *more) if more else x)


def same(model: Any, x: Any) -> Any:
    return x


FINE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "features": (lambda m, x: F.layer_norm(x, (32,)), lambda m, x: x.softmax(-1).cumsum(-1)),
    "as long as the shard": (lambda m, x: x * 2, lambda m, x: x[..., :ROWS].softmax(-1)),
    "counted and not used along the sequence": (
        lambda m, x: (x + 1, torch.arange(ROWS)),
        lambda m, x: (x[0] * 2, x[1].float().mean()),
    ),
    "constants": (lambda m, x: (x + 1, torch.ones(ROWS, 1)), lambda m, x: x[0] * x[1]),
}
WRONG: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any], str]] = {
    "cumsum behind": (same, lambda m, x: x.cumsum(1), "cumsum (cumsum): cumsum acts along the sequence"),
    "loss behind": (same, lambda m, x: x.square().mean(), "mean runs over the tokens of one rank alone"),
    "attention behind": (
        same,
        lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        "this attention sees the tokens of one rank alone",
    ),
    "positions before": (lambda m, x: x + m.table[:ROWS], same, "it takes one entry a token out of a table"),
    "shift before": (lambda m, x: x.roll(1, 1), same, "roll (roll): roll acts along the sequence"),
    "counted before, used behind": (
        lambda m, x: (x * 2, torch.arange(ROWS)),
        lambda m, x: x[0] + m.table[x[1]],
        "an earlier graph counted it from this rank's first row on",
    ),
    "cut before, used behind": (
        lambda m, x: (x * 2, m.numbers[:ROWS]),
        lambda m, x: x[0] + m.table[x[1]],
        "an earlier graph counted it from this rank's first row on",
    ),
}  # fmt: skip


def refusals(model: nn.Module, *args: Any, made: Any = None, **kwargs: Any) -> list[str]:
    report = dilcompile.explain(model, *args, policy=made or policy(causal=True), **kwargs)
    assert any("broke the graph" in note for note in report.notes)
    return [note for note in report.notes if "would be refused" in note]


@pytest.mark.parametrize("name", FINE)
def test_graphs_that_treat_every_token_alike_pass(name: str) -> None:
    assert refusals(Broken(*FINE[name]), torch.randn(2, ROWS, 32)) == []


@pytest.mark.parametrize("name", WRONG)
def test_graphs_that_would_be_wrong_are_refused(name: str) -> None:
    before, behind, said = WRONG[name]
    found = refusals(Broken(before, behind), torch.randn(2, ROWS, 32))
    assert said in found[0]
    assert "test_graph_breaks.py:" in found[0]
    if "an earlier graph" not in said and "behind" not in name:
        # It came first: only the attention told how many tokens there are.
        assert "would be refused in graph 0" in found[0]
    assert any("fullgraph=True" in line for line in found)


# Models

IDS = torch.randint(0, 96, (2, ROWS))
POSITIONS = torch.arange(ROWS).repeat(2, 1)


def _break(*_: Any) -> None:
    torch._dynamo.graph_break()


def broken_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    # Graphs: up to the layers, the norm, the head.
    model.model.norm.register_forward_hook(_break)
    return model


def broken_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=4, use_cache=False)).eval()
    model.transformer.ln_f.register_forward_hook(_break)
    return model


@pytest.mark.parametrize("make", [broken_llama, broken_gpt2])
def test_models_with_graph_breaks(make: Callable[[], nn.Module]) -> None:
    """Passed where they are given positions, refused where they count them, and where they are given labels."""
    model = make()
    assert refusals(model, made=policy(), input_ids=IDS, position_ids=POSITIONS) == []
    counted = refusals(model, made=policy(), input_ids=IDS)
    assert "it counts positions" in counted[0] or "an earlier graph counted it" in counted[0]
    shifted = refusals(model, made=policy(), input_ids=IDS, position_ids=POSITIONS, labels=IDS)
    assert any("moves numbers of tokens along the sequence" in line for line in shifted)


def over_two(rank: int) -> dict[str, Any]:
    """Compiled on real ranks, the batch cut by ``shard_inputs``."""
    model, found = broken_llama().double(), {}
    ids = torch.arange(2 * ROWS)[None] % 96
    alone = model(input_ids=ids).logits
    shard = distributed.shard_inputs({"input_ids": ids})
    compiled = torch.compile(model, backend="dilated", options={"policy": policy(), "inner": "eager"})
    own = compiled(**shard).logits
    right = alone[:, rank * ROWS : (rank + 1) * ROWS]
    found["gap"] = (own - right).abs().max().item() / alone.abs().max().item()
    # Graphs of modules, in front of the layers and behind them.
    torch._dynamo.reset()
    apart = broken_llama().double()
    for part in (apart.model.embed_tokens, *apart.model.layers, apart.model.norm, apart.lm_head):
        part.compile(backend="dilated", options={"policy": policy(), "inner": "eager"})
    found["gap of parts"] = (apart(**shard).logits - right).abs().max().item() / alone.abs().max().item()
    # The graph in front of the first attention: the batch says what is the sequence.
    for name in ("positions before", "cumsum behind"):
        torch._dynamo.reset()
        broken = torch.compile(Broken(*WRONG[name][:2]), backend="dilated", options={"policy": policy(), "inner": "eager"})
        batch = {"inputs_embeds": torch.randn(2, 2 * ROWS, 32)}
        try:
            broken(distributed.shard_inputs(batch)["inputs_embeds"])
        except torch._dynamo.exc.BackendCompilerFailed as error:
            found[name] = f"{type(error.inner_exception).__name__}: {error.inner_exception}"
    return found


def test_real_ranks_run_a_broken_model_and_refuse_a_wrong_one() -> None:
    for found in over_ranks({"cp": 2}, over_two, patience=400.0):
        assert max(found["gap"], found["gap of parts"]) < 8 * torch.finfo(torch.float32).eps
        assert "ShardingError" in found["positions before"]
        assert "holds a sequence that is sharded over mesh axis 'cp'" in found["positions before"]
        assert "it takes one entry a token out of a table" in found["positions before"]
        assert "cumsum acts along the sequence" in found["cumsum behind"]
        assert "fullgraph=True" in found["cumsum behind"]
