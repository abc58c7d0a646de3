"""What models are called with. Numbers are drawn from generators of their own, so that one input says nothing of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.model import Inputs, Setting
from zoo.sizes import VOCAB

Call = Callable[[Setting], Inputs]
_FIRST_WORD = 5  # below are the tokens that stand for padding, begin, end and images


def _drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(at: Setting, seq: int | None = None, batch: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(_FIRST_WORD, VOCAB, (batch or at.batch, seq or at.seq), generator=generator)


def keep(at: Setting, seq: int | None = None) -> Tensor:
    """A mask [B, S] whose last row is padded by a quarter, on the side that the setting says."""
    length = seq or at.seq
    mask = torch.ones(at.batch, length, dtype=torch.long)
    if at.padding == "right":
        mask[-1, -(length // 4) :] = 0
    elif at.padding == "left":
        mask[-1, : length // 4] = 0
    return mask


def features(at: Setting, seq: int, width: int) -> Tensor:
    return _drawn(3, at.batch, seq, width)


def pixels(at: Setting, size: int = 32, channels: int = 3, frames: int | None = None) -> Tensor:
    time = () if frames is None else (frames,)
    return _drawn(1, at.batch, *time, channels, size, size)


def wave(at: Setting, length: int = 4000) -> Inputs:
    made: Inputs = {"input_values": _drawn(2, at.batch, length)}
    if at.padding != "none":
        made["attention_mask"] = keep(at, length)
    return made


def text(at: Setting) -> Inputs:
    return {"input_ids": ids(at), **padding(at)}


def padding(at: Setting) -> Inputs:
    return {} if at.padding == "none" else {"attention_mask": keep(at)}


def decoder(at: Setting) -> Inputs:
    return {**text(at), "use_cache": at.cache}


def seq2seq(at: Setting) -> Inputs:
    return {**text(at), "decoder_input_ids": ids(at, at.seq - 8), "use_cache": at.cache}


def image(size: int = 32, frames: int | None = None, **more: Any) -> Call:
    return lambda at: {"pixel_values": pixels(at, size, frames=frames), **more}


def image_and_text(at: Setting) -> Inputs:
    return {**text(at), "pixel_values": pixels(at)}


def hidden(at: Setting) -> Inputs:
    """Activations [B, S, width], as a single layer takes them."""
    from zoo.sizes import WIDTH

    return {"x": features(at, at.seq, WIDTH)}
