"""The measurements' own CUDA text -> functions that can be launched.

Knows the `.cu` files beside it and CuPy, which it imports when a function is loaded.
Describes launches as the package does, by `sparse_conv.launch.Launch`; but the package
loads text from `kernels/` alone, and these functions are no part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_conv.bridge import Memory
from sparse_conv.launch import Launch

HERE = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17",)


def text_of(file: str) -> str:
    """The text of `bench/<file>.cu`, which includes nothing."""
    return (HERE / f"{file}.cu").read_text(encoding="utf-8")


@functools.cache
def _load(file: str, function: str, ordinal: int) -> Any:
    import cupy

    with cupy.cuda.Device(ordinal):
        module = cupy.RawModule(code=text_of(file), options=OPTIONS)
        return module.get_function(function)


class Step:
    """A launch of one of these functions; used as `sparse_conv.streams.Step` is."""

    def __init__(self, file: str, launch: Launch, ordinal: int):
        """Compiles the function on first use.

        Args:
            file: Name of the text, without its suffix.
            launch: The launch.
            ordinal: CUDA's number of the GPU.
        """
        self._function = _load(file, launch.function, ordinal)
        self._launch = launch

    def run(self, operands: Mapping[str, Memory], stream: Any) -> None:
        """Enqueues the launch on a CuPy stream; `operands` name its pointers."""
        addresses = {name: memory.address for name, memory in operands.items()}
        arguments = self._launch.pack(addresses)
        struct = np.frombuffer(arguments, np.dtype((np.void, len(arguments))))[0]
        self._function(self._launch.grid, self._launch.block, (struct,), stream=stream)
