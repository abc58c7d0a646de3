"""The kernels compiled ahead of time, without a GPU, and what they take of one: the table ``compiled.txt``.

``python -m dilcompile.lowering.triton.compiled`` prints the table; with ``--write`` it is written beside this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dilcompile.lowering.triton.bound import head_block
from dilcompile.lowering.triton.config import Masks, Pass, Tile, tile_of

TABLE = Path(__file__).with_name("compiled.txt")
ARCHS = ("sm80", "sm90", "sm100", "sm120", "gfx942", "gfx950")
# The tensor core instructions of each architecture, its own first; tiles of fewer than 64 rows get the older ones.
_PRODUCTS = {
    "sm80": ("mma.sync",),
    "sm90": ("wgmma.mma_async", "mma.sync"),
    "sm100": ("tcgen05.mma", "mma.sync"),
    "sm120": ("mma.sync",),
    "gfx942": ("v_mfma",),
    "gfx950": ("v_mfma",),
}
# Shared memory that a program can have, in bytes.
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
TITLES = (
    "kernel",
    "arch",
    "dtype",
    "D",
    "Dv",
    "switches",
    "tile",
    "warps",
    "stages",
    "registers",
    "stack",
    "shared",
    "products",
    "instruction",
    "TMA",
)


@dataclass(frozen=True)
class Case:
    """One kernel as it is compiled for one architecture.

    Args:
        switches: of ``padding``, ``documents``, ``limits`` (by row), ``softcap``, ``dropout``, ``dedupe`` (terms that count only
            what is new), ``heads`` (terms of some query heads), ``grouped`` (4 query heads a key head), ``one_key`` (all of 64
            query heads have one), ``bias`` (one a pair), ``key_bias`` (one a key), ``paged`` (pages of 16 keys), ``part``
            (rows of a longer sequence, results in float32), ``128-blocks`` (lists of blocks of so many queries and keys),
            ``described`` (loads by descriptors), ``rest`` (the forward walks only to find what an LSE lacks); none: causal or
            not.
    """

    step: Pass
    arch: str
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    switches: tuple[str, ...] = ()

    @property
    def masks(self) -> Masks:
        """Which tiles its switches need."""
        if "documents" in self.switches:
            return "counted pairs" if "bias" in self.switches else "counted"
        if "bias" in self.switches:
            return "pairs"
        plain = {"grouped", "one_key", "paged", "heads", "described", "part", "rest", f"{self.block}-blocks"}
        return "some" if set(self.switches) - plain else "none"

    @property
    def tile(self) -> Tile:
        """The tile sizes that a call of this kind gets."""
        rows = max(16, self.group) if self.step == "decode" else 64
        head, block = max(head_block(self.head_dim), head_block(self.v_dim)), self.block
        tile = tile_of(self.step, self.arch, head, self.dtype, self.masks, rows, block > 0, "part" in self.switches)
        if block == 0 or self.step == "decode" or (self.step == "bias" and "bias" in self.switches):
            return tile
        return tile.along(block, block, self.group) if self.step == "keys" else tile.along(block * self.group, block)

    @property
    def block(self) -> int:
        """Positions in a block of a pattern; 0: there are none."""
        return next((int(size) for switch in self.switches for size in re.findall(r"^(\d+)-blocks$", switch)), 0)

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return 4 if "grouped" in self.switches else 64 if "one_key" in self.switches else 1


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Args:
        registers: of a thread. stack: bytes of a thread, in which spilled registers would lie. shared: bytes of a program.
        products: tensor core instructions; instruction: which. described: TMA instructions.
    """

    registers: int
    stack: int
    shared: int
    products: int
    instruction: str
    described: int


def cases() -> Iterator[Case]:
    """The rows of the table."""
    steps: tuple[Pass, ...] = ("forward", "queries", "keys")
    for arch in ARCHS:
        for dim in (64, 128):
            for step in steps:
                yield Case(step, arch, torch.bfloat16, dim, dim)
        yield Case("sums", arch, torch.bfloat16, 128, 128)
    for step in steps:
        for dim in (32, 80, 96, 256):
            yield Case(step, "sm90", torch.bfloat16, dim, dim)
        yield Case(step, "sm90", torch.bfloat16, 192, 128)
        yield Case(step, "sm90", torch.float16, 64, 64)
        yield Case(step, "sm90", torch.float32, 64, 64)
        for dim in (64, 128):
            for switch in ("padding", "documents", "softcap", "dropout", "dedupe", "grouped", "bias", "key_bias"):
                yield Case(step, "sm90", torch.bfloat16, dim, dim, (switch,))
            yield Case(step, "sm90", torch.bfloat16, dim, dim, ("documents", "bias"))
            for arch in ("sm80", "sm100", "sm120", "gfx942"):
                yield Case(step, arch, torch.bfloat16, dim, dim, ("bias",))
    for dim in (64, 128):
        yield Case("forward", "sm90", torch.bfloat16, dim, dim, ("bias", "rest"))
        for arch in ("sm80", "sm90", "sm100", "sm120", "gfx942"):
            for switch in ("bias", "key_bias"):
                yield Case("bias", arch, torch.bfloat16, dim, dim, (switch,))
        yield Case("bias", "sm90", torch.bfloat16, dim, dim, ("documents", "bias"))
    yield Case("bias", "sm90", torch.bfloat16, 256, 256, ("bias",))
    yield Case("bias", "sm90", torch.float32, 64, 64, ("bias",))
    yield from _decode_cases()
    yield from _block_cases()
    for dim in (64, 128):
        yield Case("forward", "sm90", torch.bfloat16, dim, dim, ("described",))
        yield Case("queries", "sm90", torch.bfloat16, dim, dim, ("described",))
        yield Case("forward", "sm100", torch.bfloat16, dim, dim, ("described",))
    yield Case("queries", "sm100", torch.bfloat16, 128, 128, ("described",))
    for arch, dim, step in product(ARCHS, (64, 128), steps):
        yield Case(step, arch, torch.bfloat16, dim, dim, ("part",))
    for switch, dim, step in product(("documents", "dropout"), (64, 128), steps):
        yield Case(step, "sm90", torch.bfloat16, dim, dim, ("part", switch))


def _block_cases() -> Iterator[Case]:
    steps: tuple[Pass, ...] = ("forward", "queries", "keys")
    for arch, dtype, dim, step in product(ARCHS, (torch.bfloat16, torch.float16), (64, 128), steps):
        yield Case(step, arch, dtype, dim, dim, ("128-blocks",))
    for dim, step in product((64, 128), steps):
        for switches in (("16-blocks",), ("40-blocks",), ("128-blocks", "documents"), ("128-blocks", "bias")):
            yield Case(step, "sm90", torch.bfloat16, dim, dim, switches)
    for dim in (64, 128):
        for switch in ("bias", "key_bias"):
            yield Case("bias", "sm90", torch.bfloat16, dim, dim, ("128-blocks", switch))
        yield Case("decode", "sm90", torch.bfloat16, dim, dim, ("128-blocks",))


def _decode_cases() -> Iterator[Case]:
    for arch in ARCHS:
        yield Case("decode", arch, torch.bfloat16, 64, 64)
        yield Case("decode", arch, torch.bfloat16, 128, 128)
        yield Case("decode", arch, torch.bfloat16, 128, 128, ("one_key",))
    yield Case("join", "sm90", torch.bfloat16, 128, 128)
    yield Case("kept", "sm90", torch.bfloat16, 128, 128, ("padding",))
    yield Case("decode", "sm90", torch.bfloat16, 256, 256)
    yield Case("decode", "sm90", torch.bfloat16, 192, 128)
    yield Case("decode", "sm90", torch.float32, 64, 64)
    for switch in ("padding", "documents", "dropout", "grouped", "paged"):
        yield Case("decode", "sm90", torch.bfloat16, 128, 128, (switch,))
    for dim in (64, 128):
        for arch in ("sm80", "sm90", "sm100", "sm120", "gfx942"):
            for switch in ("bias", "key_bias"):
                yield Case("decode", arch, torch.bfloat16, dim, dim, (switch,))
            yield Case("decode", arch, torch.bfloat16, dim, dim, ("one_key", "bias"))
        yield Case("decode", "sm90", torch.bfloat16, dim, dim, ("documents", "bias"))
    yield Case("decode", "sm90", torch.bfloat16, 256, 256, ("bias",))
    yield Case("decode", "sm90", torch.float32, 64, 64, ("bias",))
    yield Case("decode", "sm90", torch.bfloat16, 128, 128, ("paged", "key_bias"))


def compile_case(case: Case, tile: Tile | None = None) -> Resources:
    """Compile for an architecture that need not be there.

    Raises:
        RuntimeError: if Triton's compiler fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dilcompile.lowering.triton.attend import attention
    from dilcompile.lowering.triton.bias_gradient import gradient_of_bias
    from dilcompile.lowering.triton.decode import decode, join, kept_range
    from dilcompile.lowering.triton.key_gradient import gradient_of_keys
    from dilcompile.lowering.triton.query_gradient import gradient_of_queries
    from dilcompile.lowering.triton.softmax import row_sums

    kernels = {
        "forward": attention, "sums": row_sums, "queries": gradient_of_queries, "keys": gradient_of_keys,
        "bias": gradient_of_bias, "decode": decode, "join": join, "kept": kept_range,
    }  # fmt: skip
    kernel, tile = kernels[case.step], tile or case.tile
    fixed = {name: value for name, value in _fixed(case, tile).items() if name in kernel.arg_names}
    signature = {x.name: "constexpr" if x.name in fixed else x.annotation_type or _type(x.name, case) for x in kernel.params}
    # What a launch tells the compiler: where tensors begin, and their rows, whole vectors can be loaded.
    free = [x for x in kernel.params if x.name not in fixed and not x.do_not_specialize]
    aligned = [x for x in free if x.name.isupper() or x.name.endswith(("_batch", "_head", "_row"))]
    attributes = {(x.num,): [["tt.divisibility", 16]] for x in aligned}
    amd = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if amd else GPUTarget("cuda", int(case.arch.removeprefix("sm")), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    made = triton.compile(source, target=target, options=tile.options)
    return _amd(case.arch, made) if amd else _nvidia(case.arch, made)


def _fixed(case: Case, tile: Tile) -> dict[str, object]:
    import triton.language as tl

    own, other = ("BLOCK_N", "BLOCK_M") if case.step in ("keys", "bias") else ("BLOCK_M", "BLOCK_N")
    element = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[case.dtype]
    fixed: dict[str, object] = {
        "GROUP": case.group, "PACK": case.group, "HEAD_DIM": case.head_dim, "V_DIM": case.v_dim,
        "BLOCK_D": head_block(case.head_dim), "BLOCK_DV": head_block(case.v_dim), own: tile.own, other: tile.other,
        "CAPPED": "softcap" in case.switches,
        "COUNTED": "documents" in case.switches and not case.block, "HEADS": "heads" in case.switches,
        "DEDUPE": "dedupe" in case.switches,
        "PRECISION": "ieee", "PRODUCTS": element, "SCORES": tl.float32, "BLOCK_S": case.tile.own, "PAGE_SIZE": 16,
        "FOLD": 1, "DESCRIBED": "described" in case.switches,
    }  # fmt: skip
    by = next((word for switch, word in (("bias", "pairs"), ("key_bias", "keys")) if switch in case.switches), "none")
    fixed |= {"BIAS_BY": by, "ALL_QUERIES": by == "keys", "NATURAL": by != "none"}
    fixed |= {"BIAS": None} if by == "none" else {}
    fixed |= {"REST": None} if by == "none" or (case.step == "forward" and "rest" not in case.switches) else {}
    fixed |= {"Q_BLOCK": case.block, "K_BLOCK": case.block, **({} if case.block else {"LINES": None, "ENTRIES": None})}
    if case.step == "bias":
        # Of blocks, a bias by key walks their lists, one by pair asks their map.
        fixed |= {} if case.block and by == "keys" else {"LINES": None, "ENTRIES": None, "TILES": None}
        fixed |= {} if case.block and by == "pairs" else {"MAP": None}
    if "dropout" not in case.switches:
        fixed["SEED"] = None
    if "limits" not in case.switches:
        fixed["LIMITS"] = None
    if "part" not in case.switches:
        fixed["PART"] = None
    if "padding" not in case.switches:
        fixed |= {"PADDING": None, "KEPT": None}
    if "paged" not in case.switches:
        fixed["PAGES"] = None
    if "documents" not in case.switches:
        fixed |= {"STARTS": None, "ENDS": None}
    return fixed


def _type(name: str, case: Case) -> str:
    if "part" in case.switches and name in ("OUT", "GRAD_Q", "GRAD_K", "GRAD_V"):
        return "*fp32"
    if name in ("LSE", "REST", "DELTA", "GRAD_LSE", "SUMS", "TOPS", "TOTALS"):
        return "*fp32"
    plan = ("TERMS", "RESIDUES", "LINES", "ENTRIES", "TILES", "PATTERNS", "PART")
    if name in (*plan, "STARTS", "ENDS", "LIMITS", "KEPT", "PAGES"):
        return "*i32"
    if name in ("PADDING", "MAP", "SEED"):
        return {"PADDING": "*u8", "MAP": "*u8", "SEED": "*i64"}[name]
    if name.isupper():
        return "*" + {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[case.dtype]
    return "fp32" if name in ("scale", "softcap", "grad_scale", "kept_factor") else "i32"


def _nvidia(arch: str, made: Any) -> Resources:
    from triton.backends.nvidia import compiler

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(compiler.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(_found(rf"{word}:(\d+)", usage)) for word in ("REG", "STACK"))
    return Resources(registers, stack, made.metadata.shared, *_products(made.asm["ptx"], arch), described(made.asm["ptx"]))


def _amd(arch: str, made: Any) -> Resources:
    text = made.asm["amdgcn"]
    registers, stack = (int(_found(rf"\.{word}:\s+(\d+)", text)) for word in ("vgpr_count", "private_segment_fixed_size"))
    return Resources(registers, stack, made.metadata.shared, *_products(text, arch), 0)


def _products(text: str, arch: str) -> tuple[int, str]:
    found = [(text.count(instruction), instruction) for instruction in _PRODUCTS[arch]]
    return next(((count, instruction) for count, instruction in found if count), (0, "-"))


def described(ptx: str) -> int:
    """How many loads and stores of whole tiles go by their descriptors (TMA)."""
    return ptx.count("cp.async.bulk.tensor")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"the compiler's output has no {pattern!r}"
    return match[1]


def row(case: Case, found: Resources) -> str:
    """A case's line of the table."""
    tile = case.tile
    shown = (
        case.step, case.arch, str(case.dtype).removeprefix("torch."), case.head_dim, case.v_dim, ",".join(case.switches) or "-",
        f"{tile.own}x{tile.other}", tile.warps, tile.stages,
        found.registers, found.stack, found.shared, found.products, found.instruction, found.described,
    )  # fmt: skip
    return _line(shown)


def _line(words: tuple[object, ...]) -> str:
    widths = (8, 7, 9, 4, 4, 15, 8, 6, 7, 10, 6, 7, 9, 16, 3)
    return "".join(f"{str(word).ljust(width - 1)} " for word, width in zip(words, widths, strict=True)).rstrip()


def header() -> str:
    """The first lines of the table."""
    import triton

    return f"# Triton {triton.__version__}; python -m dilcompile.lowering.triton.compiled --write\n{_line(TITLES)}\n"


def main(words: list[str]) -> None:
    """Print the table, or write it."""
    text = header()
    for case in cases():
        text += row(case, compile_case(case)) + "\n"
        print(text.splitlines()[-1], flush=True)
    if "--write" in words:
        TABLE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
