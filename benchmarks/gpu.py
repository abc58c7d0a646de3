"""Attention on a CUDA device: the union kernel against the best dense flash and compiled FlexAttention, blocks, a million keys,
decoding.

    PYTHONPATH=. python benchmarks/gpu.py

In one process and in turns; medians of times between device events. Then windows, documents and branches by every kernel that
takes them, and by the one that the clock chose. TFLOP/s count 4 D a pair and head forward, 10 D backward,
of the pairs that the relation holds. A decode step counts tokens a second, and the bytes of the keys and values that it reads
against the rate at which the device copies. Writes benchmarks/results/<device>-<date>.json and prints the table. ``make gpu``
runs it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from dilcompile.bench import accuracy, geometric
from dilcompile.errors import KernelError
from dilcompile.forms import BlockSparse, Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering.triton.lists import blocks_of
from dilcompile.relation import Problem, Relation, grid_of

HEADS = 8
# Kernels that are timed on windows, documents and branches, beside each other.
ROUTES = ("flash_band", "triton", "flash_attn", "cudnn", "efficient", "flex", "flash")
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
# FlexAttention's block mask is made from all pairs.
FLEX_UP_TO = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--longest", type=int, default=1 << 20, help="keys of the one long run; 0: none")
    parser.add_argument("--caches", type=int, nargs="*", default=[32768, 131072], help="keys that a decode step has")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="of a decode step")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    rows: list[dict[str, Any]] = []
    path = asked.results / _file_name()
    for length in asked.lengths:
        for head_dim in asked.head_dims:
            for causal in (False, True):
                rows.append(_case(length, head_dim, causal, asked.repeats))
                _save(path, rows, [], {}, [])
                print(_line(rows[-1]), flush=True)
    blocks = []
    for length, head_dim, causal in itertools.product(asked.lengths, asked.head_dims, (False, True)):
        blocks.append(_blocks(length, head_dim, causal, asked.repeats))
        print(_block_line(blocks[-1]), flush=True)
    long = _longest(asked.longest) if asked.longest else {}
    print(json.dumps(long))
    routes = []
    for length, head_dim in itertools.product(asked.lengths, asked.head_dims):
        for name in ("dense", "window", "documents", "dilated"):
            routes.append(_routes(name, length, head_dim, asked.repeats))
            print(_route_line(routes[-1]), flush=True)
            _save(path, rows, blocks, long, [], routes)
    steps = []
    for length, batch in itertools.product(asked.caches, asked.batches):
        steps.append(_decode(length, batch, asked.repeats))
        print(_step_line(steps[-1]), flush=True)
    _save(path, rows, blocks, long, steps, routes)
    print(path)


def _case(length: int, head_dim: int, causal: bool, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    form = geometric(length)
    problem = Problem(1, HEADS, HEADS, length, length, head_dim, head_dim, 0, causal)
    relation = form.relation(problem)
    shape = (1, length, HEADS, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)
    calls: dict[str, Callable[[], Tensor]] = {"union": lambda: attention(q, k, v, form, is_causal=causal, kernel="triton")}
    for name, backend in DENSE.items():
        if _dense_runs(backend, q, k, v, causal):
            calls[name] = _dense(backend, q, k, v, causal)
    if length <= FLEX_UP_TO:
        as_set = replace(form, union="set")
        calls["set"] = lambda: attention(q, k, v, as_set, is_causal=causal, kernel="triton")
        calls["flex"] = _flex(as_set, q, k, v, causal)
    forward = _in_turns(calls, repeats)
    outs = {name: call() for name, call in calls.items()}
    backward = _in_turns(
        {name: lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True) for name, out in outs.items()},
        repeats,
    )
    dense_pairs = HEADS * (length * (length + 1) // 2 if causal else length * length)
    pairs = dict.fromkeys(calls, dense_pairs) | {"union": relation.pairs()}
    if "set" in calls:
        pairs["set"] = pairs["flex"] = replace(form, union="set").relation(problem).pairs()
    rates = {
        name: {
            "forward_ms": forward[name] * 1e3,
            "backward_ms": backward[name] * 1e3,
            "forward_tflops": 4 * head_dim * pairs[name] / forward[name] / 1e12,
            "backward_tflops": 10 * head_dim * pairs[name] / backward[name] / 1e12,
        }
        for name in calls
    }
    best = {way: max(rates[name][f"{way}_tflops"] for name in DENSE if name in rates) for way in ("forward", "backward")}
    row: dict[str, Any] = {
        "length": length, "head_dim": head_dim, "causal": causal, "heads": HEADS, "dtype": "bfloat16",
        "density": relation.density(), "rates": rates,
        "forward_over_best_dense": rates["union"]["forward_tflops"] / best["forward"],
        "backward_over_best_dense": rates["union"]["backward_tflops"] / best["backward"],
    }  # fmt: skip
    if "flex" in rates:
        row |= {f"{way}_flex_over_set": rates["flex"][f"{way}_ms"] / rates["set"][f"{way}_ms"] for way in ("forward", "backward")}
    on_cpu = (x.detach().cpu() for x in (q, k, v, outs["union"], outs[next(name for name in DENSE if name in outs)]))
    return row | _memory(calls["union"]) | accuracy(relation, *on_cpu, causal)


def _routes(name: str, length: int, head_dim: int, repeats: int, kv_heads: int = 2) -> dict[str, Any]:
    """Every kernel that takes the relation, causal, 4 query heads a key head; and which one the clock chose by itself."""
    torch.manual_seed(0)
    forms: dict[str, Form] = {"window": SlidingWindow(1024), "dilated": geometric(length)}
    form = forms.get(name, Dense())
    q, k, v = (
        torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    )
    # About 16 documents of different lengths.
    begins = torch.rand(length - 1, generator=torch.Generator().manual_seed(0)).lt(16 / length).nonzero().flatten() + 1
    cu_seqlens = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), length)]).int().to(q.device)
    more = {"cu_seqlens": cu_seqlens} if name == "documents" else {}
    calls: dict[str, Callable[[], Tensor]] = {}
    refused = {}
    for kernel in (*ROUTES, None):
        call = lambda kernel=kernel: attention(q, k, v, form, is_causal=True, kernel=kernel, **more)  # noqa: E731
        try:
            call()
        except KernelError as error:
            refused[str(kernel)] = str(error)
            continue
        calls["chosen" if kernel is None else kernel] = call
    forward = _in_turns(calls, repeats)
    grad, outs = torch.randn_like(q), {kernel: call() for kernel, call in calls.items()}
    backward: dict[str, float] = {}
    for kernel, out in outs.items():
        try:
            backward |= _in_turns({kernel: lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)}, repeats)
        except KernelError as error:
            refused[f"{kernel}, backward"] = str(error)
    first = next(iter(outs.values())).detach().float()
    return {
        "relation": name, "length": length, "head_dim": head_dim, "heads": HEADS, "kv_heads": kv_heads, "dtype": "bfloat16",
        "forward_ms": {kernel: seconds * 1e3 for kernel, seconds in forward.items()},
        "backward_ms": {kernel: seconds * 1e3 for kernel, seconds in backward.items()},
        "largest_difference": max((out.detach().float() - first).abs().max().item() for out in outs.values()),
        "refused": refused,
    }  # fmt: skip


def _route_line(row: dict[str, Any]) -> str:
    taken = "  ".join(
        f"{kernel} {ms:.3g}/{row['backward_ms'].get(kernel, float('nan')):.3g}" for kernel, ms in row["forward_ms"].items()
    )
    return f"{row['relation']}, S {row['length']} D {row['head_dim']}: ms forward/backward {taken}"


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def _dense_runs(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    some = (x[:, :, :256] for x in (q, k, v))
    try:
        _dense(backend, *some, causal)()
    except RuntimeError:
        return False
    return True


def _flex(form: Dilated, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """The same pairs for compiled FlexAttention; its block mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]
    branches = form.branches(length)

    def held(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = torch.zeros_like(row + key, dtype=torch.bool)
        for segment, rate in branches:
            seen = seen | ((row // segment == key // segment) & (row % rate == h % rate) & (key % rate == h % rate))
        return seen & (key <= row) if causal else seen

    mask = create_block_mask(held, None, HEADS, length, length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def _blocks(length: int, head_dim: int, causal: bool, repeats: int, block: int = 128) -> dict[str, Any]:
    """The blocks of BigBird: the union kernel and compiled FlexAttention along the same lists."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    form = BlockSparse(block, {"bigbird": {}})
    relation = form.relation(Problem(1, HEADS, HEADS, length, length, head_dim, head_dim, 0, causal))
    shape = (1, length, HEADS, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    grad, mask = torch.randn_like(q), block_mask(relation, torch.device("cuda"))
    compiled = torch.compile(flex_attention, dynamic=False)
    calls: dict[str, Callable[[], Tensor]] = {
        "blocks": lambda: attention(q, k, v, form, is_causal=causal, kernel="triton"),
        "flex": lambda: compiled(q, k, v, block_mask=mask),
        "flash": _dense(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
    }
    forward, outs = _in_turns(calls, repeats), {name: call() for name, call in calls.items()}
    backward = _in_turns(
        {name: lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True) for name, out in outs.items()},
        repeats,
    )
    on_cpu = (x.detach().cpu() for x in (q, k, v, outs["blocks"], outs["flash"]))
    row: dict[str, Any] = {
        "length": length, "head_dim": head_dim, "causal": causal, "heads": HEADS, "dtype": "bfloat16", "block": block,
        "density": relation.density(), "forward_ms": {name: taken * 1e3 for name, taken in forward.items()},
        "backward_ms": {name: taken * 1e3 for name, taken in backward.items()},
        "forward_tflops": 4 * head_dim * relation.pairs() / forward["blocks"] / 1e12,
        "backward_tflops": 10 * head_dim * relation.pairs() / backward["blocks"] / 1e12,
        "less_flex": (outs["blocks"].float() - outs["flex"].float()).abs().max().item(),
    }  # fmt: skip
    return row | accuracy(relation, *on_cpu, causal)


def block_mask(relation: Relation, device: torch.device) -> BlockMask:
    """The blocks that a relation is made of, shared by all heads, as FlexAttention takes them."""
    held = blocks_of(relation)
    assert held is not None, "made of something else"
    assert not held.pattern.by_head, "heads differ"
    size = relation.problem
    grid = grid_of(size, held.grid.q_block, held.grid.k_block)
    lists = held.lists(0, grid)
    whole = lists.full & ((lists.blocks + 1) * grid.k_block <= size.k_len)
    tables = []
    for some in (~whole, whole):
        there = torch.zeros(len(grid.rows), grid.columns, dtype=torch.bool)
        there[lists.owners()[some], lists.blocks[some]] = True
        # Columns that are there come first, in ascending order.
        order = there.int().argsort(dim=1, descending=True, stable=True)
        tables += [there.sum(1).int()[None, None].to(device), order.int()[None, None].to(device)]

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key <= row if size.is_causal else key < size.k_len

    sizes = (grid.q_block, grid.k_block)
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=sizes, mask_mod=seen, seq_lengths=(size.q_len, size.k_len))


def _block_line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {row['forward_ms'][name]:.2f}/{row['backward_ms'][name]:.2f}" for name in row["forward_ms"])
    where = f"blocks of {row['block']}, S {row['length']} D {row['head_dim']} causal {row['causal']!s:5}"
    return f"{where}: density {row['density']:.3f}; correct {row['correct']}; ms forward/backward {times}"


def _in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, between device events, after two calls to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                taken[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def _memory(forward: Callable[[], Tensor]) -> dict[str, Any]:
    """Peak device bytes of a forward beyond what was there and the output and its LSE."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    torch.cuda.synchronize()
    lse_bytes = 4 * out[..., 0].numel()
    return {"extra_peak_bytes": torch.cuda.max_memory_allocated() - before - out.nbytes - lse_bytes, "output_bytes": out.nbytes}


def _longest(length: int, heads: int = 32, head_dim: int = 128) -> dict[str, Any]:
    """Forward and backward over a million keys, 32 heads of 128, on one card."""
    form = geometric(length)
    relation: Relation = form.relation(Problem(1, heads, heads, length, length, head_dim, head_dim, 0, True))
    shape = (1, length, heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    seconds = []
    out = None
    for _ in range(2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        del out
        marks[0].record()
        out = attention(q, k, v, form, is_causal=True, kernel="triton")
        marks[1].record()
        grads = torch.autograd.grad(out, (q, k, v), out.detach())
        marks[2].record()
        torch.cuda.synchronize()
        del grads
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    flops = 4 * head_dim * relation.pairs()
    return {
        "length": length, "heads": heads, "head_dim": head_dim, "causal": True, "density": relation.density(),
        "forward_s": seconds[0], "backward_s": seconds[1], "forward_tflops": flops / seconds[0] / 1e12,
        "backward_tflops": 2.5 * flops / seconds[1] / 1e12, "peak_bytes": torch.cuda.max_memory_allocated(),
        "operand_bytes": q.nbytes,
    }  # fmt: skip


def _decode(length: int, batch: int, repeats: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> dict[str, Any]:
    """One query row a batch row over a full cache, 4 query heads a key head."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    forms: dict[str, Form] = {"dense": Dense(), "dilated": geometric(length), "window": SlidingWindow(4096, sinks=4)}
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda form=form: attention(q, k, v, form, is_causal=True, kernel="triton") for name, form in forms.items()
    }
    calls["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    flex = _flex_decode(q, k, v)
    if flex is not None:
        calls["flex"] = flex
    seconds, copied = _in_turns(calls, repeats), _copy_bytes_per_second()
    size = Problem(batch, heads, kv_heads, 1, length, head_dim, head_dim, length - 1, True)
    rates = {}
    for name, taken in seconds.items():
        keys = forms.get(name, Dense()).relation(size).pairs() // heads
        read = 2 * batch * kv_heads * keys * head_dim * k.element_size()
        rates[name] = {
            "ms": taken * 1e3, "tokens_per_s": batch / taken, "read_bytes": read, "of_copy_bandwidth": read / taken / copied,
        }  # fmt: skip
    difference = (calls["dense"]().float() - calls["sdpa"]().float()).abs().max().item()
    return {
        "length": length, "batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": "bfloat16",
        "copy_bytes_per_s": copied, "rates": rates, "dense_less_sdpa": difference,
    }  # fmt: skip


def _flex_decode(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """Compiled FlexAttention, which has a kernel of its own for one query row; None where it does not run."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        return compiled(q, k, v, enable_gqa=True)

    try:
        call()
    except Exception as error:
        warnings.warn(f"FlexAttention does not decode here: {error}", stacklevel=2)
        return None
    return call


def _copy_bytes_per_second(size: int = 1 << 30) -> float:
    """Bytes moved a second by a copy on the device, each read once and written once."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / _in_turns({"copy": lambda: target.copy_(source)}, 10)["copy"]


def _step_line(step: dict[str, Any]) -> str:
    rates = "  ".join(
        f"{name} {held['tokens_per_s']:.0f} ({held['of_copy_bandwidth']:.2f})" for name, held in step["rates"].items()
    )
    return f"decode, {step['length']} keys, batch {step['batch']}: tokens/s (share of the copy bandwidth) {rates}"


def _line(row: dict[str, Any]) -> str:
    rates = "  ".join(f"{name} {held['forward_tflops']:.0f}/{held['backward_tflops']:.0f}" for name, held in row["rates"].items())
    where = f"S {row['length']} D {row['head_dim']} causal {row['causal']!s:5}"
    share = f"{row['forward_over_best_dense']:.2f} forward, {row['backward_over_best_dense']:.2f} backward of the best dense"
    return f"{where}: {share}; correct {row['correct']}; TFLOP/s {rates}"


def _file_name() -> str:
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{device}-{datetime.date.today().isoformat()}.json"


def _save(
    path: Path,
    rows: Sequence[dict[str, Any]],
    blocks: Sequence[dict[str, Any]],
    longest: dict[str, Any],
    decode: Sequence[dict[str, Any]],
    routes: Sequence[dict[str, Any]] = (),
) -> None:
    import triton

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    held = {
        "command": "python benchmarks/gpu.py",
        "machine": machine,
        "rows": list(rows),
        "blocks": list(blocks),
        "longest": longest,
        "decode": list(decode),
        "routes": list(routes),
    }
    path.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
