"""Gradient compression for DDP: the largest numbers of each bucket travel, the rest waits for the next step.

Top-k with error feedback: Deep Gradient Compression (Lin et al., arXiv 1712.01887, section 3); that the memory of what was left
out keeps the rate of convergence is shown in "Sparsified SGD with Memory" (Stich et al., arXiv 1809.07599).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from dilcompile.errors import DilcompileError
from dilcompile.lowering.distributed.exchange import all_gather_single

_MIB = 1 << 20
Warmup = Literal["average", "linear", "exponential"]


class TopKCompression:
    """A communication hook of ``DistributedDataParallel``.

    Each bucket's gradients, with what earlier steps left out added, are cut to the ``ratio`` of them that are largest. These are
    gathered from all ranks and averaged; what is not sent stays with the rank until a later step, in float32 (float64 for
    gradients in float64). Gradients that are no numbers are sent before all others and never kept, so that the optimizer, or a
    GradScaler, sees them. A parameter that a step does not use keeps what it has left.

    Use a constant loss scale (or bfloat16, which needs none): what is kept is in units of the scale of its own step.

    Args:
        ratio: share of a bucket's numbers that is sent, above 0 up to 1; rounded up to whole numbers.
        bucket_size_mb: MiB of gradients in a bucket: ``wrap`` gives it to DDP (25 if none is said), ``register`` compares it.
        warmup_steps: backward passes until ``ratio`` holds.
        warmup: what happens in them: ``average`` all gradients as without the hook, or lower the share from near 1 to ``ratio``,
            ``linear`` or ``exponential`` (Deep Gradient Compression, section 3.3).

    Attributes:
        bytes_sent: what this rank gave to collectives so far.
        bytes_plain: what it would have given without compression.

    Raises:
        DilcompileError: for a ratio, a size or a number of steps that can't be.
    """

    def __init__(
        self, ratio: float = 0.1, *, bucket_size_mb: float | None = None, warmup_steps: int = 0, warmup: Warmup = "average"
    ) -> None:
        if not (isinstance(ratio, (int, float)) and 0 < ratio <= 1):
            raise DilcompileError(f"ratio: {ratio!r} is no share above 0 and up to 1; 0.1 sends a tenth of the numbers")
        if bucket_size_mb is not None and not bucket_size_mb > 0:
            raise DilcompileError(f"bucket_size_mb: {bucket_size_mb!r} is no size above 0; 25 is DDP's own")
        if warmup_steps < 0:
            raise DilcompileError(f"warmup_steps: {warmup_steps} is below 0; 0 compresses from the first step")
        if warmup not in get_args(Warmup):
            raise DilcompileError(f"warmup: {warmup!r} is none of {', '.join(get_args(Warmup))}")
        self.ratio, self.warmup_steps, self.warmup = float(ratio), warmup_steps, warmup
        self.bucket_size_mb = 25.0 if bucket_size_mb is None else bucket_size_mb
        self._size_is_said = bucket_size_mb is not None
        self.steps = self.bytes_sent = self.bytes_plain = 0
        self._names: dict[Tensor, str] = {}
        self._residuals: dict[Tensor, Tensor] = {}
        self._buckets: dict[tuple[Tensor, ...], Tensor] = {}
        self._group: dist.ProcessGroup | None = None
        self._some_unused = False

    def wrap(self, module: Module, **options: Any) -> DistributedDataParallel:
        """``module`` under DDP with this hook, in buckets of ``bucket_size_mb``; ``options`` are those of DDP.

        Raises:
            DilcompileError: without a process group, or if ``bucket_cap_mb`` is among the options.
        """
        if "bucket_cap_mb" in options:
            raise DilcompileError("bucket_cap_mb: the size is said once, as bucket_size_mb of TopKCompression")
        _need_group()
        model = DistributedDataParallel(module, bucket_cap_mb=self.bucket_size_mb, **options)
        self.register(model)
        return model

    def register(self, model: DistributedDataParallel) -> None:
        """Make this the hook of a model that is under DDP already; its buckets stay as they are.

        Raises:
            DilcompileError: if it is not under DDP, its buckets have another size than was said, or this hook is another model's.
        """
        if not isinstance(model, DistributedDataParallel):
            raise DilcompileError(
                f"register takes a DistributedDataParallel, not {type(model).__name__}; wrap(module) makes one. Sharded models "
                "(FSDP) reduce their gradients themselves"
            )
        if self._names:
            raise DilcompileError("this TopKCompression is another model's hook already; make one for each model")
        if self._size_is_said and model.bucket_bytes_cap != int(self.bucket_size_mb * _MIB):
            raise DilcompileError(
                f"bucket_size_mb: {self.bucket_size_mb} was said, but the model's have {model.bucket_bytes_cap / _MIB:g} MiB; "
                "DDP fixes it when it is made: use wrap(module), give DDP the same bucket_cap_mb, or leave bucket_size_mb out"
            )
        model.register_comm_hook(self, _hook)
        self._names = {parameter: name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
        self._group, self._some_unused = model.process_group, model.find_unused_parameters

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start to average a bucket over the ranks: what DDP asks for as soon as a bucket's gradients are there."""
        gradients, parameters = bucket.buffer(), tuple(bucket.parameters())
        averages, ratio = self.warmup == "average" and self.steps < self.warmup_steps, self.current_ratio()
        self.steps += bucket.is_last()
        self.bytes_plain += gradients.numel() * gradients.element_size()
        if averages:
            self.bytes_sent += gradients.numel() * gradients.element_size()
            return self._averaged(gradients)
        used = _used(bucket.gradients()) if self._some_unused else None
        return self._compressed(gradients, self._residual_of(parameters, gradients), used, _count_of(gradients.numel(), ratio))

    def current_ratio(self) -> float:
        """The share of this step: ``ratio``, or above it in a warm-up that lowers it."""
        done = min(1.0, (self.steps + 1) / (self.warmup_steps + 1))
        if self.warmup == "linear":
            return 1 + (self.ratio - 1) * done if done < 1 else self.ratio
        return self.ratio**done if self.warmup == "exponential" else self.ratio

    def _averaged(self, gradients: Tensor) -> torch.futures.Future[Tensor]:
        gradients.div_(dist.get_world_size(self._group))
        future = dist.all_reduce(gradients, group=self._group, async_op=True).get_future()
        done: torch.futures.Future[Tensor] = future.then(lambda gathered: gathered.value()[0])
        return done

    def _compressed(
        self, gradients: Tensor, residual: Tensor, used: Tensor | None, count: int
    ) -> torch.futures.Future[Tensor]:
        corrected = residual.add_(gradients)
        offered = corrected if used is None else corrected.where(used, 0)
        # What is no number counts as the largest.
        chosen = offered.abs().nan_to_num_(nan=torch.inf).topk(count, sorted=False).indices
        values = _rounded(offered[chosen], gradients.dtype)
        # What rounding took from a value is kept too.
        residual[chosen] -= values.to(residual.dtype)
        residual.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        indices = chosen.to(_index_dtype(gradients.numel()))
        message = torch.cat([indices.view(torch.uint8), values.view(torch.uint8)])
        self.bytes_sent += message.numel()
        ranks = dist.get_world_size(self._group)
        gathered = message.new_empty(ranks * message.numel())
        future = all_gather_single(gathered, message, group=self._group, async_op=True).get_future()

        def add_up(_: object) -> Tensor:
            return _mean_of(gathered.view(ranks, -1), count, gradients)

        done: torch.futures.Future[Tensor] = future.then(add_up)
        return done

    def _residual_of(self, parameters: Sequence[Tensor], gradients: Tensor) -> Tensor:
        """What was left out of these parameters' gradients so far, [numel of the bucket], float32 or wider.

        DDP makes its buckets anew after the first step: what belongs to a parameter goes where the parameter goes.
        """
        key = tuple(parameters)
        if key not in self._buckets:
            flat = torch.zeros(gradients.numel(), dtype=_wide(gradients.dtype), device=gradients.device)
            start = 0
            for parameter in parameters:
                part = flat[start : start + parameter.numel()]
                if parameter in self._residuals:
                    part.copy_(self._residuals[parameter])
                self._residuals[parameter] = part
                start += parameter.numel()
            moved = set(parameters)
            self._buckets = {other: held for other, held in self._buckets.items() if not moved & set(other)}
            self._buckets[key] = flat
        return self._buckets[key]

    def state_dict(self) -> dict[str, Any]:
        """Steps, and what this rank left out, by the parameter's name. Each rank has its own."""
        residuals = {self._names[parameter]: part.clone() for parameter, part in self._residuals.items()}
        return {"steps": self.steps, "residuals": residuals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` of this rank gave, after ``register`` or ``wrap``.

        Raises:
            DilcompileError: before ``register`` or ``wrap``, for a parameter that the model does not have, or of another size.
        """
        if not self._names:
            raise DilcompileError("load_state_dict finds parameters by their names in the model; call wrap or register first")
        by_name = {name: parameter for parameter, name in self._names.items()}
        residuals: dict[Tensor, Tensor] = {}
        for name, part in state["residuals"].items():
            if name not in by_name:
                raise DilcompileError(f"the state has gradients of {name!r}, which is no parameter of the model that needs one")
            parameter = by_name[name]
            if part.numel() != parameter.numel():
                raise DilcompileError(
                    f"the state has {part.numel()} numbers for {name!r}, the parameter {parameter.numel()}: it is another model's"
                )
            residuals[parameter] = part.to(parameter.device, _wide(parameter.dtype)).flatten().clone()
        self.steps, self._residuals, self._buckets = int(state["steps"]), residuals, {}


def _hook(state: TopKCompression, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    return state.average(bucket)


# DDP compares types, not their names.
_hook.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}



def _mean_of(messages: Tensor, count: int, like: Tensor) -> Tensor:
    """The mean of what the ranks sent, shape and dtype of ``like``, added in float32 or wider.

    Rank after rank: no index comes twice in an addition, so order is fixed. Divided first, as DDP does.
    """
    total = torch.zeros(like.numel(), dtype=_wide(like.dtype), device=like.device)
    index = _index_dtype(like.numel())
    for message in messages:
        # Copies begin at whole elements.
        indices = message[: index.itemsize * count].clone().view(index)
        values = message[index.itemsize * count :].clone().view(like.dtype)
        total.index_add_(0, indices, values.to(total.dtype).div_(len(messages)))
    return total.to(like.dtype)


def _count_of(numel: int, ratio: float) -> int:
    """How many numbers of a bucket of ``numel`` are sent."""
    return max(1, math.ceil(ratio * numel))


def _used(gradients: Sequence[Tensor]) -> Tensor:
    """Where a bucket's parameters have a gradient in this step, bool [numel of the bucket], without waiting for the device.

    DDP throws away what the hook returns for a parameter that no rank used: what such a parameter has left must not be sent.
    """
    return torch.cat([gradient.ne(0).any().expand(gradient.numel()) for gradient in gradients])


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``. What is finite stays finite: float16 ends at 65504, and what is left over waits."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).where(values.isfinite(), values).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _index_dtype(numel: int) -> torch.dtype:
    """What counts to ``numel``: a parameter larger than a bucket is a bucket of its own, of any size."""
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


def _need_group() -> None:
    if not dist.is_initialized():
        raise DilcompileError(
            "gradients are averaged over a process group, and none is initialised; start with torchrun and call "
            "torch.distributed.init_process_group first"
        )
