"""Every composition of spelling rules is found, read and exact; an approximate form hides the pairs it says, on the axes it says."""

from __future__ import annotations

import pytest
import torch
from finding import double  # noqa: F401  (the fixture works by being here)
from spellings import (
    EXACT,
    HIDES,
    LAYOUTS,
    MAKERS,
    MASKS,
    REACH,
    SCALE,
    SCALES,
    SHARES,
    SOFTMAXES,
    WINDOW,
    WINDOWED,
    Found,
    Spelling,
    Written,
    agree,
    inputs_of,
)

# All axes of one length, lengths that divide each other, single batch rows and heads.
SIZES = ((2, 4, 7, 6), (4, 4, 4, 4), (1, 4, 8, 4), (8, 2, 4, 2), (2, 2, 9, 3), (3, 4, 12, 1))
WORDS = {
    "none": "none",
    "causal": "causal",
    "window": f"causal & window({REACH - 1}, 0)",
    "band": f"window({REACH - 1}, {REACH - 1})",
    "padding": "padding",
    "causal+padding": "causal & padding",
    "reach": f"window(inf, {REACH})",
}


def _words(spelling: Spelling) -> str:
    length = spelling.sizes[2]
    if spelling.mask in ("window", "band", "reach") and length <= REACH:
        return "?"
    if spelling.mask == "reach" and length <= REACH + 1:
        return "none"  # no key is farther away than that
    return WORDS[spelling.mask]


def _check_found(spelling: Spelling, found: Found) -> None:
    assert found.misses == []
    assert found.refusals == [] or may_be_kept(spelling)
    (site,) = found.sites
    batch, heads, length, features = spelling.sizes
    assert (site.batch, site.heads, site.q_len, site.k_len, site.head_dim) == (batch, heads, length, length, features)
    assert site.kind == "self"
    assert str(site.mask) == _words(spelling)
    factor = 2.0 if spelling.layout == "baddbmm" else 1.0
    assert site.scale == pytest.approx(factor * (1.0 if spelling.scale in ("none", "learned") else SCALE))
    if spelling.share != "none" and heads > 1:
        assert site.kv_heads == Written(spelling).kv_heads
    assert site.bias == ()


def may_be_kept(spelling: Spelling) -> bool:
    """A row that padding empties is not proven full; under a number that rounding loses, nobody can say what it holds."""
    return spelling.softmax == "logsumexp" and "padding" in spelling.mask and spelling.layout not in ("sdpa", "kernel")


def check_exact(spelling: Spelling, dynamic: bool | None = None) -> Found:
    """Found, described and rewritten as written, and equal to the module itself forward and in every gradient."""
    found = agree(Written(spelling).eval(), *inputs_of(spelling), dynamic=dynamic)
    if dynamic is None:
        _check_found(spelling, found)
    return found


def _near(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return (rows - columns).abs() < WINDOW


def check_windowed(spelling: Spelling) -> None:
    """The window form on the plain spelling equals the spelling with the window written into its mask."""
    written = Written(spelling).eval()
    reference = Written(spelling, extra=_near).eval()
    reference.load_state_dict(written.state_dict())
    found = agree(written, *inputs_of(spelling), policy=WINDOWED, reference=reference, gradients=False)
    assert found.rewritten == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_layouts(layout: str, sizes: tuple[int, int, int, int]) -> None:
    """At all sizes the axes are found; that the window is on them shows where all are of one length, and where none is."""
    spelling = Spelling(layout=layout, sizes=sizes)
    check_exact(spelling)
    if sizes in SIZES[:2]:
        check_windowed(spelling)


@pytest.mark.parametrize("share", SHARES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_keys(share: str, layout: str) -> None:
    check_exact(Spelling(layout=layout, share=share, sizes=(4, 4, 4, 4)))
    check_windowed(Spelling(layout=layout, share=share, sizes=(2, 4, 7, 6)))


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale: str) -> None:
    check_exact(Spelling(scale=scale))
    check_exact(Spelling(scale=scale, layout="baddbmm"))


@pytest.mark.parametrize("hide", HIDES)
@pytest.mark.parametrize("mask", MASKS[1:])
def test_masks(mask: str, hide: str) -> None:
    """By turns in three layouts: each mask and each way of hiding meets each of them (``test_find_compositions`` draws of all)."""
    layout = ("bhsd", "h*b", "sdpa")[(MASKS.index(mask) + HIDES.index(hide)) % 3]
    check_exact(Spelling(mask=mask, hide=hide, layout=layout))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("mask", MASKS[1:])
def test_makers(mask: str, maker: str) -> None:
    """By turns in two layouts, of which one turns the mask."""
    if (MASKS.index(mask) + MAKERS.index(maker)) % 2:
        check_exact(Spelling(mask=mask, maker=maker))
    else:
        check_exact(Spelling(mask=mask, maker=maker, layout="einsum_kq", sizes=(4, 4, 4, 4)))


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("dropout", [False, True])
def test_softmaxes(softmax: str, dropout: bool) -> None:
    check_exact(Spelling(softmax=softmax, dropout=dropout))


def test_the_same_module_at_other_lengths() -> None:
    """One compilation with symbolic lengths serves lengths that it was not traced at."""
    spelling = Spelling(mask="window", share="expand")
    module = Written(spelling).eval()
    from spellings import compiled

    run, found = compiled(module, EXACT, dynamic=True)
    for length in (7, 11, 5):
        x = torch.randn(2, length, 24)
        torch.testing.assert_close(run(x), module(x), rtol=1e-9, atol=1e-9)
    assert found.refusals == []
    assert set(found.masks) == {WORDS["window"]}
