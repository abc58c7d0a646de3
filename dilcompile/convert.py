"""``dilcompile.convert``: a model that runs rewritten wherever it is called, without a compiler behind it."""

from __future__ import annotations

import copy
import os
from typing import Any, TypeVar

from torch import nn

from dilcompile.backend import dilated
from dilcompile.policy import Policy

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    policy: str | os.PathLike[str] | dict[str, Any] | Policy | None = None,
    *,
    report: str | os.PathLike[str] | None = None,
) -> Model:
    """The model with its attentions rewritten by policy, run eagerly; ``model`` itself stays as it is.

    The result is of the model's own class and shares its parameters, buffers and submodules: same ``state_dict`` keys, same
    ``generate``, ``train`` and ``eval``; to go back, use ``model``. Graphs are taken at the first call of each kind, by the
    same finder as under ``torch.compile``. For speed from fused code use ``torch.compile(model, backend="dilated")``.

    Args:
        model: any module. A module compiled in place (``model.compile()``) is taken as it was before.
        policy: path, dict, ``Policy`` or preset name; None: ``DILCOMPILE_POLICY``, else ``longnet``. Read now.
        report: path of an .html or .json file to write at each capture.

    Raises:
        TypeError: if ``model`` is no module.
        PolicyError: for a policy that can't be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, not {type(model).__name__}; for a function use torch.compile")
    options: dict[str, Any] = {"policy": Policy.load(policy), "inner": "eager"}
    if report is not None:
        options["report"] = report
    converted = copy.copy(model)
    converted.compile(backend=dilated, options=options)
    return converted
