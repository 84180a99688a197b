"""The sparse convolution and its gradients on NumPy arrays, compiled with Numba.

Each task copies its part of the input into planes of aligned cells (see `cpu_plan`),
walks the sparse rows for one tile of columns after the other with all of a tile's sums
in registers, and writes the tile back in the caller's layout, with bias and activation.

Every output is one sum in an order that depends on the kernel's pattern alone: short
chains of products, each summed by itself, in ascending order. Results do not depend on
the number of threads. Only stored entries are visited: what a skipped zero would have
met never takes part. Cells of padding are zeros.

Knows NumPy arrays and Gathers. Does not know TensorFlow, nor float16 and bfloat16: the
caller casts them to float32.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from sparse_conv.backends import cpu_threads
from sparse_conv.backends.cpu_plan import Job, PlanTables, make_plan
from sparse_conv.backends.cpu_vectors import (
    TILE_CELLS,
    VECTOR_BYTES,
    add_correlations,
    add_products,
    gather_square,
    lanes,
    scatter_square,
)
from sparse_conv.gather import Gather
from sparse_conv.pattern import Rows

# The cut of a wgrad decides the order of its sums, so it can't follow the machine.
WGRAD_THREADS = 16
# Scratch memory that a thread keeps for its next task: new pages cost more than the
# computation.
KEPT_BYTES = 8 * 2**20
# Output channels whose gradients are packed at once.
GRADIENT_CHANNELS = 16


def _sources_digest() -> int:
    """A number that changes with the compiled sources."""
    texts = (
        (Path(__file__).parent / name).read_bytes()
        for name in ("cpu_loops.py", "cpu_plan.py", "cpu_vectors.py")
    )
    return int.from_bytes(hashlib.sha256(b"".join(texts)).digest()[:6], "little")


# Numba files compiled code under the types of the arguments, and the value of an
# omitted argument is part of its type: with this default no code of other sources is
# loaded.
_DIGEST = _sources_digest()

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def _entry(function: Callable[..., None]) -> Any:
    """Compiles a function that Python calls, and keeps the code from run to run."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder can be written to.
        return njit(**_OPTIONS)(function)


# Called by compiled code alone: leaving out the wrappers for Python halves the time to
# compile.
_INNER_OPTIONS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_inner = njit(**_OPTIONS, **_INNER_OPTIONS)


_scratch = threading.local()


class Task(NamedTuple):
    """One task of a Plan.

    Attributes:
        outer_phase: Phase along the outer axis; `inner_phase` along the inner one.
        group_begin: First channel group, `group_end` is one past the last.
        output_begin: First output channel, `output_end` is one past the last.
        row_base: Sparse row of output channel 0.
        stack_row: First row of the chunk in the stack of images.
        image_outputs: Rows that are written in each image.
        column: First column of the strip, `columns` is their number.
    """

    outer_phase: int
    inner_phase: int
    group_begin: int
    group_end: int
    output_begin: int
    output_end: int
    row_base: int
    stack_row: int
    image_outputs: int
    column: int
    columns: int


class Entries(NamedTuple):
    """A Gather's rows as the loops walk them, with their values.

    Attributes:
        tables: The plan they are made for.
        offsets: (entries,) int32, what each entry reads, in cells.
        values: (entries,) numbers.
        splits: (rows, blocks + 1) int32, where each row's blocks of channels begin.
    """

    tables: PlanTables
    offsets: np.ndarray
    values: np.ndarray
    splits: np.ndarray


def caches() -> list[Path]:
    """The folders that keep compiled code from one process to the next."""
    path = _gather_task.stats.cache_path
    return [] if path is None else [Path(path)]


def gather(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    read: np.ndarray,
    write: np.ndarray,
    bias: np.ndarray | None = None,
    activation: int = 0,
) -> None:
    """Computes a Gather: the forward pass or the input gradient.

    Args:
        gather: What to compute.
        rows: The sparse rows that belong to it.
        values: (nnz,) numbers, in the pattern's canonical order.
        read: The input, in the gather's layout; float32, float64 or int32.
        write: The output, of the same dtype; all of it is overwritten.
        bias: (out_channels,) numbers.
        activation: The code of the activation; int32 has 0, 1 and 2 only.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    if write.size:
        entries = prepare(gather, rows, values)
        gather_entries(entries, read, write, bias, activation)


def prepare(gather: Gather, rows: Rows, values: np.ndarray) -> Entries:
    """Prepares what does not depend on a Gather's input.

    Args:
        gather: What will be computed.
        rows: The sparse rows that belong to it.
        values: (nnz,) numbers, in the pattern's canonical order.

    Returns:
        The entries, ready for any number of calls of `gather_entries`.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    threads = cpu_threads.thread_count()
    tables = _tables(gather, values.dtype, len(rows.indices), threads)
    offsets, ordered, splits = _prepare(tables, rows, values)
    offsets, ordered = offsets.copy(), ordered.copy()
    _sort_chains(tables.record, splits, offsets, ordered)
    return Entries(tables, _frozen(offsets), _frozen(ordered), splits)


def gather_entries(
    entries: Entries,
    read: np.ndarray,
    write: np.ndarray,
    bias: np.ndarray | None = None,
    activation: int = 0,
) -> None:
    """As `gather`, for entries that are prepared."""
    tables, plan = entries.tables, entries.tables.plan
    if bias is None:
        bias = np.empty(0, read.dtype)
    flat_read, flat_write = _frozen(read.reshape(-1)), write.reshape(-1)
    bias = _frozen(bias)

    def task(number: int) -> None:
        _gather_task(
            tables.record, number, tables.outer_origins, tables.inner_origins,
            tables.image_rows, entries.offsets, entries.values, entries.splits,
            flat_read, flat_write, bias, activation,
            _cells(tables.gather_cells, plan.lanes, read.dtype),
        )  # fmt: skip

    cpu_threads.run(task, plan.tasks, tables.threads)


def wgrad(
    gather: Gather,
    rows: Rows,
    read: np.ndarray,
    gradient: np.ndarray,
    dvalues: np.ndarray,
) -> None:
    """Computes the gradient to the kernel's values, at its nonzeros only.

    Args:
        gather: The forward pass.
        rows: The forward pass's rows.
        read: The forward pass's input; float32, float64 or int32.
        gradient: The gradient to the forward pass's output, of the same dtype.
        dvalues: (nnz,) of the same dtype; all of it is overwritten.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    if dvalues.size == 0:
        return
    if gradient.size == 0:
        dvalues[...] = 0
        return
    tables = _tables(gather, read.dtype, dvalues.size, WGRAD_THREADS, wgrad=True)
    offsets, _, splits = _prepare(tables, rows, dvalues)
    partial = _correlate(tables, offsets, splits, read, gradient, dvalues.size)
    _sum_slots(partial, dvalues)


def wgrad_dense(
    gather: Gather, read: np.ndarray, gradient: np.ndarray, dkernel: np.ndarray
) -> None:
    """Computes the gradient to every weight of the dense kernel.

    Args:
        gather: The forward pass.
        read: The forward pass's input; float32, float64 or int32.
        gradient: The gradient to the forward pass's output, of the same dtype.
        dkernel: (R, S, C / groups, K) of the same dtype; all of it is overwritten.

    Raises:
        NotImplementedError: The scratch memory of one tile would exceed 2^31 cells.
    """
    length, outputs = gather.row_length, gather.out_channels
    begin = np.arange(outputs, dtype=np.int64) * length
    if begin.size and begin[-1] + length >= 2**31:
        raise NotImplementedError(
            "The CPU back end's gradient to a dense kernel is limited to 2^31 - 1 "
            f"weights. Received: {gather}"
        )
    rows = Rows(
        begin.astype(np.int32),
        (begin + length).astype(np.int32),
        np.tile(np.arange(length, dtype=np.int32), outputs),
        None,
    )
    dvalues = np.empty(outputs * length, dkernel.dtype)
    wgrad(gather, rows, read, gradient, dvalues)
    channels = gather.in_channels // gather.groups
    by_output = dvalues.reshape(outputs, channels, gather.h.taps, gather.w.taps)
    dkernel[...] = by_output.transpose(2, 3, 1, 0)


def _tables(
    gather: Gather, dtype: np.dtype, entries: int, threads: int, wgrad: bool = False
) -> PlanTables:
    # Plans are cached: near numbers of entries share one.
    rounded = 1 << max(0, int(entries) - 1).bit_length()
    width = lanes(dtype.itemsize)
    return make_plan(
        Job(gather, dtype.itemsize, width, TILE_CELLS, rounded, threads, wgrad)
    )


def _frozen(array: np.ndarray) -> np.ndarray:
    """A view that can't be written to.

    Numba compiles anew for arrays that can and that can't be; so all inputs are made
    to be of the second kind.
    """
    view = array.view()
    view.flags.writeable = False
    return view


def _cells(count: int, lanes: int, dtype: np.dtype) -> np.ndarray:
    """This thread's scratch memory: `count` uninitialised cells, flat and aligned."""
    size = count * VECTOR_BYTES
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < size + VECTOR_BYTES:
        buffer = np.empty(size + VECTOR_BYTES, np.uint8)
        if size <= KEPT_BYTES:
            _scratch.buffer = buffer
    first = -buffer.ctypes.data % VECTOR_BYTES
    return buffer[first : first + size].view(dtype)


def _prepare(
    tables: PlanTables, rows: Rows, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each entry's offset in cells, its value, and where each row's blocks begin."""
    offsets = np.empty(len(rows.indices), np.int32)
    splits = np.empty((len(rows.begin), tables.plan.blocks + 1), np.int32)
    values = _frozen(values)
    order, ordered = rows.order, np.empty(0, values.dtype)
    if order is None:
        order = np.empty(0, np.int32)
    else:
        ordered = np.empty(len(rows.indices), values.dtype)
    _prepare_entries(
        tables.record, tables.offsets, _frozen(rows.begin), _frozen(rows.end),
        _frozen(rows.indices), _frozen(order), values, offsets, ordered, splits,
    )  # fmt: skip
    ordered = values if rows.order is None else _frozen(ordered)
    return _frozen(offsets), ordered, _frozen(splits)


def _correlate(
    tables: PlanTables,
    offsets: np.ndarray,
    splits: np.ndarray,
    read: np.ndarray,
    gradient: np.ndarray,
    entries: int,
) -> np.ndarray:
    """(slots, entries): the gradients of fixed shares of the outputs."""
    plan = tables.plan
    partial = np.zeros((tables.slots, entries), read.dtype)
    flat_read, flat_gradient = _frozen(read.reshape(-1)), _frozen(gradient.reshape(-1))
    longest = int((splits[:, -1] - splits[:, 0]).max())
    channels = plan.group_block * plan.group_channels
    # Planes, the gradients of some output channels, and the sums of their entries.
    cells = channels * plan.channel_cells
    cells += GRADIENT_CHANNELS * (plan.band * plan.strip + longest)

    def task(number: int) -> None:
        _wgrad_task(
            tables.record, number, tables.slots, tables.outer_origins,
            tables.inner_origins, tables.image_rows, offsets, splits, longest,
            flat_read, flat_gradient, partial[number],
            _cells(cells, plan.lanes, read.dtype),
        )  # fmt: skip

    threads = 1 if tables.threads == 1 else None
    cpu_threads.run(task, tables.slots, threads)
    return partial


@_entry
def _prepare_entries(
    record, table, begin, end, indices, order, values, offsets, ordered, splits,
    digest=_DIGEST,
):  # fmt: skip
    plan = record[0]
    outputs = plan.groups * plan.group_outputs
    group_cells = plan.group_channels * plan.channel_cells
    for row in range(len(begin)):
        group = (row % outputs) // plan.group_outputs
        shift = np.int32((group % plan.group_block) * group_cells)
        block, limit = 0, 0
        for i in range(begin[row], end[row]):
            index = indices[i]
            offsets[i] = table[index] + shift
            while index >= limit:
                splits[row, block] = i
                block += 1
                limit += plan.block_length
            if len(order) > 0:
                ordered[i] = values[order[i]]
        splits[row, block:] = end[row]


@_entry
def _sort_chains(record, splits, offsets, values, digest=_DIGEST):
    """Sorts each chain by the values' magnitude, in place.

    A sum that takes the small products first is smaller while it is rounded.
    """
    plan = record[0]
    for row in range(len(splits)):
        for block in range(plan.blocks):
            end = splits[row, block + 1]
            for first in range(splits[row, block], end, plan.chain):
                for i in range(first + 1, min(end, first + plan.chain)):
                    value, offset = values[i], offsets[i]
                    place = i
                    while place > first and abs(values[place - 1]) > abs(value):
                        values[place] = values[place - 1]
                        offsets[place] = offsets[place - 1]
                        place -= 1
                    values[place], offsets[place] = value, offset


@_entry
def _gather_task(
    record, number, outer_origins, inner_origins, image_rows, offsets, values, splits,
    read, write, bias, activation, cells, digest=_DIGEST,
):  # fmt: skip
    plan = record[0]
    task = _decode(plan, number)
    task_channels = (task.group_end - task.group_begin) * plan.group_channels
    planes = cells[: task_channels * plan.channel_cells * plan.lanes]
    sums = cells[len(planes) :]
    _pack_planes(plan, task, outer_origins, inner_origins, image_rows, read, planes)
    tiles = -(-task.columns // TILE_CELLS)
    for tile in range(tiles):
        column = tile * task.columns // tiles
        size = (tile + 1) * task.columns // tiles - column
        for row in range(0, plan.band, plan.row_block):
            rows = min(plan.row_block, plan.band - row)
            for first in range(task.output_begin, task.output_end, plan.output_block):
                outputs = min(plan.output_block, task.output_end - first)
                _sum_tiles(
                    plan, task.row_base + first, outputs, planes,
                    row * plan.pitch + column, rows, offsets, values, splits, sums,
                    size,
                )  # fmt: skip
                _finish_sums(plan, first, outputs, rows, sums, size, bias, activation)
                _write_tiles(
                    plan, task, image_rows[task.outer_phase], row, rows, column, size,
                    first, outputs, sums, write,
                )  # fmt: skip


@_inner
def _decode(plan, number):
    """The Task with this number."""
    number, strip = divmod(number, plan.strips)
    number, chunk = divmod(number, plan.chunks)
    number, part = divmod(number, plan.output_parts)
    number, block = divmod(number, plan.group_blocks)
    outer_phase, inner_phase = divmod(number, plan.inner.visited)
    outer, inner = plan.outer, plan.inner
    group_begin = block * plan.group_block
    group_end = min(plan.groups, group_begin + plan.group_block)
    first = group_begin * plan.group_outputs
    outputs = (group_end - group_begin) * plan.group_outputs
    row_set = (outer_phase % outer.row_sets) * outer.set_factor
    row_set += (inner_phase % inner.row_sets) * inner.set_factor
    column = strip * plan.strip
    columns = -((inner_phase - inner.outputs) // inner.phases) - column
    return Task(
        outer_phase,
        inner_phase,
        group_begin,
        group_end,
        first + outputs * part // plan.output_parts,
        first + outputs * (part + 1) // plan.output_parts,
        row_set * plan.groups * plan.group_outputs,
        chunk * plan.lanes * plan.band,
        -((outer_phase - outer.outputs) // outer.phases),
        column,
        max(0, min(plan.strip, columns)),
    )


@_inner
def _pack_planes(plan, task, outer_origins, inner_origins, image_rows, read, planes):
    """Copies what a task reads into its planes, zeros where there is no input."""
    channels = (task.group_end - task.group_begin) * plan.group_channels
    starts = np.empty(plan.lanes, np.int64)
    zeros = np.zeros(plan.lanes, read.dtype)
    inner = plan.inner
    for sub in range(plan.outer.subs * inner.subs):
        outer_sub, inner_sub = divmod(sub, inner.subs)
        # Column j of this plane is input `start + pace * j`.
        pace = inner.step * inner.stride
        start = inner_origins[task.inner_phase] + inner.step * inner_sub
        start += pace * task.column
        low = min(plan.pitch, max(0, -(start // pace)))
        high = max(low, min(plan.pitch, (inner.inputs - 1 - start) // pace + 1))
        # No tap reaches the cells after the last row, but the search for Inf does.
        used = (plan.band + plan.outer.reach) * plan.pitch
        plane = sub * plan.plane_cells
        _clear(plan, planes, plane, channels, used, plan.plane_cells)
        for row in range(plan.band + plan.outer.reach):
            _input_starts(plan, task, outer_origins, image_rows, outer_sub, row, starts)
            at = plane + row * plan.pitch
            _clear(plan, planes, at, channels, 0, low)
            _clear(plan, planes, at, channels, high, plan.pitch)
            _pack_row(
                plan, read, starts, zeros, start * inner.read_stride,
                pace * inner.read_stride, planes, at, channels, low, high,
            )  # fmt: skip


@_inner
def _input_starts(plan, task, outer_origins, image_rows, outer_sub, row, starts):
    """Where each lane's input row begins, -1 where that row is padding."""
    outer = plan.outer
    rows = image_rows[task.outer_phase]
    origin = outer_origins[task.outer_phase] + outer.step * outer_sub
    first_channel = task.group_begin * plan.group_channels * plan.read_channel
    for lane in range(plan.lanes):
        image, position = divmod(task.stack_row + lane * plan.band + row, rows)
        place = origin + outer.step * outer.stride * position
        starts[lane] = -1
        if image < plan.images and 0 <= place < outer.inputs:
            starts[lane] = (
                image * plan.read_image + place * outer.read_stride + first_channel
            )


@_inner
def _output_starts(plan, task, rows, band_row, starts):
    """Where each lane's output row begins, -1 where there is none. Whether any is."""
    outer = plan.outer
    present = False
    for lane in range(plan.lanes):
        image, position = divmod(task.stack_row + lane * plan.band + band_row, rows)
        starts[lane] = -1
        if image < plan.images and position < task.image_outputs:
            place = task.outer_phase + outer.phases * position
            starts[lane] = (
                image * plan.write_image
                + place * outer.write_stride
                + task.output_begin * plan.write_channel
            )
            present = True
    return present


@_inner
def _zero(numbers):
    # Not a slice assignment, which takes far longer to compile.
    for i in range(len(numbers)):
        numbers[i] = 0


@_inner
def _clear(plan, planes, at, channels, begin, end):
    """Zeros the columns from `begin` to `end` of one row of each channel."""
    if begin >= end:
        return
    for channel in range(channels):
        cell = channel * plan.channel_cells + at
        _zero(planes[(cell + begin) * plan.lanes : (cell + end) * plan.lanes])


@_inner
def _pack_row(plan, read, starts, zeros, shift, pace, planes, at, channels, low, high):
    """Packs the columns from `low` to `high` of one row of each channel.

    Column j of lane l is `read[starts[l] + shift + pace * j]`, a channel further on
    `plan.read_channel` later.
    """
    step = plan.channel_cells
    if plan.read_channel == 1 and channels >= plan.lanes:
        for column in range(low, high):
            place = shift + pace * column
            for first in range(0, channels, plan.lanes):
                # The last square overlaps the one before it.
                channel = min(first, channels - plan.lanes)
                gather_square(
                    read, starts, place + channel, zeros, planes,
                    channel * step + at + column, step,
                )  # fmt: skip
    elif pace == 1 and high - low >= plan.lanes:
        for channel in range(channels):
            place = shift + channel * plan.read_channel
            for first in range(low, high, plan.lanes):
                column = min(first, high - plan.lanes)
                gather_square(
                    read, starts, place + column, zeros, planes,
                    channel * step + at + column, 1,
                )  # fmt: skip
    else:
        for channel in range(channels):
            place = shift + channel * plan.read_channel
            for column in range(low, high):
                cell = (channel * step + at + column) * plan.lanes
                for lane in range(plan.lanes):
                    start = starts[lane]
                    planes[cell + lane] = 0
                    if start >= 0:
                        planes[cell + lane] = read[start + place + pace * column]


@_inner
def _sum_tiles(
    plan, first, outputs, planes, at, rows, offsets, values, splits, sums, size
):
    """The sums of one tile in each of `rows` rows, for the sparse rows from `first`.

    Entries are summed in chains, chains in groups, and groups one after another: the
    rounding errors of each level stay as small as those of a short sum.
    """
    spare = rows * outputs * TILE_CELLS
    group = plan.chain * plan.chains
    for block in range(plan.blocks):
        for row in range(rows):
            place = at + row * plan.pitch
            for output in range(outputs):
                cell = (row * outputs + output) * TILE_CELLS
                begin = splits[first + output, block]
                end = splits[first + output, block + 1]
                whole = sums[cell * plan.lanes : (cell + size) * plan.lanes]
                if block == 0 and begin == end:
                    _zero(whole)
                # What holds nothing yet takes the first group as it is.
                fresh = block == 0
                for start in range(begin, end, group):
                    target = cell if fresh else spare
                    stop = min(end, start + group)
                    for part in range(start, stop, plan.chain):
                        add_products(
                            planes, place, offsets, values, part,
                            min(stop, part + plan.chain), sums, target, size,
                            part == start,
                        )  # fmt: skip
                    if not fresh:
                        _add(whole, sums[spare * plan.lanes :])
                    fresh = False


@_inner
def _add(numbers, others):
    for i in range(len(numbers)):
        numbers[i] += others[i]


@_inner
def _finish_sums(plan, first, outputs, rows, sums, size, bias, activation):
    """Adds the bias and applies the activation, in place."""
    if len(bias) == 0 and activation == 0:
        return
    for tile in range(rows * outputs):
        begin = tile * TILE_CELLS * plan.lanes
        numbers = sums[begin : begin + size * plan.lanes]
        if len(bias) > 0:
            shift = bias[first + tile % outputs]
            for i in range(len(numbers)):
                numbers[i] += shift
        if activation:
            _activate(numbers, activation)


@_inner
def _write_tiles(
    plan, task, image_rows, row, rows, column, size, first, outputs, sums, write
):
    """Writes the finished tiles of some rows and output channels."""
    starts = np.empty(plan.lanes, np.int64)
    waste = np.empty(plan.lanes, write.dtype)
    inner = task.inner_phase + plan.inner.phases * (task.column + column)
    shift = inner * plan.inner.write_stride
    shift += (first - task.output_begin) * plan.write_channel
    length = outputs * TILE_CELLS * plan.lanes
    for i in range(rows):
        if _output_starts(plan, task, image_rows, row + i, starts):
            tiles = sums[i * length : (i + 1) * length]
            _unpack(plan, outputs, tiles, size, write, starts, shift, waste)


# TensorFlow keeps alpha in float32, for every dtype.
_LEAKY_RELU_ALPHA = float(np.float32(0.2))


@_inner
def _activate(tile, activation):
    """Applies an activation by its code, in place. NaN stays NaN."""
    for i in range(len(tile)):
        x = tile[i]
        if activation == 1:
            tile[i] = 0 if x < 0 else x
        elif activation == 2:
            tile[i] = 0 if x < 0 else 6 if x > 6 else x
        elif activation == 3:
            tile[i] = _LEAKY_RELU_ALPHA * x if x < 0 else x
        elif activation == 4:
            tile[i] = math.expm1(x) if x < 0 else x
        elif activation == 5:
            tile[i] = 1 / (1 + math.exp(-x))
        elif activation == 6:
            tile[i] = math.tanh(x)
        elif activation == 7:
            tile[i] = 0.5 * x * (1 + math.erf(x * math.sqrt(0.5)))
        else:
            tile[i] = x / (1 + math.exp(-x))


@_inner
def _unpack(plan, outputs, sums, size, write, starts, shift, waste):
    """Writes a finished tile to the output rows that begin at `starts`."""
    pace = plan.inner.phases * plan.inner.write_stride
    if plan.write_channel == 1 and outputs >= plan.lanes:
        for column in range(size):
            place = shift + pace * column
            for first in range(0, outputs, plan.lanes):
                output = min(first, outputs - plan.lanes)
                scatter_square(
                    sums, output * TILE_CELLS + column, TILE_CELLS, write, starts,
                    place + output, waste,
                )  # fmt: skip
    elif pace == 1 and size >= plan.lanes:
        for output in range(outputs):
            place = shift + output * plan.write_channel
            for first in range(0, size, plan.lanes):
                column = min(first, size - plan.lanes)
                scatter_square(
                    sums, output * TILE_CELLS + column, 1, write, starts,
                    place + column, waste,
                )  # fmt: skip
    else:
        for output in range(outputs):
            place = shift + output * plan.write_channel
            for column in range(size):
                cell = (output * TILE_CELLS + column) * plan.lanes
                for lane in range(plan.lanes):
                    if starts[lane] >= 0:
                        write[starts[lane] + place + pace * column] = sums[cell + lane]


@_entry
def _wgrad_task(
    record, slot, slots, outer_origins, inner_origins, image_rows, offsets, splits,
    longest, read, gradient, totals, cells, digest=_DIGEST,
):  # fmt: skip
    plan = record[0]
    for number in range(slot * plan.tasks // slots, (slot + 1) * plan.tasks // slots):
        task = _decode(plan, number)
        channels = (task.group_end - task.group_begin) * plan.group_channels
        planes = cells[: channels * plan.channel_cells * plan.lanes]
        _pack_planes(plan, task, outer_origins, inner_origins, image_rows, read, planes)
        _correlate_task(
            plan, task, image_rows[task.outer_phase], planes, gradient, offsets, splits,
            longest, totals, cells[len(planes) :],
        )  # fmt: skip


@_inner
def _correlate_task(
    plan, task, rows, planes, gradient, offsets, splits, longest, totals, cells
):
    """Adds the gradients of one task's outputs to `totals`."""
    finite = _all_finite(planes)
    starts = np.empty(plan.lanes, np.int64)
    size = GRADIENT_CHANNELS * plan.band * plan.strip * plan.lanes
    gradients, sums = cells[:size], cells[size:]
    for first in range(task.output_begin, task.output_end, GRADIENT_CHANNELS):
        outputs = min(GRADIENT_CHANNELS, task.output_end - first)
        _pack_gradient(plan, task, rows, gradient, first, outputs, starts, gradients)
        if not finite:
            _correlate_exactly(
                plan, task, rows, planes, gradients, first, outputs, offsets, splits,
                totals, starts,
            )  # fmt: skip
            continue
        _zero(sums[: outputs * longest * plan.lanes])
        _correlate_outputs(
            plan, task, planes, gradients, first, outputs, offsets, splits, sums,
            longest,
        )  # fmt: skip
        _add_lanes(plan, first, outputs, splits, longest, sums, totals)


@_inner
def _add_lanes(plan, first, outputs, splits, longest, sums, totals):
    """Adds the lanes of each entry's cell to its total."""
    for output in range(outputs):
        begin, end = splits[first + output, 0], splits[first + output, plan.blocks]
        for i in range(begin, end):
            cell = (output * longest + i - begin) * plan.lanes
            total = totals[i]
            for lane in range(plan.lanes):
                total += sums[cell + lane]
            totals[i] = total


@_inner
def _all_finite(numbers):
    odd = False
    for i in range(len(numbers)):
        odd |= numbers[i] - numbers[i] != 0
    return not odd


@_inner
def _pack_gradient(plan, task, rows, gradient, first, outputs, starts, gradients):
    """Packs the output's gradient for some channels, zeros where there is no output."""
    zeros = np.zeros(plan.lanes, gradient.dtype)
    step = plan.band * plan.strip
    shift = (task.inner_phase + plan.inner.phases * task.column) * (
        plan.inner.write_stride
    ) + (first - task.output_begin) * plan.write_channel
    pace = plan.inner.phases * plan.inner.write_stride
    for row in range(plan.band):
        _output_starts(plan, task, rows, row, starts)
        at = row * plan.strip
        if plan.write_channel == 1 and outputs >= plan.lanes:
            for column in range(task.columns):
                for square in range(0, outputs, plan.lanes):
                    output = min(square, outputs - plan.lanes)
                    gather_square(
                        gradient, starts, shift + pace * column + output, zeros,
                        gradients, output * step + at + column, step,
                    )  # fmt: skip
            continue
        for output in range(outputs):
            for column in range(task.columns):
                cell = (output * step + at + column) * plan.lanes
                place = shift + output * plan.write_channel + pace * column
                for lane in range(plan.lanes):
                    gradients[cell + lane] = 0
                    if starts[lane] >= 0:
                        gradients[cell + lane] = gradient[starts[lane] + place]


@_inner
def _correlate_outputs(
    plan, task, planes, gradients, first, outputs, offsets, splits, sums, longest
):
    """Adds to each entry's cell of `sums`, tile after tile."""
    tiles = -(-task.columns // TILE_CELLS)
    for tile in range(tiles):
        column = tile * task.columns // tiles
        size = (tile + 1) * task.columns // tiles - column
        for row in range(plan.band):
            for output in range(outputs):
                begin = splits[first + output, 0]
                end = splits[first + output, plan.blocks]
                if begin == end:
                    continue
                cell = (output * plan.band + row) * plan.strip + column
                entry_sums = sums[output * longest * plan.lanes :]
                add_correlations(
                    planes, row * plan.pitch + column, offsets, begin, end, gradients,
                    cell, entry_sums, size,
                )  # fmt: skip


@_inner
def _correlate_exactly(
    plan, task, rows, planes, gradients, first, outputs, offsets, splits, totals, starts
):
    """As `_correlate_outputs`, for input that has Inf or NaN.

    Lanes without an output have the gradient 0, which must not meet Inf: skip them.
    """
    for row in range(plan.band):
        _output_starts(plan, task, rows, row, starts)
        for output in range(outputs):
            at = (output * plan.band + row) * plan.strip * plan.lanes
            begin = splits[first + output, 0]
            for i in range(begin, splits[first + output, plan.blocks]):
                total = totals[i]
                source = (offsets[i] + row * plan.pitch) * plan.lanes
                for place in range(task.columns * plan.lanes):
                    if starts[place % plan.lanes] >= 0:
                        total += planes[source + place] * gradients[at + place]
                totals[i] = total


@_entry
def _sum_slots(partial, dvalues, digest=_DIGEST):
    for i in range(len(dvalues)):
        total = partial[0, i]
        for slot in range(1, len(partial)):
            total += partial[slot, i]
        dvalues[i] = total
