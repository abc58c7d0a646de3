"""Axis tracking, line by line: what each dim of a tensor is made of. Letters are the axes as the inputs have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dilcompile.passes.axes.atoms import Atom
from dilcompile.passes.axes.axes import Axes


def drawn(function: Callable[..., Tensor], *shapes: str) -> str:
    """The output's dims in the letters of the inputs: ``b h.d`` is two dims, the second of two axes.

    A star marks an axis that the tensor does not vary along, a question mark one that is none of the inputs'.
    """
    sizes = {letter: size for size, letter in zip((2, 3, 5, 7, 11, 13, 17), sorted(set("".join(shapes))), strict=False)}
    inputs = [torch.zeros([sizes[letter] for letter in shape]) for shape in shapes]
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs).graph
    nodes = list(graph.nodes)
    axes = Axes(nodes, frozenset(), {"aten::scaled_dot_product_attention": "bhsd"})
    names: dict[int, str] = {}
    for node, shape in zip(graph.find_nodes(op="placeholder"), shapes, strict=True):
        for dim, letter in zip(axes[node], shape, strict=True):
            for i, atom in enumerate(dim):
                names[id(atom)] = letter + (str(i) if len(dim) > 1 else "")
    (output,) = nodes[-1].args
    return " ".join(".".join(_name(atom, names) for atom in dim) or "1" for dim in axes[output])


def _name(atom: Atom, names: dict[int, str]) -> str:
    if id(atom) in names:
        return names[id(atom)]
    if atom.broadcast:
        return "*"
    return names.get(id(atom.root), "") + "?"


GOLDEN: list[tuple[Callable[..., Tensor], tuple[str, ...], str]] = [
    (lambda x: x.transpose(0, 1), ("ab",), "b a"),
    (lambda x: x.reshape(6, 5), ("abc",), "a.b c"),
    (lambda x: x.reshape(6, 5).view(2, 3, 5), ("abc",), "a b c"),
    (lambda x: x.reshape(30).view(6, 5).t(), ("abc",), "c a.b"),
    (lambda x: x.permute(2, 0, 1).flatten(1), ("abc",), "c a.b"),
    (lambda x: x.movedim(0, -1), ("abc",), "b c a"),
    (lambda x: x.mT, ("abc",), "a c b"),
    (lambda x: x[:, None].expand(2, 4, 3), ("ab",), "a * b"),
    (lambda x: x[:, None].expand(2, 4, 3).reshape(8, 3), ("ab",), "a.* b"),
    (lambda x: x.repeat_interleave(4, 0), ("ab",), "a.* b"),
    (lambda x: x.repeat(4, 1), ("ab",), "*.a b"),
    (lambda x: x[:, None].expand(2, 4, 3) * 2, ("ab",), "a * b"),
    (lambda x: torch.nn.functional.dropout(x[:, None].expand(2, 4, 3), 0.5), ("ab",), "a ? b"),
    (lambda x: x[:, None].expand(2, 4, 3) + torch.ones(4, 1), ("ab",), "a ? b"),
    (lambda x: x[:, None].expand(2, 4, 3).masked_fill(torch.ones(4, 1, dtype=torch.bool), 0), ("ab",), "a ? b"),
    (lambda x: x[:, 1:], ("ab",), "a ?"),
    (lambda x: x.roll(1, 1), ("ab",), "? ?"),
    (lambda x: x.flip(0), ("ab",), "? ?"),
    (lambda x, y: x @ y, ("ab", "bc"), "a c"),
    (lambda x, y: torch.einsum("abc,adc->dba", x, y), ("abc", "adc"), "d b a"),
    (lambda x: x @ x.mT, ("abc",), "a b? b?"),
    (lambda x, y: x @ y, ("abc", "cd"), "a b d"),
    (lambda x, y: torch.nn.functional.scaled_dot_product_attention(x, y, y), ("abcd", "abed"), "a b c d"),
    (lambda x, y: torch.cat((x, y), 1)[:, :3], ("ab", "ac"), "a b"),
    (lambda x, y: torch.cat((x, y), 1)[:, 3:], ("ab", "ac"), "a c"),
    (lambda x, y: torch.cat((x, y), 1)[:, :-5], ("ab", "ac"), "a b"),
    (lambda x, y: torch.cat((x, y), 1)[:, 1:4], ("ab", "ac"), "a ?"),
    (lambda x: torch.nn.functional.pad(x, (1, 0))[:, 1:], ("ab",), "a b"),
    (lambda x: torch.nn.functional.pad(x, (1, 0))[:, :-1], ("ab",), "a ?"),
    (lambda x: x.sum(1, keepdim=True), ("abc",), "a 1 c"),
    (lambda x: x.unsqueeze(1).squeeze(1), ("ab",), "a b"),
    (lambda x, y: x.masked_fill(y > 0, 0), ("ab", "ab"), "a b"),
    (lambda x: x.view(3, 2), ("ab",), "? ?"),
]  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{','.join(case[1])}:{case[2]}")
def test_axes(case: tuple[Callable[..., Tensor], tuple[str, ...], str]) -> None:
    function, shapes, golden = case
    assert drawn(function, *shapes) == golden
