"""Machine instructions that a kernel's pattern is written in, and memory to run them.

LLVM's assembler encodes each instruction that is needed once, for each register it may
name. Code of any length is then put together from these, as arrays of bytes: a number
of NumPy operations that does not depend on the length, which takes 0.1 us for each
instruction, where LLVM would take 3.

Knows instructions, registers and memory that can be executed. Does not know what the
code computes.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import platform
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np

from sparse_conv.backends import cpu_code

# Registers for sums; one more holds what is read.
SUMS = 31
# Values that one register reaches with a displacement of one byte.
VALUES_IN_REACH = 256

_INPUT = f"%zmm{SUMS}"
# Stand for what is filled in: one byte, counted in elements, or four.
_BYTE, _WORD = "{element}", "0x12345678"


class _Form(NamedTuple):
    """An instruction, or several in a row.

    Attributes:
        text: In AT&T's syntax, `{r}` being the register of a sum.
        filled: Bytes at its end that are filled in.
    """

    text: str
    filled: int = 0

    @property
    def count(self) -> int:
        """Registers that it may name."""
        return SUMS if "{r}" in self.text else 1


# The arguments of a function are in rdi (cells to read), rsi (values), rdx (sums), rcx
# (cells of each sum) and r8 (biases), as System V's calling convention has them.
_FORMS = {
    "enter": _Form("pushq %rbx; movq %rdi, %r10; movq %rdx, %r11; movq %rcx, %r9"),
    "begin": _Form("movq %r10, %rdi; movq %r11, %rdx; movq %r9, %rcx"),
    # Where code is that runs later (leaq 0(%rip), %rbx), and a line of it to fetch.
    "ahead": _Form(".byte 0x48, 0x8d, 0x1d; .long 0", 4),
    "fetch": _Form(f"prefetcht1 {_WORD}(%rbx)", 4),
    "fetch on": _Form(f"addq ${_WORD}, %rbx", 4),
    "values": _Form(f"leaq {_WORD}(%rsi), %rax", 4),
    "more values": _Form(f"addq ${_WORD}, %rax", 4),
    "read": _Form(f"vmova{{p}} {_WORD}(%rdi), {_INPUT}", 4),
    "multiply": _Form(f"vmul{{p}} {_BYTE}(%rax){{one}}, {_INPUT}, %zmm{{r}}", 1),
    "multiply and add": _Form(
        f"vfmadd231{{p}} {_BYTE}(%rax){{one}}, {_INPUT}, %zmm{{r}}", 1
    ),
    "zero": _Form("vpxord %zmm{r}, %zmm{r}, %zmm{r}"),
    "add held": _Form(f"vadd{{p}} {_WORD}(%rdx), %zmm{{r}}, %zmm{{r}}", 4),
    "add bias": _Form(f"vadd{{p}} {_WORD}(%r8){{one}}, %zmm{{r}}, %zmm{{r}}", 4),
    "store": _Form(f"vmova{{p}} %zmm{{r}}, {_WORD}(%rdx)", 4),
    "next cell": _Form("addq $64, %rdi"),
    "next sums": _Form(f"addq ${_WORD}, %rdx", 4),
    # A jump back if the count is not 0. The assembler would take a shorter one.
    "repeat": _Form("decq %rcx; .byte 0x0f, 0x85; .long 0", 4),
    "leave": _Form("popq %rbx; vzeroupper; ret"),
}


class Instructions(NamedTuple):
    """The encoded instructions for one dtype.

    Attributes:
        numbers: The number of each form, with its first register if it names one; the
            others follow.
        codes: (instructions, longest) uint8, their bytes.
        lengths: (instructions,) how many each has.
        filled: (instructions,) how many of them, at the end, are filled in.
    """

    numbers: dict[str, int]
    codes: np.ndarray
    lengths: np.ndarray
    filled: np.ndarray

    def encode(self, numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The bytes of instructions, one after the other.

        Args:
            numbers: (n,) of each instruction.
            values: (n,) int64, what is filled in, where something is.
        """
        codes, lengths = self.codes[numbers], self.lengths[numbers]
        filled = self.filled[numbers]
        rows = np.arange(len(numbers))
        for byte in range(4):
            used = np.flatnonzero(byte < filled)
            place = lengths[used] - filled[used] + byte
            codes[rows[used], place] = values[used] >> 8 * byte & 0xFF
        return codes[np.arange(codes.shape[1]) < lengths[:, np.newaxis]]


@functools.cache
def instructions(dtype: str) -> Instructions:
    """The instructions for "float32" or "float64"."""
    itemsize = np.dtype(dtype).itemsize
    lanes = cpu_code.vector_bytes() // itemsize
    words = {
        "p": {4: "ps", 8: "pd"}[itemsize],
        "one": f"{{1to{lanes}}}",
        "element": str(itemsize),
    }
    numbers, lines, filled = {}, [], []
    for name, form in _FORMS.items():
        numbers[name] = len(lines)
        lines += [form.text.format(r=r, **words) for r in range(form.count)]
        filled += [form.filled] * form.count
    encoded = _assembled(f"sparse_conv_instructions_{dtype}", lines)
    lengths = np.array([len(code) for code in encoded])
    codes = np.zeros((len(lines), lengths.max()), np.uint8)
    for row, code in zip(codes, encoded, strict=True):
        row[: len(code)] = np.frombuffer(code, np.uint8)
    return Instructions(numbers, codes, lengths, np.array(filled))


def _assembled(name: str, lines: list[str]) -> list[bytes]:
    """The code of each line, by LLVM's assembler."""
    llvm.initialize_native_asmparser()
    marks = [f".L{name}_{i}" for i in range(len(lines) + 1)]
    text = [".text", f".globl {name}_data", f"{name}_data:"]
    text += [f".byte {after} - {before}" for before, after in itertools.pairwise(marks)]
    for mark, line in zip(marks, lines, strict=False):
        text += [f"{mark}:", line]
    text.append(f"{marks[-1]}:")
    module = "\n".join(f'module asm "{line}"' for line in text)
    module += f"""
        @{name}_data = external global i8
        define i8* @{name}() {{
            ret i8* @{name}_data
        }}
    """
    function = cpu_code.assembled(module, (name,))[name]
    address = ctypes.CFUNCTYPE(ctypes.c_void_p)(function)()
    sizes = list(ctypes.string_at(address, len(lines)))
    code = ctypes.string_at(address + len(lines), sum(sizes))
    ends = np.cumsum(sizes)
    return [
        code[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)
    ]


class Executable:
    """Code in memory that can be executed, for as long as this object lives.

    Attributes:
        address: Where it begins.
    """

    def __init__(self, code: np.ndarray):
        """Copies the code.

        Args:
            code: Its bytes; at least one.

        Raises:
            OSError: The system has no memory for it, or lets none be executed.
        """
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, code.nbytes, flags=private)
        self._memory.write(code.tobytes())
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        # Never writable and executable at once, which hardened systems refuse.
        protection = mmap.PROT_READ | mmap.PROT_EXEC
        if _protect()(self.address, code.nbytes, protection):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


@functools.cache
def _protect() -> ctypes._CFuncPtr:
    """C's `mprotect`."""
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@functools.cache
def unavailable() -> str | None:
    """Why code can't be generated on this machine; None if it can."""
    if platform.machine() not in ("x86_64", "AMD64") or cpu_code.vector_bytes() < 64:
        return "it is generated for processors with AVX-512 only"
    if os.name != "posix":
        return "it is generated for System V's calling convention only"
    try:
        Executable(np.zeros(1, np.uint8))
    except OSError as error:
        return f"the system executes no memory that was written to ({error.strerror})"
    return None
