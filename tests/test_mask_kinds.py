"""Masks that are known by vectors: each is exact forward and in every gradient, static and symbolic, and no square tensor is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, check, double, said  # noqa: F401  (the fixture works by being here)
from spellings import agree, square_tensors
from torch import Tensor

B, H = 2, 3
LEAST = torch.finfo(torch.float64).min

LENGTH = 13  # no other size


def long(*more: Callable[[], Tensor]) -> Callable[[], tuple[Any, ...]]:
    """q, k, v of ``LENGTH`` rows, and what else the case needs."""
    return lambda: (*(torch.randn(B, H, LENGTH, 4) for _ in range(3)), *(make() for make in more))


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key positions of scores [..., Sq, Sk]."""
    return torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])[None, :]


def seen(rule: Callable[..., Tensor], fill: float = LEAST) -> Callable[..., Tensor]:
    """Attention over the pairs that ``rule(q, k, *more)`` lets through."""

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        scores = q @ k.mT
        return attend(scores.masked_fill(~rule(*_places(scores), *more), fill), v)

    return call


def _sdpa(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rule(rows, columns, *more))

    return call


def keep() -> Tensor:
    mask = torch.ones(B, LENGTH, dtype=torch.bool)
    mask[1, :4] = False
    return mask


def numbers() -> Tensor:
    """Labels that come back."""
    return torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 1, 0, 0, 2, 2], [3, 1, 1, 1, 3, 3, 3, 0, 0, 0, 1, 1, 3]])


def counted() -> Tensor:
    """Positions that start anew in each document."""
    return torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]])


def images() -> Tensor:
    """-1 for text, else the number of an image."""
    return torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, 2, 2], [0, 0, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1]])


def _rows_of(x: Tensor) -> Tensor:
    return x[:, None, :, None]


def _keys_of(x: Tensor) -> Tensor:
    return x[:, None, None, :]


def _documents(q: Tensor, k: Tensor, position: Tensor) -> Tensor:
    """As Hugging Face packs: a document begins wherever positions do not go up by one, and they say what is earlier."""
    begins = torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1
    document = begins.cumsum(-1)
    return (_rows_of(document) == _keys_of(document)) & (_keys_of(position) <= _rows_of(position))


def _windowed_documents(q: Tensor, k: Tensor, position: Tensor) -> Tensor:
    return _documents(q, k, position) & (_keys_of(position) > _rows_of(position) - 3)


def _shifted_chunks(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Chunks of five tokens from the first that counts, as Llama 4 has them after padding from the left."""
    skipped = (mask.cumsum(-1) == 0).sum(-1)[:, None, None, None]
    return (k <= q) & ((k - skipped) // 5 == (q - skipped) // 5) & _keys_of(mask)


KINDS: list[Case] = [
    ("chunks", seen(lambda q, k: (k <= q) & (k // 5 == q // 5)), long(), "causal & chunk (zero)"),
    ("chunks after padding", seen(_shifted_chunks), long(keep), "causal & chunk & padding (uniform)"),
    ("chunks alone", seen(lambda q, k: k // 4 == q // 4), long(), "chunk (zero)"),
    ("a prefix", seen(lambda q, k: (k <= q) | (k < 4)), long(), "prefix (zero)"),
    ("a prefix a batch row", seen(lambda q, k, n: (k <= q) | (k < n[:, None, None, None])), long(lambda: torch.tensor([2, 6])), "prefix (zero)"),
    ("a prefix and padding", seen(lambda q, k, m: ((k <= q) | (k < 4)) & _keys_of(m)), long(keep), "prefix & padding (uniform)"),
    ("images seen whole", seen(lambda q, k, g: (k <= q) | ((_rows_of(g) == _keys_of(g)) & (_rows_of(g) >= 0))), long(images), "pairs (zero)"),
    ("images seen whole, and padding", seen(lambda q, k, g, m: ((k <= q) | ((_rows_of(g) == _keys_of(g)) & (_rows_of(g) >= 0))) & _keys_of(m)), long(images, keep), "pairs & padding (uniform)"),
    ("labels that come back", seen(lambda q, k, n: _rows_of(n) == _keys_of(n)), long(numbers), "label (zero)"),
    ("labels that come back, causal", seen(lambda q, k, n: (_rows_of(n) == _keys_of(n)) & (k <= q)), long(numbers), "causal & label (zero)"),
    ("packed positions", seen(_documents), long(counted), "causal & document (zero)"),
    ("packed positions in a window", seen(_windowed_documents), long(counted), "causal & window(2, 0) & document (zero)"),
    ("positions that are not counted", seen(lambda q, k, p: _keys_of(p) <= _rows_of(p)), long(numbers), "pairs (zero)"),
    ("queries that don't count", seen(lambda q, k, m: _rows_of(m) & _keys_of(m)), long(keep), "rows & padding (uniform)"),
    ("queries that don't count, by a product", seen(lambda q, k, m: _rows_of(m) * _keys_of(m) != 0), long(lambda: keep().long() * 3), "rows & padding (uniform)"),
    ("sinks and a window", seen(lambda q, k: (k <= q) & ((k > q - 4) | (k < 2))), long(), "causal & pairs (zero)"),
    ("positions of the caller", seen(lambda q, k, p: k <= p[:, None]), long(lambda: torch.randperm(LENGTH)), "rows (uniform)"),
    ("a table at positions of the caller", seen(lambda q, k, p: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[p]), long(lambda: torch.arange(LENGTH) - 3), "rows (uniform)"),
    ("an offset known when running", seen(lambda q, k, n: (k <= q + n) & (k > q + n - 4)), long(lambda: torch.tensor(2)), "causal & window(3, 0) (uniform)"),
    ("two offsets known when running", seen(lambda q, k, n, m: (k <= q + n) & (k <= q + m)), long(lambda: torch.tensor(2), lambda: torch.tensor(1)), "rows (uniform)"),
    ("a mask turned by einsum", seen(lambda q, k, m: torch.einsum("ijbn->bnij", m.mT[None, :, :, None].expand(LENGTH, -1, -1, 1))), long(keep), "padding (uniform)"),
    ("each second key", seen(lambda q, k, n: (k <= q) & (_keys_of(n) % 2 == 0)), long(numbers), "causal & padding (uniform)"),
    ("not the own key", seen(lambda q, k: k != q), long(), "pairs (uniform)"),
    ("not the own key, by eye", seen(lambda q, k: ~torch.eye(LENGTH, dtype=torch.bool)), long(), "pairs (uniform)"),
    ("each third key", seen(lambda q, k: (k <= q) & ((q - k) % 3 == 0)), long(), "causal & label (zero)"),
    ("each third key but one", seen(lambda q, k: (q - k + 1) % 3 != 2), long(), "pairs (zero)"),
    ("strides and a window", seen(lambda q, k: (k <= q) & (((q - k) % 4 == 0) | (q - k < 4))), long(), "causal & pairs (zero)"),
    ("round a circle", seen(lambda q, k: torch.minimum((q - k).abs(), LENGTH - (q - k).abs()) <= 2), long(), "pairs (zero)"),
    ("the lesser of two masks", seen(lambda q, k, m: torch.min((k <= q).long(), _keys_of(m).long()) > 0), long(keep), "causal & padding (uniform)"),
    ("the greater of two masks", seen(lambda q, k: torch.maximum((k <= q).long(), (k < 4).long()) > 0), long(), "pairs (zero)"),
    ("a grid of positions", seen(lambda q, k: (lambda at: at[1] <= at[0])(torch.meshgrid(q[:, 0], k[0], indexing="ij"))), long(), "causal (zero)"),
    ("a grid of positions, turned", seen(lambda q, k: (lambda at: at[0] <= at[1])(torch.meshgrid(k[0], q[:, 0], indexing="xy"))), long(), "causal (zero)"),
    ("an outer product", seen(lambda q, k, m: torch.einsum("bi,bj->bij", m.long(), m.long())[:, None] != 0), long(keep), "rows & padding (uniform)"),
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case[0])
def test_a_mask_known_by_vectors(case: Case, dynamic: bool | None) -> None:
    name, function, inputs, golden = case
    found = agree(Call(function), *inputs(), dynamic=dynamic)
    if dynamic is None:
        assert said(found) == golden, name
    assert (found.misses, found.refusals) == ([], [])
    if golden.endswith("(zero)") and not dynamic:
        for gm in found.graphs:
            assert square_tensors(gm, LENGTH) == []


@pytest.mark.parametrize("case", KINDS[::3], ids=lambda case: case[0])
def test_the_same_under_sdpa(case: Case) -> None:
    """The same reader from another place: some of each neighbourhood of the table."""
    found = agree(Call(_sdpa_of(case)), *case[2]())
    assert said(found).rsplit(" ", 1)[0] == case[3].rsplit(" ", 1)[0]
    assert found.refusals == []


def _sdpa_of(case: Case) -> Callable[..., Tensor]:
    """The case's rule as the mask of the operator; a row without keys is 0 there, so one key is always seen."""
    rule = case[1].__closure__[1].cell_contents if case[1].__closure__ else None
    assert callable(rule)
    return _sdpa(rule)


def _pictures(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Tokens are the places of a picture, whose mask is made coarser."""
    small = F.interpolate(mask[:, None].double(), size=(3, 4))[:, 0] != 0
    return attend((q @ k.mT).masked_fill(~small.flatten(1)[:, None, None], LEAST), v)


def _picture() -> Tensor:
    mask = torch.ones(B, 6, 8)
    mask[1, :, 5:] = 0
    mask[0, 4:] = 0
    return mask


def test_a_mask_of_a_picture() -> None:
    inputs = (*(torch.randn(B, H, 12, 4) for _ in range(3)), _picture())
    found = agree(Call(_pictures), *inputs)
    assert said(found) == "padding (uniform)"


def test_rows_of_a_picture_see_their_own() -> None:
    """Query and key axes of two parts each: places of one row of the picture."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).view(B, H, 3, 4, 3, 4)
        rows = torch.arange(3)
        scores = scores.masked_fill((rows[:, None] != rows)[:, None, :, None], LEAST)
        return attend(scores.view(B, H, 12, 12), v)

    found = agree(Call(call), *(torch.randn(B, H, 12, 4) for _ in range(3)))
    assert said(found) == "chunk (zero)"


FILLS: list[Case] = [
    ("one fill, then the same added", lambda q, k, v, m: attend(_then(q @ k.mT, lambda r, c: c <= r, LEAST) + _added(q @ k.mT, m, LEAST), v), long(keep), "causal & padding (others)"),
    ("fills of two sizes", lambda q, k, v, m: attend(_then(q @ k.mT, lambda r, c: c <= r, -1e30) + _added(q @ k.mT, m, LEAST), v), long(keep), "causal & padding (others)"),
    ("a fill of a window, then a mask of another fill added", lambda q, k, v, m: attend(_then(q @ k.mT, lambda r, c: (c <= r) & (c > r - 3), -1e30) + _added(q @ k.mT, m, LEAST), v), long(keep), "causal & window(2, 0) & padding (others)"),
    ("a mask added, then a fill of another size", lambda q, k, v, m: attend(_then(q @ k.mT + _added(q @ k.mT, m, -1e30), lambda r, c: c > r - 3, -1e30), v), long(keep), "causal & window(2, 0) & padding (others)"),
    ("fills of two sizes over a bias", lambda q, k, v, m, a: attend(_then(q @ k.mT + a, lambda r, c: c <= r, -1e30) + _added(q @ k.mT, m, LEAST), v), long(keep, lambda: torch.randn(H, 1, LENGTH)), "causal & padding + bias (others)"),
    ("a bias between fills of two sizes", lambda q, k, v, m, a: attend(_then(q @ k.mT, lambda r, c: c <= r, -1e30) + a + _added(q @ k.mT, m, LEAST), v), long(keep, lambda: torch.randn(H, 1, LENGTH)), "causal & padding + bias (others)"),
    ("a small fill that the scores show through", lambda q, k, v, m: attend(q @ k.mT + _added(q @ k.mT, m, -1e4), v), long(keep), "causal & padding (others)"),
    ("capped, then filled", lambda q, k, v, m: attend(torch.tanh(q @ k.mT / 2) * 2 + _added(q @ k.mT, m, LEAST), v), long(keep), "causal & padding (others)"),
    ("a bias beside the fill", lambda q, k, v, m, a: attend(q @ k.mT + a + _added(q @ k.mT, m, LEAST), v), long(keep, lambda: torch.randn(H, 1, LENGTH)), "causal & padding + bias (others)"),
    ("a bias and a fill in one", lambda q, k, v, m, a: attend(q @ k.mT + (a + _added(q @ k.mT, m, LEAST)), v), long(keep, lambda: torch.randn(H, 1, LENGTH)), "causal & padding + bias (others)"),
    ("a bias that a fill takes the place of", lambda q, k, v, m, a: attend(q @ k.mT + torch.where(_keys_of(m), a, LEAST), v), long(keep, lambda: torch.randn(H, 1, LENGTH)), "padding + bias (others)"),
]  # fmt: skip


def _then(scores: Tensor, rule: Callable[..., Tensor], fill: float) -> Tensor:
    return torch.where(rule(*_places(scores)), scores, fill)


def _added(scores: Tensor, mask: Tensor, fill: float) -> Tensor:
    rows, columns = _places(scores)
    return torch.where((columns <= rows) & _keys_of(mask), 0.0, fill)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("case", FILLS, ids=lambda case: case[0])
def test_rows_without_keys_see_what_the_model_makes_them_see(case: Case, hidden: bool) -> None:
    """Rows in padding from the left, and a batch row that is hidden whole."""
    name, function, inputs, golden = case
    given = list(inputs())
    if hidden:
        given[3] = given[3].clone()
        given[3][0] = False
    found = agree(Call(function), *given)
    assert said(found) == golden, name


def _square(fill: float) -> Callable[[], Tensor]:
    """A float mask of the caller: causal after padding from the left, a batch row hidden whole, and one pair at -inf."""

    def make() -> Tensor:
        mask = torch.zeros(B, 1, LENGTH, LENGTH).masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), fill)
        mask[1, :, :, :4] = fill
        mask[0, :, 6] = fill
        mask[0, :, 6, 3] = -torch.inf
        mask[1, :, 2, :2] = fill / 4
        return mask

    return make


def _through_data(mask: Tensor) -> Tensor:
    """The mask as the reader can't see through."""
    return mask.roll(1, -1).roll(-1, -1)


TENSORS: list[Case] = [
    ("a float mask", lambda q, k, v, m: attend(q @ k.mT + m.detach(), v), long(_square(LEAST)), "other(float masks that are data) + bias (others)"),
    ("a float mask of another fill", lambda q, k, v, m: attend(q @ k.mT + m.detach(), v), long(_square(-1e30)), "other(float masks that are data) + bias (others)"),
    ("a float mask and a bias", lambda q, k, v, m, a: attend(q @ k.mT + (a + m.detach()), v), long(_square(LEAST), lambda: torch.randn(H, 1, LENGTH)), "other(float masks that are data) + bias (others)"),
    ("a float mask beside a causal one", lambda q, k, v, m: attend(_then(q @ k.mT, lambda r, c: c <= r, -torch.inf) + m.detach(), v), long(_square(LEAST)), "causal & other(float masks that are data) + bias (others)"),
    ("a float mask, and a fill", lambda q, k, v, m: attend(_then(q @ k.mT, lambda r, c: c <= r, LEAST) + m.detach(), v), long(_square(LEAST)), "kept: causal & other(float masks that are data) + bias (other)"),
    ("a float mask under a cap", lambda q, k, v, m: attend(torch.tanh(q @ k.mT) + m.detach(), v), long(_square(LEAST)), "other(float masks that are data) + bias (others)"),
    ("a float mask under SDPA", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.detach())[:, :, 7:], long(_square(LEAST)), "other(float masks that are data) + bias (others)"),
    ("a bool mask", lambda q, k, v, m: attend((q @ k.mT).masked_fill(_through_data(m), LEAST), v), long(lambda: _square(1.0)() > 0), "other(not (roll_1(b, 0, q, k))) (uniform)"),
    ("a bool mask under SDPA", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), long(lambda: _square(1.0)() == 0), "other(l_inputs_3_(b, 0, q, k)) (zero)"),
    ("a bool mask beside a causal one", lambda q, k, v, m: attend((q @ k.mT).masked_fill(m | ~(torch.arange(LENGTH)[:, None] >= torch.arange(LENGTH)), LEAST), v), long(lambda: _square(1.0)() > 0), "causal & other(not (l_inputs_3_(b, 0, q, k))) (uniform)"),
    ("a bool mask a head", lambda q, k, v, m: attend((q @ k.mT).masked_fill(m, LEAST), v), long(lambda: torch.rand(H, LENGTH, LENGTH) > 0.8), "other(not (l_inputs_3_(h, q, k))) (uniform)"),
    ("a bool mask that chooses what is added", lambda q, k, v, m: attend(q @ k.mT + torch.where(_through_data(m), LEAST, 0.0), v), long(lambda: _square(1.0)() > 0), "other(not (roll_1(b, 0, q, k))) (shifted)"),
]  # fmt: skip


@pytest.mark.parametrize("case", TENSORS, ids=lambda case: case[0])
def test_what_can_not_be_read_stays_a_tensor(case: Case) -> None:
    check(case)


def test_rows_of_infinities_become_nan() -> None:
    """Their gradients are not reproduced: they would poison every weight."""
    with torch.no_grad():
        case: Case = (
            "infinities",
            lambda q, k, v, m: attend(q @ k.mT + m, v),
            long(_square(-torch.inf)),
            "other(float masks that are data) + bias (others)",
        )
        check(case, gradients=False)
