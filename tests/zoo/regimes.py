"""The ways in which each model is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zoo.model import Model, Setting

PLAIN = Setting()
TEXT = frozenset({"encoder", "decoder", "seq2seq", "multimodal"})
CACHED = frozenset({"decoder", "seq2seq"})


@dataclass(frozen=True)
class Regime:
    """One way of running a model.

    Args:
        setting: how it is called.
        train: train mode, with gradients.
        dtype: of weights and inputs.
        dynamic: compile for any length, then run at two.
        families: of the models that it makes a difference to; None: all.
        fusions: also count what Inductor's own fuse_attention takes.
    """

    name: str
    setting: Setting = PLAIN
    train: bool = False
    dtype: torch.dtype = torch.float64
    dynamic: bool = False
    families: frozenset[str] | None = None
    fusions: bool = False

    def takes(self, model: Model) -> bool:
        return self.families is None or model.family in self.families


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("inference", fusions=True),
        Regime("training", train=True, fusions=True),
        Regime("left", Setting(padding="left"), families=TEXT),
        Regime("ones", Setting(padding="ones"), families=TEXT),
        Regime("none", Setting(padding="none"), families=TEXT),
        Regime("cache", Setting(cache=True), families=CACHED, fusions=True),
        Regime("bf16", dtype=torch.bfloat16),
        Regime("dynamic", dynamic=True, families=TEXT | {"torch_nn", "handwritten"}),
    )
}
