"""What an entry of the zoo is: a small model of random weights, how it is called, and what is known of it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Padding = Literal["right", "left", "ones", "none"]


@dataclass(frozen=True)
class Setting:
    """How a model is called.

    Args:
        padding: a 2-D mask with a padded row (``right``, ``left``), one without (``ones``), or no mask.
        cache: ask for a key-value cache where the model has one.
    """

    batch: int = 2
    seq: int = 48
    padding: Padding = "right"
    cache: bool = False


@dataclass(frozen=True)
class Model:
    """One entry.

    Args:
        make: a module (native models), or the configuration and the class's name (Hugging Face).
        inputs: keyword arguments of one call.
        implementations: values of ``attn_implementation``; ``("native",)`` for models without that choice.
        attention: False for what only looks like attention: no site of it may be found.
        note: what is special about it.
    """

    name: str
    family: str
    make: Callable[[], nn.Module | tuple[Any, str]]
    inputs: Callable[[Setting], Inputs]
    implementations: tuple[str, ...] = ("eager", "sdpa")
    attention: bool = True
    note: str = ""

    def build(self, implementation: str) -> nn.Module:
        """A fresh module with the weights of seed 0, in eval mode. Nothing is downloaded."""
        torch.manual_seed(0)
        made = self.make()
        if isinstance(made, nn.Module):
            return made.eval()
        config, name = made
        kind = _class_of(config, name)
        more = _experts(kind)
        try:
            return kind._from_config(config, attn_implementation=implementation, **more).eval()
        except ValueError as error:
            if "backbone" not in str(error).lower():
                raise
            # Its convolutional backbone knows no other attention than the written one.
            torch.manual_seed(0)
            config, name = self.make()  # type: ignore[misc]
            ways = {"": implementation, "backbone_config": "eager"}
            return kind._from_config(config, attn_implementation=ways, **more).eval()

    def call(self, setting: Setting, dtype: torch.dtype | None = None) -> Inputs:
        """The arguments of one call; floating ones in ``dtype``."""
        torch.manual_seed(0)
        given = self.inputs(setting)
        return {name: _cast(value, dtype) for name, value in given.items()}


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating and dtype is not None else value


def _experts(kind: Any) -> dict[str, str]:
    """Mixtures of experts by plain products: the grouped one that is the default knows no float64."""
    chosen = getattr(kind, "_can_set_experts_implementation", None)
    return {"experts_implementation": "batched_mm"} if chosen is not None and chosen() else {}


def _class_of(config: Any, name: str) -> Any:
    """The model's class; some are not exported by ``transformers`` itself."""
    import transformers

    found = getattr(transformers, name, None)
    if found is not None:
        return found
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    assert package.__file__ is not None
    for file in sorted(os.listdir(os.path.dirname(package.__file__))):
        if file.startswith("modeling_") and file.endswith(".py"):
            module = importlib.import_module(f"{package.__name__}.{file.removesuffix('.py')}")
            if hasattr(module, name):
                return getattr(module, name)
    raise ImportError(f"transformers has no class {name}")


@cache
def quiet() -> None:
    """Keep transformers from talking and from looking for files elsewhere."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
