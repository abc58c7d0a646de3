"""CPU attention: dilated against dense SDPA, in one process, taken in turns, with a correctness verdict beside each number.

    OMP_NUM_THREADS=2 python benchmarks/attention.py --lengths 4096 16384 --dtypes float32 bfloat16 --backward

``ideal`` is the time that the relation's FLOPs take at the rate of dense SDPA measured in the same turns. Dense attention
over more than ``DENSE_WHOLE`` keys is measured on two heads and scaled to all. ``gather`` is the way of the LongNet authors'
torchscale: each branch's rows gathered, one dense attention, its output scattered back, a softmax over the branches' LSE.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilcompile.forms import Dilated
from dilcompile.lowering import ops
from dilcompile.relation import Problem, Relation

FIRST_SEGMENT = 2048
DENSE_WHOLE = 16384
CHECKED_ROWS = 8


def run(
    lengths: Sequence[int] = (4096, 16384),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    heads: int = 8,
    head_dim: int = 64,
    backward: bool = True,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """One row per length, dtype and mask: seconds, ratios to the ideal and to dense, extra memory, errors, verdicts.

    Args:
        lengths: sequence lengths, one batch row.
        dtypes: dtypes of q, k and v.
        repeats: turns; medians are reported.
    """
    return [
        _case(length, dtype, causal, heads, head_dim, backward, repeats)
        for length in lengths
        for dtype in dtypes
        for causal in (False, True)
    ]


def geometric(length: int) -> Dilated:
    """Segments 2048, 4096, ... up to ``length`` with rates 1, 2, ..."""
    segments = [FIRST_SEGMENT]
    while segments[-1] < length:
        segments.append(segments[-1] * 2)
    return Dilated(tuple(segments), tuple(segment // FIRST_SEGMENT for segment in segments))


def _case(
    length: int, dtype: torch.dtype, causal: bool, heads: int, head_dim: int, backward: bool, repeats: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    form = geometric(length)
    relation = form.relation(Problem(1, heads, heads, length, length, head_dim, head_dim, 0, causal))
    q, k, v = (torch.randn(1, length, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    options = (
        None, None, None, None, str(form), causal, None, None, 0, head_dim**-0.5, None, 0.0, None,
    )  # fmt: skip
    dense_heads = heads if length <= DENSE_WHOLE else min(2, heads)
    few = tuple(x[:, :dense_heads] for x in (q, k, v))
    dense_pairs = length * (length + 1) // 2 if causal else length * length

    def dense_forward() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*few, 0.0, causal)
        return found

    def forward() -> tuple[Tensor, Tensor]:
        # Inference: nobody reads the LSE.
        made: tuple[Tensor, Tensor] = ops.attention(q, k, v, *options, exact_lse=False)
        return made

    def gather_forward() -> Tensor:
        return _by_gathering(q, k, v, form, causal)

    (out, _), (dense_out, dense_lse) = forward(), dense_forward()
    divides = all(length % segment == 0 for segment, _ in form.branches(length))
    gathering: list[Callable[[], object]] = [gather_forward] if divides else []
    seconds, dense_seconds, *gather_seconds = _in_turns([forward, dense_forward, *gathering], repeats)
    ideal = dense_seconds * relation.pairs() / (dense_heads * dense_pairs)
    row: dict[str, Any] = {
        "length": length, "dtype": str(dtype).removeprefix("torch."), "causal": causal, "heads": heads,
        "head_dim": head_dim, "density": relation.density(), "forward_s": seconds,
        "dense_forward_s": dense_seconds * heads / dense_heads, "dense_heads_measured": dense_heads,
        "forward_over_ideal": seconds / ideal, "dense_over_forward": dense_seconds * heads / dense_heads / seconds,
    }  # fmt: skip
    if gather_seconds:
        row |= {"gather_over_forward": gather_seconds[0] / seconds, "gather_over_ideal": gather_seconds[0] / ideal}
    row |= accuracy(relation, q, k, v, out, dense_out, causal)
    row |= extra_memory(forward)
    if backward:
        row |= _backward(relation, (q, k, v), few, options, (dense_out, dense_lse), dense_pairs, repeats)
        row["both_over_ideal"] = (row["training_forward_s"] + row["backward_s"]) / (ideal + row["backward_ideal_s"])
    return row


def _backward(
    relation: Relation,
    operands: tuple[Tensor, ...],
    few: tuple[Tensor, ...],
    options: tuple[Any, ...],
    dense: tuple[Tensor, Tensor],
    dense_pairs: int,
    repeats: int,
) -> dict[str, Any]:
    found = ops.attention(*operands, *options)
    grad = torch.randn_like(found[0])
    dense_grad = grad[:, : few[0].shape[1]]
    causal = relation.problem.is_causal

    def forward() -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = ops.attention(*operands, *options)
        return made

    def backward() -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = ops.attention_backward(grad, None, *found, *operands, *options)
        return grads

    def dense_backward() -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dense_grad, *few, *dense, 0.0, causal
        )
        return grads

    backward(), dense_backward()
    forward_seconds, seconds, dense_seconds = _in_turns((forward, backward, dense_backward), max(3, repeats // 2))
    ideal = dense_seconds * relation.pairs() / (few[0].shape[1] * dense_pairs)
    return {
        "training_forward_s": forward_seconds,
        "backward_s": seconds,
        "backward_ideal_s": ideal,
        "backward_over_ideal": seconds / ideal,
    }


def _by_gathering(q: Tensor, k: Tensor, v: Tensor, form: Dilated, causal: bool) -> Tensor:
    """Dilated attention as torchscale computes it, for lengths that every segment divides; offsets by head."""
    batch, heads, length, dim = q.shape
    outs, lses = [], []
    for segment, rate in form.branches(length):
        rows = torch.arange(0, segment, rate)
        offsets = (torch.arange(heads) % rate)[:, None, None]
        places = torch.arange(0, length, segment)[:, None] + rows + offsets
        index = places.flatten(1)[None, :, :, None].expand(batch, heads, -1, dim)
        picked = (x.gather(2, index).view(batch, heads * (length // segment), len(rows), dim) for x in (q, k, v))
        found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*picked, 0.0, causal)
        outs.append(torch.zeros_like(q).scatter_(2, index, found.reshape(batch, heads, -1, dim)))
        full = q.new_full((batch, heads, length), -torch.inf, dtype=lse.dtype)
        lses.append(full.scatter_(2, index[..., 0], lse.reshape(batch, heads, -1)))
    weights = torch.stack(lses).softmax(0)[..., None].to(q.dtype)
    return (torch.stack(outs) * weights).sum(0)


def _in_turns(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, measured in turns so that a disturbance meets all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def accuracy(relation: Relation, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dense_out: Tensor, causal: bool) -> dict[str, Any]:
    """Largest error of some rows against float64, dilated and dense; correct: at most twice dense's.

    Fewer keys average less away, so each row's error is taken relative to the largest number of its own exact output.
    """
    length, scale = q.shape[2], q.shape[3] ** -0.5
    rows = torch.linspace(0, length - 1, CHECKED_ROWS).long()
    keys = torch.arange(length)
    errors = {"dilated": 0.0, "dense": 0.0}
    for head in range(q.shape[1]):
        scores = q[0, head, rows].double() @ k[0, head].double().mT * scale
        dense = torch.ones_like(scores) if not causal else (keys <= rows[:, None]).double()
        several = relation.multiplicity(torch.tensor(head), rows[:, None], keys).double()
        for name, count, found in (("dilated", several, out), ("dense", dense, dense_out)):
            if head < found.shape[1]:
                exact = (scores + count.log()).softmax(-1) @ v[0, head].double()
                off = (found[0, head, rows] - exact).abs().amax(-1) / exact.abs().amax(-1)
                errors[name] = max(errors[name], float(off.max()))
    return {"error": errors["dilated"], "dense_error": errors["dense"], "correct": errors["dilated"] <= 2 * errors["dense"]}


def extra_memory(forward: Callable[[], Sequence[Tensor]]) -> dict[str, Any]:
    """Peak resident bytes of the process during the forward, beyond those before it and the outputs; Linux only."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return {}
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    reset.write_text("5")
    kept = forward()
    extra = _resident("VmHWM") - before - sum(x.nbytes for x in kept)
    return {"extra_peak_bytes": extra, "extra_over_one_tensor": extra / kept[0].nbytes}


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line per case; with ``--save`` also write all of them with the machine and the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args(arguments)
    command = f"python benchmarks/attention.py --lengths {' '.join(map(str, asked.lengths))}"
    command += f" --dtypes {' '.join(asked.dtypes)} --heads {asked.heads} --head-dim {asked.head_dim}"
    command += f" --repeats {asked.repeats}" + (" --backward" if asked.backward else "")
    rows = []
    for length in asked.lengths:
        for name in asked.dtypes:
            found = run([length], [getattr(torch, name)], asked.heads, asked.head_dim, asked.backward, asked.repeats)
            rows += found
            for row in found:
                print(json.dumps(row), flush=True)
            if asked.save is not None:
                save(asked.save, rows, command)


def save(path: Path, rows: list[dict[str, Any]], command: str) -> None:
    """Write the rows as JSON, with the command that gave them and the machine."""
    path.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
