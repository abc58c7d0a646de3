"""Biases are named by what they are made of: slopes by distance, T5's buckets, tables by offset; nothing else is called so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from finding import Call, double  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor, nn

import dilcompile
from dilcompile.passes.finding import bias_words, slopes
from dilcompile.passes.finding.bias_words import is_by_offset
from dilcompile.site import BiasSpec

B, H, S, D = 2, 4, 9, 8
SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)
PLACES = torch.arange(S)
STEPS = PLACES - PLACES[:, None]


def attend(q: Tensor, bias: Tensor, causal: bool = False) -> Tensor:
    scores = q @ q.mT / D**0.5 + bias
    if causal:
        at = torch.arange(q.shape[-2])
        scores = scores.masked_fill(at > at[:, None], float("-inf"))
    return scores.softmax(-1) @ q


def words(module: Any, *inputs: Tensor, **how: Any) -> list[str]:
    """The words of the only site's biases; it is exact, forward and backward."""
    (site,) = agree(module if isinstance(module, nn.Module) else Call(module), *inputs, **how).sites
    return [str(bias) for bias in site.bias]


def heads() -> Tensor:
    return torch.randn(B, H, S, D)


def alibi(q: Tensor, place: Callable[[Tensor, Tensor], Tensor], causal: bool = False) -> Tensor:
    slope = 2.0 ** -(2.0 * torch.arange(1, H + 1))
    at = torch.arange(q.shape[-2])
    return attend(q, slope[:, None, None] * place(at[:, None], at), causal)


SHOWN = "alibi(0.25, 0.0625, 0.015625, 0.00390625)"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        (lambda q, k: k - q, SHOWN),
        (lambda q, k: -(q - k).abs(), SHOWN),
        (lambda q, k: k[None], SHOWN),
        (lambda q, k: 2 * (k - q) + 7, "alibi(0.5, 0.125, 0.03125, 0.0078125)"),
        (lambda q, k: (q - k).abs(), "alibi(-0.25, -0.0625, -0.015625, -0.00390625)"),
        (lambda q, k: k - (k - q).abs(), "tensor"),
        (lambda q, k: k * q, "tensor"),
        (lambda q, k: k * k, "tensor"),
        (lambda q, k: (k - q) ** 2, "tensor"),
        (lambda q, k: (k - q).abs().clamp(max=3), "tensor"),
        (lambda q, k: (1 + (k - q).abs()).log(), "tensor"),
        (lambda q, k: (k - 2 * q).abs(), "tensor"),
        (lambda q, k: (k > q).long(), "tensor"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_slopes_by_distance(place: Any, shown: str, causal: bool) -> None:
    assert words(lambda q: alibi(q, place, causal), heads()) == [shown]


def test_a_count_of_kept_keys_is_a_place_and_other_integers_are_not() -> None:
    keep = torch.ones(B, S, dtype=torch.int64)
    keep[1, :3] = 0
    slope = torch.tensor(SLOPES)

    def counted(q: Tensor, keep: Tensor) -> Tensor:
        at = (keep.cumsum(-1) - 1) * keep
        return attend(q, slope[:, None, None] * at[:, None, None])

    def kinds(q: Tensor, kind: Tensor) -> Tensor:
        return attend(q, slope[:, None, None] * kind[:, None, None])

    def other_mask(q: Tensor, keep: Tensor) -> Tensor:
        return attend(q, slope[:, None, None] * ((keep.cumsum(-1) - 1) * (keep + 1))[:, None, None])

    assert words(counted, heads(), keep) == [SHOWN]
    assert words(kinds, heads(), keep) == ["tensor"]
    assert words(other_mask, heads(), keep) == ["tensor"]


def test_numbers_of_data_are_no_places_and_gates_no_slopes() -> None:
    slope = torch.tensor(SLOPES)
    assert words(lambda q, x: attend(q, slope[:, None, None] * x), heads(), torch.randn(B, 1, 1, S)) == ["tensor"]
    assert words(lambda q, gate: attend(q, gate[:, None, None] * torch.arange(S)), heads(), torch.rand(H)) == ["tensor"]
    assert words(lambda q: attend(q, 0.5 * torch.arange(S)), heads()) == ["tensor"]


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(SLOPES))

    def forward(self, q: Tensor) -> Tensor:
        at = torch.arange(S)
        return attend(q, self.slope[:, None, None] * (at - at[:, None]))


def test_learned_slopes_have_no_numbers() -> None:
    assert words(Learned(), heads()) == ["alibi"]


TABLE = torch.tensor(SLOPES)[:, None, None]


@pytest.mark.parametrize(
    ("buffer", "shown"),
    [
        (TABLE * STEPS, SHOWN),
        (-TABLE * STEPS.abs(), SHOWN),
        (TABLE * PLACES, SHOWN),
        ((TABLE * STEPS).masked_fill(STEPS > 0, float("-inf")), SHOWN),
        (TABLE * STEPS * STEPS, "tensor"),
        (TABLE * STEPS.abs().clamp(max=4), "tensor"),
        (0.5 * STEPS.double().expand(H, S, S).clone(), "tensor"),
        (torch.randn(H, S, S), "tensor"),
    ],
)
def test_a_buffer_is_known_by_its_values(buffer: Tensor, shown: str) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", buffer)

        def forward(self, q: Tensor) -> Tensor:
            return attend(q, self.bias)

    assert words(Held(), heads()) == [shown]


class Table(nn.Module):
    """A learned table; ``numbers`` gives the rows of it."""

    def __init__(self, numbers: Callable[..., Tensor], learned: bool = True, index: Tensor | None = None) -> None:
        super().__init__()
        rows = torch.randn(S * S, H)
        self.table = nn.Parameter(rows) if learned else None
        self.register_buffer("held", None if learned else rows)
        self.register_buffer("index", index)
        self.numbers = numbers

    def forward(self, q: Tensor, *more: Tensor) -> Tensor:
        table = self.held if self.table is None else self.table
        bias = table[self.numbers(self, *more)]
        return attend(q, bias.movedim(-1, -3))


def offsets(self: Table) -> Tensor:
    at = torch.arange(S)
    return at - at[:, None] + S


def logarithmic(self: Table) -> Tensor:
    at = torch.arange(S)
    away = (at - at[:, None]).abs()
    return torch.where(away < 4, away, 4 + (away.clamp(min=1) / 4.0).log().mul(2).long())


def grid(side: int) -> Tensor:
    """Swin's index: the offset of two places of a square window."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    away = place[:, :, None] - place[:, None, :] + side - 1
    return away[0] * (2 * side - 1) + away[1]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Table(offsets), "relative table"),
        (lambda: Table(logarithmic), "t5 buckets"),
        (lambda: Table(lambda self: self.index, index=grid(3)), "relative table"),
        (lambda: Table(lambda self: self.index.view(-1).view(S, S), index=grid(3)), "relative table"),
        (lambda: Table(offsets, learned=False), "tensor"),
        (lambda: Table(lambda self: self.index, index=torch.randint(0, 9, (S, S))), "tensor"),
        (lambda: Table(lambda self: self.index, index=PLACES.expand(S, S).clone()), "tensor"),
        (lambda: Table(lambda self: torch.arange(S).expand(S, S)), "tensor"),
        (lambda: Table(lambda self: torch.arange(S * S).view(S, S)), "tensor"),
    ],
)
def test_learned_tables(make: Callable[[], Table], word: str) -> None:
    assert words(make(), heads()) == [word]


def test_tables_that_data_chooses_or_gates_are_tensors() -> None:
    kinds = torch.randint(0, 3, (B, S))
    assert words(Table(lambda self, kind: kind[:, None] - kind[:, :, None] + 3), heads(), kinds) == ["tensor"]
    assert words(Table(lambda self, kind: ((kind[:, None] - kind[:, :, None]).abs() + 1.0).log().long()), heads(), kinds) == [
        "tensor"
    ]

    class Gated(Table):
        def forward(self, q: Tensor, *more: Tensor) -> Tensor:
            return attend(q, torch.sigmoid(q.sum(-1, keepdim=True)) * self.table[offsets(self)].permute(2, 0, 1))

    assert words(Gated(offsets), heads()) == ["tensor"]


def test_offsets_along_lines_and_grids() -> None:
    assert is_by_offset(grid(4))
    assert is_by_offset(grid(4).flatten())
    tokens = torch.full((17, 17), 99)
    tokens[1:, 1:] = grid(4)
    assert is_by_offset(tokens), "a class token before the grid"
    cube = torch.stack(torch.meshgrid(*3 * [torch.arange(2)], indexing="ij")).flatten(1)
    away = cube[:, :, None] - cube[:, None]
    assert is_by_offset(away[0] * 9 + away[1] * 3 + away[2])
    wrong = grid(4)
    wrong[3, 7] += 1
    assert not is_by_offset(wrong)
    assert not is_by_offset(torch.zeros(9, 9, dtype=torch.int64))
    assert not is_by_offset(torch.arange(12))


def _model(name: str, **config: Any) -> nn.Module:
    import transformers

    torch.set_default_dtype(torch.float32)
    kind, settings = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    model: nn.Module = kind._from_config(settings(**config), attn_implementation="eager")
    return model.eval()


IDS = torch.arange(24).view(2, 12)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
SIX = (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[tuple[str, tuple[float, ...]]]]] = {
    "bloom": (lambda: _model("Bloom", vocab_size=96, hidden_size=32, n_layer=1, n_head=4), TEXT, [("alibi", SLOPES)]),
    "bloom, six heads": (lambda: _model("Bloom", vocab_size=96, hidden_size=36, n_layer=1, n_head=6), TEXT, [("alibi", SIX)]),
    "mpt": (lambda: _model("Mpt", vocab_size=96, d_model=32, n_layers=1, n_heads=4, max_seq_len=64), TEXT, [("alibi", SLOPES)]),
    "t5": (
        lambda: _t5(),
        {"input_ids": IDS},
        [("t5 buckets", ())],
    ),
    "swin": (
        lambda: _model("Swin", image_size=32, patch_size=2, embed_dim=16, depths=[1], num_heads=[4], window_size=4),
        {"pixel_values": torch.ones(1, 3, 32, 32)},
        [("relative table", ())],
    ),
    "beit": (
        lambda: _model("Beit", image_size=32, patch_size=8, use_relative_position_bias=True, **SMALL),
        {"pixel_values": torch.ones(1, 3, 32, 32)},
        [("relative table", ())],
    ),
    "bert": (lambda: _model("Bert", **SMALL), {**TEXT}, []),
}


def _t5() -> nn.Module:
    import transformers

    torch.set_default_dtype(torch.float32)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return transformers.T5EncoderModel(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, inputs, wanted = MODELS[name]
    model = make()
    with torch.no_grad():
        report = dilcompile.explain(model, policy="exact", **inputs)
    (site,) = report.sites
    assert [(bias.word, bias.slopes) for bias in site.bias] == [(word, pytest.approx(slopes)) for word, slopes in wanted]
    described: Any = json.loads(json.dumps(report.to_dict()))
    (held,) = described["graphs"][0]["sites"]
    assert [bias["word"] for bias in held["bias"]] == [word for word, _ in wanted]
    text, html = " ".join(str(report).split()), report.to_html()
    for bias in site.bias:
        assert f"bias {bias}" in html
        assert f"bias {bias.tensor}" in html
        assert bias.word in text


def test_many_slopes_are_cut_short() -> None:
    assert str(BiasSpec("alibi", "x", (0.5, 0.25, 0.125, 0.0625, 0.03125))) == "alibi(0.5, 0.25, ..., 0.03125)"


@pytest.mark.parametrize(
    ("where", "attribute", "wrong", "test"),
    [
        (slopes, "_is_fixed", lambda *given: True, test_numbers_of_data_are_no_places_and_gates_no_slopes),
        (slopes, "_count", lambda place, reader: 1, test_numbers_of_data_are_no_places_and_gates_no_slopes),
        (
            bias_words,
            "origins",
            lambda node, *given: {"weight"} if "table" in node.name else set(),
            test_tables_that_data_chooses_or_gates_are_tensors,
        ),
        (bias_words, "_over_grid", lambda square: True, test_offsets_along_lines_and_grids),
    ],
)
def test_forgetting_a_condition_is_noticed(
    where: Any, attribute: str, wrong: Any, test: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, attribute, wrong)
    with pytest.raises(AssertionError):
        test()
