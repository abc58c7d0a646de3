"""Small models of many architectures, to test that every attention is found and none is changed. Nothing is downloaded."""

from __future__ import annotations

from zoo import audio, decoders, encoders, handwritten, multimodal, negatives, seq2seq, torch_nn, vision
from zoo.model import Model

FAMILIES = (encoders, decoders, seq2seq, vision, multimodal, audio, torch_nn, handwritten, negatives)
ZOO: dict[str, Model] = {model.name: model for family in FAMILIES for model in family.MODELS}
assert len(ZOO) == sum(len(family.MODELS) for family in FAMILIES), "two models have one name"
