"""Views for pieces: the shifted copies of a piece folded into the two batch dims that attention ops have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dilcompile.lowering.view_path.pieces import Axis, Piece

Tail = Literal["row", "key", "one", "dim"]
_COORDINATES = ("batch", "head", "group", "position")


@dataclass(frozen=True)
class Operand:
    """A tensor with its stride for each coordinate of a piece, and what its last dims run over."""

    tensor: Tensor
    batch: int
    head: int
    group: int
    row: int
    key: int
    tail: tuple[Tail, ...]

    @property
    def position(self) -> int:
        """Stride of a shift of rows and keys together."""
        return self.row + self.key

    def stride(self, axis: BatchAxis) -> int:
        """Elements that one step of the axis moves."""
        return axis.batch * self.batch + axis.head * self.head + axis.group * self.group + axis.position * self.position


@dataclass(frozen=True)
class BatchAxis(Axis):
    """An axis of a piece, or the batch."""

    batch: int = 0


def row_operand(x: Tensor, group: int) -> Operand:
    """x: [B, H, Sq, D] or [B, H, Sq]."""
    tail: tuple[Tail, ...] = ("row", "dim") if x.dim() == 4 else ("row",)
    return Operand(x, x.stride(0), x.stride(1) * group, x.stride(1), x.stride(2), 0, tail)


def key_operand(x: Tensor) -> Operand:
    """x: [B, Hkv, Sk, D]."""
    return Operand(x, x.stride(0), x.stride(1), 0, 0, x.stride(2), ("key", "dim"))


def padding_operand(x: Tensor) -> Operand:
    """x: [B, Sk]."""
    return Operand(x, x.stride(0), 0, 0, 0, x.stride(1), ("one", "key"))


def pair_operand(x: Tensor, group: int) -> Operand:
    """x: [B, H, Sq, Sk], broadcast dims with stride 0."""
    return Operand(x, x.stride(0), x.stride(1) * group, x.stride(1), x.stride(2), x.stride(3), ("row", "key"))


@dataclass(frozen=True)
class Block:
    """One attention op: two folded dims (each a list of axes, outermost first) and the shift of the looped ones."""

    piece: Piece
    first: tuple[BatchAxis, ...]
    second: tuple[BatchAxis, ...]
    shift: tuple[int, int, int, int]

    @property
    def sizes(self) -> tuple[int, int]:
        """Sizes of the two folded dims."""
        return _size(self.first), _size(self.second)

    def view(self, operand: Operand) -> Tensor:
        """The operand of all copies: [first, second, *tail]."""
        strides = [operand.stride(dim[-1]) if dim else 0 for dim in (self.first, self.second)]
        return self._strided(operand, list(self.sizes), strides)

    def unfolded(self, operand: Operand) -> Tensor:
        """As ``view`` with every axis a dim of its own."""
        axes = self.first + self.second
        return self._strided(operand, [axis.size for axis in axes], [operand.stride(axis) for axis in axes])

    def single(self, first: int, second: int) -> Block:
        """One copy, by its numbers along the folded dims."""
        shift = list(self.shift)
        for number, axes in ((first, self.first), (second, self.second)):
            for axis in reversed(axes):
                number, at = divmod(number, axis.size)
                for place, name in enumerate(_COORDINATES):
                    shift[place] += at * getattr(axis, name)
        return Block(self.piece, (), (), (shift[0], shift[1], shift[2], shift[3]))

    def _strided(self, operand: Operand, sizes: list[int], strides: list[int]) -> Tensor:
        piece, x = self.piece, operand.tensor
        batch, head, group, position = self.shift
        offset = x.storage_offset() + batch * operand.batch
        offset += (piece.head + head) * operand.head + (piece.group + group) * operand.group
        offset += (piece.row + position) * operand.row + (piece.key + position) * operand.key
        for name in operand.tail:
            size, stride = {
                "row": (piece.rows, piece.step * operand.row),
                "key": (piece.keys, piece.step * operand.key),
                "one": (1, 0),
                "dim": (x.shape[-1], x.stride(-1)),
            }[name]
            sizes.append(size)
            strides.append(stride)
        return x.as_strided(sizes, strides, offset)

    def coordinates(self, name: Literal["batch", "head", "group", "position"], device: torch.device) -> Tensor:
        """Where each copy lies: int64 [first, second, 1, 1], size 1 along a dim that doesn't change it."""
        start = self.shift[_COORDINATES.index(name)]
        parts = []
        for axes in (self.first, self.second):
            if all(getattr(axis, name) == 0 for axis in axes):
                parts.append(torch.zeros(1, dtype=torch.int64, device=device))
                continue
            steps = [range(0, axis.size * getattr(axis, name), getattr(axis, name) or 1) for axis in axes]
            whole = [span if getattr(axis, name) else (0,) * axis.size for span, axis in zip(steps, axes, strict=True)]
            parts.append(torch.tensor([sum(at) for at in itertools.product(*whole)], device=device))
        return (start + parts[0][:, None] + parts[1])[:, :, None, None]


def blocks(piece: Piece, batch: int, operands: Sequence[Operand], apart: bool) -> Iterator[Block]:
    """The op calls that make up a piece.

    Axes are folded while the strides of every operand allow; the two largest results become the op's batch dims, the
    others are looped over.

    Args:
        apart: keep axes that move in the sequence or over key heads out of the second dim, so that a mask computed from
            coordinates has size 1 there.
    """
    axes = [BatchAxis(a.size, a.head, a.group, a.position, a.phases) for a in piece.axes]
    if batch > 1:
        axes.append(BatchAxis(batch, batch=1))
    if apart:
        moving = _folded([axis for axis in axes if axis.head or axis.position], operands)
        still = _folded([axis for axis in axes if not axis.head and not axis.position], operands)
        first, second, looped = moving[:1], still[:1], moving[1:] + still[1:]
    else:
        dims = _folded(axes, operands)
        first, second, looped = dims[:1], dims[1:2], dims[2:]
    loops = [axis for dim in looped for axis in dim]
    for numbers in itertools.product(*(range(axis.size) for axis in loops)):
        shift = [0, 0, 0, 0]
        for number, axis in zip(numbers, loops, strict=True):
            for place, name in enumerate(_COORDINATES):
                shift[place] += number * getattr(axis, name)
        yield Block(
            piece,
            tuple(first[0]) if first else (),
            tuple(second[0]) if second else (),
            (shift[0], shift[1], shift[2], shift[3]),
        )


def _folded(axes: list[BatchAxis], operands: Sequence[Operand]) -> list[list[BatchAxis]]:
    """Axes merged where all strides allow, largest first."""
    dims = [[axis] for axis in axes]
    pair = _foldable(dims, operands)
    while pair is not None:
        outer, inner = pair
        dims = [dim for dim in dims if dim is not outer and dim is not inner] + [outer + inner]
        pair = _foldable(dims, operands)
    return sorted(dims, key=_size, reverse=True)


def _foldable(dims: list[list[BatchAxis]], operands: Sequence[Operand]) -> tuple[list[BatchAxis], list[BatchAxis]] | None:
    for outer, inner in itertools.permutations(dims, 2):
        size = _size(inner)
        if all(operand.stride(outer[-1]) == size * operand.stride(inner[-1]) for operand in operands):
            return outer, inner
    return None


def _size(dim: Sequence[BatchAxis]) -> int:
    total = 1
    for axis in dim:
        total *= axis.size
    return total


def add_into(operand: Operand, block: Block, grad: Tensor, cut: Cut) -> None:
    """Add the gradient of a cut of a block, [first, second, *tail], into an operand whose copies may share elements.

    Axes that the operand doesn't move along are summed; overlapping window tiles are added in turns.
    """
    first, second = cut[:2]
    if grad.shape[:2] == block.sizes:
        _add_whole(operand, block, grad, cut)
        return
    for a, b in itertools.product(range(first.start, first.stop), range(second.start, second.stop)):
        one = grad[a - first.start, b - second.start]
        _add_whole(operand, block.single(a, b), one[None, None], cut)


def _add_whole(operand: Operand, block: Block, grad: Tensor, cut: Cut) -> None:
    axes = block.first + block.second
    tail = tuple({"row": cut[2], "key": cut[3]}.get(name, slice(None)) for name in operand.tail)
    target = block.unfolded(operand)[(slice(None),) * len(axes) + tail]
    grad = grad.reshape(*(axis.size for axis in axes), *grad.shape[2:])
    for dim in range(grad.dim()):
        if target.stride(dim) == 0 and grad.shape[dim] > 1:
            grad = grad.sum(dim, keepdim=True)
            target = target.narrow(dim, 0, 1)
    turns = [(dim, axis.phases) for dim, axis in enumerate(axes) if axis.phases > 1 and target.shape[dim] > 1]
    _add_in_turns(target, grad, turns)


def _add_in_turns(target: Tensor, grad: Tensor, turns: list[tuple[int, int]]) -> None:
    if not turns:
        target.add_(grad)
        return
    (dim, phases), rest = turns[0], turns[1:]
    for phase in range(min(phases, target.shape[dim])):
        chosen = (slice(None),) * dim + (slice(phase, None, phases),)
        _add_in_turns(target[chosen], grad[chosen], rest)


Cut = tuple[slice, slice, slice, slice]


def cuts(block: Block, limit: int, keys_of: Callable[[int, int], tuple[int, int]], whole_second: bool = False) -> Iterator[Cut]:
    """Slices (first, second, rows, keys) whose pairs number at most ``limit``, where a single row does not exceed it.

    Args:
        keys_of: first and last key that the rows ``a`` up to ``b`` see.
        whole_second: the second dim does not count, and is not cut.
    """
    (first, second), rows, keys = block.sizes, block.piece.rows, block.piece.keys
    counted = 1 if whole_second else second
    row_step = max(1, min(rows, limit // max(1, keys)))
    second_step = max(1, min(counted, limit // (row_step * keys))) if row_step == rows else 1
    first_step = max(1, limit // (row_step * keys * counted)) if second_step == counted else 1
    second_step = second if whole_second else second_step
    for row in range(0, rows, row_step):
        stop = min(rows, row + row_step)
        key, key_stop = keys_of(row, stop)
        for a in range(0, first, first_step):
            for b in range(0, second, second_step):
                yield (
                    slice(a, min(first, a + first_step)),
                    slice(b, min(second, b + second_step)),
                    slice(row, stop),
                    slice(key, key_stop),
                )
