"""The C++ library: compiled when first used, through torch's own code cache, and called by address."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import re
from collections.abc import Callable
from ctypes import Structure, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from dilcompile.lowering import digest

log = logging.getLogger(__name__)

ELEMENTS = {
    torch.float32: "float",
    torch.bfloat16: "dil::BFloat16",
    torch.float16: "dil::Half",
    torch.float64: "double",
}
# ``Dtype`` of call.h.
BIAS_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NO_LIMIT = -(2**63)
_HERE = Path(__file__).parent


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class OperandStruct(Structure):
    """``Operand`` of call.h."""

    _fields_ = [("data", c_void_p), *_fields(c_int64, "batch head row")]


class SquareStruct(Structure):
    """``Square`` of call.h."""

    _fields_ = [("data", c_void_p), *_fields(c_int64, "batch head row key")]


class TermStruct(Structure):
    """``Term`` of call.h."""

    _fields_ = [
        *_fields(c_int64, "kind dedupe length rate head_start head_stop"),
        ("residues", c_void_p),
        *_fields(c_int64, "left right step count q_block k_block first_line lines lists batch_lists"),
        *_fields(c_void_p, "starts columns"),
    ]


class CallStruct(Structure):
    """``Call`` of call.h."""

    _fields_ = [
        *_fields(c_int64, "batch heads kv_heads q_len k_len head_dim v_dim"),
        *_fields(c_int64, "q_offset q_step k_start k_stop k_step k_rows left right num_terms"),
        ("terms", c_void_p),
        *_fields(OperandStruct, "q k v out lse"),
        ("key_padding", c_void_p),
        *_fields(c_int64, "padding_batch padding_key"),
        ("documents", c_void_p),
        ("document_rows", c_int64),
        ("row_limits", c_void_p),
        ("limit_rows", c_int64),
        *_fields(c_double, "scale softcap"),
        ("bias", SquareStruct),
        *_fields(c_int64, "bias_dtype dropout_seed dropout_least"),
        ("dropout_factor", c_double),
        *_fields(c_int64, "dropout_head threads exact_lse wide"),
        *_fields(OperandStruct, "grad_out grad_lse grad_q grad_k grad_v"),
        ("grad_bias", SquareStruct),
        ("workspace", c_void_p),
        ("workspace_size", c_int64),
    ]


class Library:
    """The compiled entry points for one dtype."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._forward, self._backward = loaded.dilcompile_forward, loaded.dilcompile_backward
        self._workspace = loaded.dilcompile_workspace
        self._workspace.restype = c_int64

    def forward(self, call: CallStruct) -> None:
        """Fill ``out`` and ``lse``."""
        _checked(self._forward, call)

    def backward(self, call: CallStruct) -> None:
        """Fill ``grad_q``, ``grad_k`` and ``grad_v``; add to ``grad_bias``."""
        _checked(self._backward, call)

    def workspace(self, call: CallStruct, backward: bool, share: float) -> int:
        """Bytes of a workspace in which a call finds all its memory; its operands are not read, only which there are.

        Args:
            share: of what the fastest arrangement takes, from 1 to 0. With less of it less is done at once, with the same result.
        """
        return int(self._workspace(ctypes.byref(call), int(backward), c_double(share)))


def _checked(entry: Callable[[object], int], call: CallStruct) -> None:
    if entry(ctypes.byref(call)) != 0:
        raise MemoryError(
            f"the native CPU kernel found no memory for the workspaces of {call.threads} threads ({call.k_rows} keys, head sizes "
            f"{call.head_dim} and {call.v_dim}); use fewer threads (torch.set_num_threads) or shorter sequences"
        )


@lru_cache(maxsize=len(ELEMENTS))
def library(dtype: torch.dtype) -> Library | str:
    """The library for operands of this dtype, or why there is none (said once, as a warning of this module's logger)."""
    try:
        from torch._inductor.codecache import CppCodeCache

        return Library(CppCodeCache.load(source(dtype)))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("the native CPU kernel could not be built, the view path computes instead: %s", first)
        return f"it could not be built ({first}); it needs a C++ compiler such as g++"


def source(dtype: torch.dtype) -> str:
    """The whole program for a dtype in one text: what the code cache compiles and takes as its key."""
    head = f"// torch {torch.__version__}, {_machine()}\n#define DILCOMPILE_ELEMENT {ELEMENTS[dtype]}\n"
    return head + _included("native.cpp", set())


@lru_cache(maxsize=len(ELEMENTS))
def made_from(dtype: torch.dtype) -> str:
    """The program, and the compiler that builds it."""
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

    return f"source {digest.of_text(source(dtype))}, {get_compiler_version_info(get_cpp_compiler())}"


def _included(name: str, done: set[str]) -> str:
    if name in done:
        return ""
    done.add(name)
    lines = []
    for line in (_HERE / name).read_text().splitlines():
        local = re.fullmatch(r'#include "(.+)"', line)
        lines.append(_included(local[1], done) if local else line)
    return "\n".join(line for line in lines if line != "#pragma once") + "\n"


def _machine() -> str:
    """What tells machines apart for which the compiler, asked for this machine's instructions, builds different code."""
    path = Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    digest = hashlib.sha256((features[2] if features else "").encode()).hexdigest()[:12]
    return f"{torch.backends.cpu.get_cpu_capability()} {digest}"
