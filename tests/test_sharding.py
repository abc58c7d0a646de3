"""Sites over several ranks, and what else of a model would be wrong where a rank has a part of the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import llama
from policy_sites import site
from torch import Tensor, nn

import dilcompile
from dilcompile.decision import Decision, Rejection
from dilcompile.errors import PolicyError, ShardingError
from dilcompile.forms import Dilated, KeepStructure
from dilcompile.placements.choice import PlacementChoice
from dilcompile.policy import Policy, resolve
from dilcompile.site import BiasSpec, ByRow, MaskSpec

CAUSAL = MaskSpec(causal=True)


def policy(apply: Any = None, layout: str = "contiguous", ranks: int = 2, **shard: Any) -> dict[str, Any]:
    axes = {"cp": {"size": ranks, "layout": layout}, "heads": {"size": 2}}
    return {"mesh": axes, "rules": [{"apply": apply or {"form": "keep"}, "shard": {"mesh": "cp", **shard}}]}


def verdict(made: dict[str, Any], **changes: Any) -> Decision | Rejection:
    (found,) = resolve(Policy.load(made), [site(**changes)], enforce=False)
    return found


# Placements


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (policy(method="gather_needed"), "gather_needed over cp=2, contiguous, prefetch"),
        (policy({"form": "ring"}, "zigzag"), "ring over cp=2, zigzag, prefetch"),
        (policy(dim="heads"), "ulysses over cp=2, contiguous, prefetch"),
        (policy(dim="heads", layout="striped", overlap="off"), "ulysses over cp=2, striped, off"),
        (policy(mesh=["cp", "heads"]), "usp with gather_needed over cp=2 x heads=2, contiguous, prefetch"),
        (
            policy(mesh=["cp", "heads"], method="usp", order="striped"),
            "usp with gather_needed over cp=2 x heads=2, striped, prefetch",
        ),
    ],
)
def test_a_rule_gives_its_sites_a_placement(made: dict[str, Any], text: str) -> None:
    found = verdict(made)
    assert isinstance(found, Decision)
    assert (str(found.placement), found.form, found.fidelity) == (text, KeepStructure(), "exact")
    assert (found.fallback, found.check.on_difference) == ("error", "error")


def test_a_chunked_site_keeps_its_chunks() -> None:
    chunked = MaskSpec(causal=True, by_row=(ByRow("chunk", "k // 64 == q // 64"),), chunk=64)
    found = verdict(policy(), mask=chunked)
    assert isinstance(found, Decision)
    assert found.form == KeepStructure(chunk=64)


def test_auto_takes_the_ring_where_needs_are_not_known_from_sizes() -> None:
    found = verdict(
        policy({"form": "dilated", "segments": [64, 128], "rates": [1, 2]}), mask=MaskSpec(causal=True, documents=True)
    )
    assert isinstance(found, Decision)
    assert isinstance(found.placement, PlacementChoice)
    assert found.placement.method == "ring"
    assert found.placement.why.startswith("auto: ring over contiguous: ")


def test_lengths_are_those_of_the_whole_sequence() -> None:
    window = {"form": "sliding_window", "window": 4096}
    assert verdict(policy(window), q_len=4096, k_len=4096).fidelity == "approximate"  # type: ignore[union-attr]
    made = policy({"form": "dilated"})
    made["rules"][0]["match"] = {"min_seq": 8192}
    assert isinstance(verdict(made, q_len=4096, k_len=4096), Decision)
    assert verdict(made, q_len=2048, k_len=2048).rule is None


def test_one_rank_changes_nothing() -> None:
    kept = verdict(policy(ranks=1))
    assert (kept.asked, kept.axis) == (True, None)  # type: ignore[union-attr]
    alone = verdict(policy({"form": "dilated", "segments": [64], "rates": [1]}, ranks=1))
    assert isinstance(alone, Decision)
    assert (alone.placement, alone.form) == (None, Dilated(segments=(64,), rates=(1,)))
    assert alone.notes[-1] == "shard: mesh axis 'cp' has one rank: nothing is moved"


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a bias over pairs (alibi)": (policy(), {"bias": (BiasSpec("alibi", "x"),)}),
    "a bias over pairs (relative table)": (policy(), {"bias": (BiasSpec("relative table", "x"),)}),
    "it is cross attention": (policy(), {"kind": "cross", "mask": MaskSpec()}),
    "stand behind keys of a cache": (policy(), {"mask": MaskSpec(causal=True, q_offset=4)}),
    "a factor by row (k < bound[b, q])": (policy(), {"mask": MaskSpec(by_row=(ByRow("rows", "k < bound[b, q]"),))}),
    "a row that sees no key gets the mean": (policy(), {"mask": MaskSpec(causal=True, key_padding=True, empty_rows="uniform")}),
    "its mask could not be read (x < 3)": (policy(), {"mask": MaskSpec(unread="x < 3")}),
    "halo needs contiguous shards, not zigzag": (policy(layout="zigzag", method="halo"), {"mask": MaskSpec(causal=True, left=5)}),
    "halo: everything": (policy(method="halo"), {"mask": MaskSpec()}),
    "8 query heads can't be dealt to 3 ranks": (policy(ranks=3, dim="heads"), {}),
    "needs the LSE of each branch": (policy({"form": "dilated", "segments": [64], "rates": [1], "merge_grad": "detach"}), {}),
    "chosen from the data": (
        policy({"form": "block_sparse", "block": 64, "pattern": {"topk": {"estimator": "pooled", "blocks": 4}}}),
        {},
    ),
    "softmax in float32": (policy(), {"dtype": torch.float64, "narrowed": "softmax"}),
    "for queries that all ranks hold": (policy(method="tree"), {}),
    "8192 queries but 16384 keys": (policy(), {"k_len": 8192}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_can_not_be_sharded_says_why(reason: str) -> None:
    made, changes = REFUSED[reason]
    found = verdict(made, **changes)
    assert isinstance(found, Rejection)
    assert reason.lower() in found.reason.lower()
    assert found.cure
    assert (found.axis, found.asked) == ("cp", False)
    with pytest.raises(ShardingError, match=r"rule .* shards model\.layers\.0\.self_attn \(model\.py:1\) over mesh axis 'cp'"):
        resolve(Policy.load(made), [site(**changes)])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"apply": {"form": "ring"}}, "form 'ring' needs the ranks that the keys go around"),
        ({"apply": {"form": "ring"}, "shard": {"mesh": "cp", "method": "halo"}}, "form 'ring' is method 'ring', but shard asks for 'halo'"),
        ({"apply": {"form": "keep"}, "shard": {"mesh": "cp", "dim": "heads", "method": "ring"}}, "dim 'heads' is method 'ulysses', got 'ring'"),
        ({"apply": {"form": "keep"}, "shard": {"mesh": "cp", "method": "usp"}}, "method 'usp' takes two different mesh axes"),
        ({"apply": {"form": "keep"}, "shard": {"mesh": ["cp", "dp"], "method": "usp"}}, "unknown mesh axis 'dp'"),
    ],
)  # fmt: skip
def test_sections_that_do_not_fit_together(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.load({"mesh": {"cp": {"size": 2}}, "rules": [rule]})


# Hazards


class Block(nn.Module):
    """One causal attention and something else, ``rest(model, x)``."""

    def __init__(self, rest: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.conv, self.rest = nn.Linear(32, 96), nn.Conv1d(32, 32, 3, padding=1), rest
        self.places = nn.Parameter(torch.randn(64, 32))
        self.register_buffer("table", torch.randn(64, 32))
        self.register_buffer("zeros", torch.zeros(64, 32))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self, x)


FINE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer norm": lambda m, x: F.layer_norm(m.attend(x), (32,)),
    "features": lambda m, x: m.attend(x).softmax(-1).topk(3, -1)[0].sum(-1, keepdim=True) * x,
    "sorted features": lambda m, x: m.attend(x).sort(-1)[0],
    "tokens and batch as one": lambda m, x: m.attend(x).reshape(-1, 32).mul(2).reshape(2, 16, 32),
    "einsum": lambda m, x: torch.einsum("bsd,ed->bse", m.attend(x), m.qkv.weight),
    "look-up by class": lambda m, x: m.attend(x) + m.table[x.argmax(-1)],
    "beside each other": lambda m, x: torch.stack([m.attend(x), x]).sum(0) + torch.cat([x, x], -1)[..., :32],
    "constants": lambda m, x: m.attend(x) + torch.zeros(16, 32) + m.zeros[:16],
    "channels": lambda m, x: F.conv1d(m.attend(x).mT, m.conv.weight[..., :1]).mT,
    "all of a slice": lambda m, x: m.attend(x)[:, :16],
}
WRONG: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "arange": (lambda m, x: m.attend(x + torch.arange(16)[:, None]), "arange (arange): it counts positions"),
    "arange looked up": (lambda m, x: m.attend(x) + m.table[torch.arange(16)], "arange (arange): it counts positions"),
    "learned positions": (lambda m, x: m.attend(x + m.places[:16]), "slice_1): it takes one entry a token out of a table"),
    "a table": (lambda m, x: m.attend(x + m.table[:16]), "slice_1): it takes one entry a token out of a table"),
    "cumsum": (lambda m, x: m.attend(x).cumsum(1), "cumsum acts along the sequence"),
    "convolution": (lambda m, x: m.attend(x) + m.conv(x.mT).mT, "conv1d (conv1d): a convolution over the sequence"),
    "convolution before": (lambda m, x: m.attend(m.conv(x.mT).mT), "conv1d (conv1d): a convolution over the sequence"),
    "linear attention": (lambda m, x: m.attend(x) + x @ (x.mT @ x), "it sums over the tokens of one rank alone"),
    "flip": (lambda m, x: m.attend(x.flip(1)), "flip acts along the sequence"),
    "roll": (lambda m, x: m.attend(x.roll(1, 1)), "roll acts along the sequence"),
    "shift": (lambda m, x: m.attend(x)[:, 1:] - x[:, :-1], "slice acts along the sequence"),
    "joined": (lambda m, x: torch.cat([m.attend(x), x], 1), "cat acts along the sequence"),
    "first token": (lambda m, x: m.attend(x)[:, 0], "select acts along the sequence"),
    "sort": (lambda m, x: m.attend(x).sort(1)[0], "sort acts along the sequence"),
    "softmax": (lambda m, x: m.attend(x).softmax(1), "softmax acts along the sequence"),
    "mean": (lambda m, x: m.attend(x) - x.mean(1, keepdim=True), "mean runs over the tokens of one rank alone"),
    "sum of all": (lambda m, x: m.attend(x).square().sum(), "sum runs over the tokens of one rank alone"),
    "norm over tokens": (lambda m, x: F.layer_norm(m.attend(x), (16, 32)), "it takes the mean over the tokens of one rank"),
    "windows": (lambda m, x: m.attend(x.reshape(8, 4, 32)).reshape(2, 16, 32), "it cuts this rank's rows into parts"),
    "repeated": (lambda m, x: m.attend(x).repeat(1, 2, 1), "it repeats this rank's rows"),
    "triangle": (lambda m, x: m.attend(x) * torch.ones(16, 32).tril(), "tril"),
    "picked": (lambda m, x: m.attend(x)[:, torch.tensor([3, 1])], "it picks tokens by their number on this rank"),
    "dropout": (lambda m, x: F.dropout(m.attend(x), 0.1), "it drops out other numbers of tokens than one rank would (p=0.1)"),
    "noise": (lambda m, x: m.attend(x) + torch.randn(2, 16, 32), "it draws numbers for this rank's tokens"),
    "unknown": (lambda m, x: m.attend(x) + torch.fft.fft(x, dim=1).real, "is not understood"),
    "chosen by data": (lambda m, x: m.attend(x)[x[..., 0] > 0], "is not understood"),
}  # fmt: skip


def refusals(model: nn.Module, *args: Any, made: Any = None, **kwargs: Any) -> list[str]:
    """What would be refused of a model whose attention all is sharded."""
    report = dilcompile.explain(model, *args, policy=made or policy(), **kwargs)
    assert report.decisions
    assert not report.rejections
    return [note for note in report.notes if "would be refused, as its sequence is sharded" in note]


@pytest.mark.parametrize("name", FINE)
def test_what_treats_every_token_alike_passes(name: str) -> None:
    assert refusals(Block(FINE[name]), torch.randn(2, 16, 32)) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_wrong_along_the_sequence_is_refused(name: str) -> None:
    rest, said = WRONG[name]
    found = refusals(Block(rest), torch.randn(2, 16, 32))
    assert found
    assert said in found[0]
    assert "test_sharding.py:" in found[0] or "functional.py:" in found[0] or "conv.py:" in found[0]


def test_an_attention_that_no_rule_shards_is_refused() -> None:
    made = policy()
    made["rules"] = [{"match": {"causal": True}, **made["rules"][0]}, {"apply": {"form": "keep"}}]

    def both(model: Any, x: Tensor) -> Tensor:
        return model.attend(x) + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]).squeeze(1)

    report = dilcompile.explain(Block(both), torch.randn(2, 16, 32), policy=made)
    (note,) = (note for note in report.notes if "would be refused" in note)
    assert "this attention sees the tokens of one rank alone; let a rule with `shard` take it" in note


def test_the_backend_stops_with_all_that_is_wrong() -> None:
    torch._dynamo.reset()
    model = Block(lambda m, x: m.attend(x.flip(1)).cumsum(1))
    compiled = torch.compile(model, backend="dilated", options={"policy": policy(), "inner": "eager"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(torch.randn(2, 16, 32))
    error = caught.value.inner_exception
    assert isinstance(error, ShardingError)
    assert "holds a sequence that is sharded over mesh axis 'cp', and would compute something else than one rank does" in str(
        error
    )
    assert "flip (flip)" in str(error)
    assert "cumsum (cumsum)" in str(error)


def test_sites_of_one_sequence_in_two_orders_are_refused() -> None:
    made = policy()
    made["rules"] = [
        {"match": {"causal": True}, "apply": {"form": "ring"}, "shard": {"mesh": "cp", "order": "zigzag"}},
        {"apply": {"form": "ring"}, "shard": {"mesh": "cp"}},
    ]

    def both(model: Any, x: Tensor) -> Tensor:
        return model.attend(x) + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]).squeeze(1)

    (found,) = refusals(Block(both), torch.randn(2, 16, 32), made=made)
    assert "it holds the tokens contiguous, but" in found
    assert "say the order once, as `layout` of mesh axis 'cp'" in found


def test_a_graph_that_nothing_is_sharded_of_says_so() -> None:
    made = policy()
    made["rules"] = [{"match": {"causal": False}, **made["rules"][0]}, {"apply": {"form": "keep"}}]
    report = dilcompile.explain(Block(lambda m, x: m.attend(x)), torch.randn(2, 16, 32), policy=made)
    assert any("none of its attention is sharded" in note for note in report.notes)


def test_exported_programs_are_not_sharded() -> None:
    program = torch.export.export(Block(lambda m, x: m.attend(x)), (torch.randn(2, 16, 32),))
    with pytest.raises(ShardingError, match="which an exported program can't hold"):
        dilcompile.rewrite_exported(program, policy())


# Models

IDS = torch.randint(0, 96, (2, 16))
POSITIONS = torch.arange(16).repeat(2, 1)


def test_a_llama_is_sharded_once_it_is_given_positions() -> None:
    assert refusals(llama("sdpa"), input_ids=IDS, position_ids=POSITIONS) == []
    padding = torch.ones(2, 16, dtype=torch.long)
    assert refusals(llama("sdpa"), input_ids=IDS, position_ids=POSITIONS, attention_mask=padding) == []
    (found,) = refusals(llama("sdpa"), input_ids=IDS)
    assert "arange (arange): it counts positions from this rank's first row on; pass position_ids" in found
    assert "modeling_llama.py:" in found


def test_gpt2_and_bert() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    gpt2 = GPT2Model(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=4, use_cache=False)).eval()
    assert refusals(gpt2, input_ids=IDS, position_ids=POSITIONS) == []
    assert "it counts positions" in refusals(gpt2, input_ids=IDS)[0]
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    bert = BertModel(config).eval()
    (pooled,) = refusals(bert, input_ids=IDS, position_ids=POSITIONS)
    assert "pooler (modeling_bert.py" in pooled
    assert "select acts along the sequence" in pooled
    bert.pooler = None
    assert refusals(bert, input_ids=IDS, position_ids=POSITIONS) == []
    assert "it takes one entry a token out of a table" in refusals(bert, input_ids=IDS)[0]


def test_a_loss_inside_the_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, use_cache=False,
        loss_type="ForCausalLM",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert refusals(model, input_ids=IDS, position_ids=POSITIONS) == []
    shifted, reduced = refusals(model, input_ids=IDS, position_ids=POSITIONS, labels=IDS)
    assert "pad moves numbers of tokens along the sequence" in shifted
    assert "cross_entropy_loss" in reduced
    assert "dilcompile.distributed.sharded_loss" in shifted
    assert "dilcompile.distributed.sharded_loss" in reduced


def test_state_space_layers_are_refused() -> None:
    from transformers import BambaConfig, BambaModel

    config = BambaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        use_cache=False, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
    )  # fmt: skip
    found = refusals(BambaModel(config).eval(), input_ids=IDS, position_ids=POSITIONS)
    assert "layers.0.mamba" in found[0]
    assert "a convolution over the sequence" in found[0]
