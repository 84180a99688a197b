"""Hands launches and arrays to the emulator, and its answers back.

Knows the emulator's requests. Does not know how functions are built, nor what they do.

A request is a text file with one paragraph for each task:

    <path of the function's library>
    <grid: 3 numbers> <block: 3> <blocks of a cluster> <shared memory in bytes>
        <1: descending order>
        <bytes of the argument struct> <number of pointers> <number of arrays>
    <the argument struct in hexadecimal, each pointer being 1 + its array's number>
    <name> <i: input, o: output> <bytes> <place in the data file>, for each array
"""

from __future__ import annotations

import mmap
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparse_conv import jit
from sparse_conv.launch import Launch
from tests.emulator.build import EmulationError, build_emulator, build_function

ORDERS = ("ascending", "descending")
# The longest a request may take; only a function that never ends takes so long.
TIMEOUT_S = 300
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """One launch with its arrays.

    Attributes:
        launch: What is launched.
        arrays: The array of each of the launch's pointers; None, or no entry, is a null
            pointer. Those named in `outputs` give only shape and dtype.
        outputs: Names of the arrays that the function writes; the others are read-only.
        text: The CUDA text; that of `kernels/` by default.
        order: "ascending" or "descending": how blocks and threads take turns.
    """

    launch: Launch
    arrays: Mapping[str, np.ndarray | None]
    outputs: tuple[str, ...]
    text: str | None = None
    order: str = "ascending"


def run(
    launch: Launch,
    arrays: Mapping[str, np.ndarray | None],
    *,
    outputs: Sequence[str],
    text: str | None = None,
    order: str = "ascending",
) -> dict[str, np.ndarray]:
    """Runs one launch; see `Task` for the arguments.

    Returns:
        The outputs by name. Before the launch all their bytes are 0xFF: NaN, or -1.

    Raises:
        EmulationError: The function can't be built or broke a rule of CUDA: an access
            out of bounds, a race, a divergent barrier, a write to an input.
    """
    return run_tasks([Task(launch, arrays, tuple(outputs), text, order)])[0]


def run_tasks(tasks: Sequence[Task]) -> list[dict[str, np.ndarray]]:
    """Runs independent tasks in one process, which saves its start; see `run`."""
    with tempfile.TemporaryDirectory(prefix="sparse_conv_emulator_") as folder:
        request, data = Path(folder, "request"), Path(folder, "data")
        with data.open("wb") as file:
            parts = [_request(task, file) for task in tasks]
            # The outputs of the last task may lie beyond the last input's end.
            file.truncate(parts[-1].end if parts else 0)
        request.write_text("\n".join(part.text for part in parts))
        _execute(request, data)
        return [_outputs(part, data) for part in parts]


@dataclass(frozen=True, slots=True)
class _Part:
    """A task's paragraph, its outputs (template and place), and the data's end."""

    text: str
    outputs: dict[str, tuple[np.ndarray, int]]
    end: int


def _request(task: Task, file: BinaryIO) -> _Part:
    launch = task.launch
    text = task.text or jit.source(launch.function, launch.code)
    library = build_function(launch.function, launch.defines, text)
    arrays = {name: array for name, array in task.arrays.items() if array is not None}
    unknown = (set(arrays) | set(task.outputs)) - set(launch.pointers)
    if unknown or task.order not in ORDERS:
        raise ValueError(
            f"Arrays must be among {launch.pointers}, the order among {ORDERS}. "
            f"Received: {sorted(unknown)}, order={task.order!r}"
        )
    lines, outputs, place = [], {}, file.tell()
    for name, array in arrays.items():
        if name in task.outputs:
            outputs[name] = (array, place)
            kind = "o"
        else:
            _write(file, place, array)
            kind = "i"
        lines.append(f"{name} {kind} {array.nbytes} {place}")
        # The emulator maps inputs, which must therefore start with a page.
        place += -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    file.seek(place)
    numbers = {name: 1 + number for number, name in enumerate(arrays)}
    arguments = launch.pack({name: numbers.get(name, 0) for name in launch.pointers})
    sizes = [*launch.grid, *launch.block, launch.cluster, launch.shared_mem_bytes]
    sizes += [int(task.order == "descending"), len(arguments)]
    sizes += [len(launch.pointers), len(arrays)]
    paragraph = [library, " ".join(map(str, sizes)), arguments.hex(), *lines]
    return _Part("\n".join(map(str, paragraph)), outputs, place)


def _write(file: BinaryIO, place: int, array: np.ndarray) -> None:
    """Writes an array, leaving holes where it is zero: it may be larger than memory."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _BLOCK_BYTES):
        block = flat[start : start + _BLOCK_BYTES]
        if block.any():
            file.seek(place + start)
            file.write(block)


def _execute(request: Path, data: Path) -> None:
    command = [build_emulator(), request, data]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise EmulationError(f"The launch did not end in {TIMEOUT_S} s.") from None
    if done.returncode:
        raise EmulationError(f"{done.stderr}exit code {done.returncode}")


def _outputs(part: _Part, data: Path) -> dict[str, np.ndarray]:
    return {
        name: np.fromfile(data, array.dtype, array.size, offset=place).reshape(
            array.shape
        )
        for name, (array, place) in part.outputs.items()
    }
