"""How many attentions a model really runs, counted by watching it run eagerly. No graph and no finder is involved.

A written-out attention is a softmax whose input comes from a product of two activations and whose output goes into another
product; so is an SDPA call that torch itself writes out. A fused one (SDPA's kernels, the layers of torch.nn, FlexAttention) is
one operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "addbmm"})
SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "softmax", "_log_softmax", "exp"})
FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "flex_attention", "_scaled_dot_product_")
# What scores and probabilities pass through on the way, in place or not.
CARRIERS = frozenset(
    """
    view _unsafe_view reshape _reshape_alias reshape_copy transpose permute t expand clone contiguous detach alias as_strided
    squeeze unsqueeze slice select split split_with_sizes unbind chunk unfold index index_select gather index_put scatter copy
    repeat repeat_interleave cat stack constant_pad_nd flip roll lift_fresh _to_copy
    mul div add sub rsub neg pow log sum amax tanh sigmoid clamp clamp_min minimum maximum nan_to_num addcmul
    masked_fill where native_dropout bernoulli
    """.split()
)
# More sources than this, and a tensor is no score of one attention any more.
_MOST_SCORES, _MOST_SOFTMAXES = 8, 4


@dataclass
class Truth:
    """Counts of one run.

    Args:
        calls: fused attentions.
        softmaxes: written-out softmaxes over products, each with the number of products that read it.
    """

    calls: int = 0
    softmaxes: list[int] = field(default_factory=list)

    @property
    def sites(self) -> int:
        return self.calls + sum(readers > 0 for readers in self.softmaxes)


def count(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Attention sites of one call."""
    truth = Truth()
    with torch.no_grad(), Watch(truth, (*model.parameters(), *model.buffers())):
        model(**inputs)
    return truth.sites


class Watch(TorchDispatchMode):
    """Follows each tensor: the products it is a score of, the softmaxes it is a probability of."""

    supports_higher_order_operators = True

    def __init__(self, truth: Truth, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.truth = truth
        self._held: list[Tensor] = list(weights)  # an id stays its tensor's while the tensor lives
        self._weights = {id(weight) for weight in self._held}
        self._scores: dict[int, frozenset[int]] = {}
        self._written: dict[int, frozenset[int]] = {}  # memory that scores were written into, whoever reads it
        self._probabilities: dict[int, frozenset[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1] if hasattr(func, "_schema") else func.__name__
        plain = name.removesuffix("_") if not name.startswith("_") else name
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._held += made
        self.truth.calls += plain.startswith(FUSED)
        self._follow(plain, given, made, in_place=plain != name)
        return out

    def _follow(self, name: str, given: list[Tensor], made: list[Tensor], in_place: bool) -> None:
        scores = frozenset().union(*(self._scores_of(x) for x in given))
        probabilities = frozenset().union(*(self._probabilities.get(id(x), frozenset()) for x in given))
        if name in PRODUCTS:
            self._product(given[-2:], made, scores)
        elif name in SOFTMAXES:
            self._softmax(scores, probabilities, made)
        elif name in CARRIERS:
            self._carry(name, given, made, scores, probabilities, in_place)

    def _product(self, operands: list[Tensor], made: list[Tensor], scores: frozenset[int]) -> None:
        for operand in operands:
            for softmax in self._probabilities.get(id(operand), ()):
                self.truth.softmaxes[softmax] += 1
        mixed = any(id(operand) in self._weights for operand in operands)
        for tensor in made:
            # Scores that weights mix (talking heads) are scores still.
            self._scores[id(tensor)] = scores if mixed else frozenset({id(tensor)})

    def _softmax(self, scores: frozenset[int], probabilities: frozenset[int], made: list[Tensor]) -> None:
        if not probabilities and scores:
            probabilities = frozenset({len(self.truth.softmaxes)})
            self.truth.softmaxes.append(0)
        for tensor in made if probabilities else ():
            self._probabilities[id(tensor)] = probabilities

    def _carry(
        self,
        name: str,
        given: list[Tensor],
        made: list[Tensor],
        scores: frozenset[int],
        probabilities: frozenset[int],
        in_place: bool,
    ) -> None:
        for tensor in made:
            if probabilities and len(probabilities) <= _MOST_SOFTMAXES:
                self._probabilities[id(tensor)] = probabilities
            elif scores and name != "sum" and len(scores) <= _MOST_SCORES:
                self._scores[id(tensor)] = scores
            if given and all(id(x) in self._weights for x in given):
                self._weights.add(id(tensor))
        if in_place and given and scores and not probabilities:
            self._written[given[0].untyped_storage()._cdata] = scores

    def _scores_of(self, tensor: Tensor) -> frozenset[int]:
        if tensor.layout is not torch.strided or tensor.is_nested:
            return self._scores.get(id(tensor), frozenset())
        written = self._written.get(tensor.untyped_storage()._cdata, frozenset())
        return self._scores.get(id(tensor), frozenset()) | written
