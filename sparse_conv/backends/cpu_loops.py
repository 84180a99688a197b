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
from sparse_conv.backends.cpu_plan import CHAIN_ENTRIES, Job, PlanTables, make_plan
from sparse_conv.backends.cpu_vectors import (
    TILE_CELLS,
    VECTOR_BYTES,
    add_correlations,
    finish_stores,
    gather_square,
    lanes,
    scatter_square,
    sum_products,
)
from sparse_conv.gather import Gather
from sparse_conv.pattern import Rows

# The cut of a wgrad decides the order of its sums, so it can't follow the machine.
WGRAD_THREADS = 16
# Scratch memory that a thread keeps for its next task: new pages cost more than the
# computation.
KEPT_BYTES = 8 * 2**20


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
        lengths: (rows, blocks) int32, the entries of a chain in each block.
    """

    tables: PlanTables
    offsets: np.ndarray
    values: np.ndarray
    splits: np.ndarray
    lengths: np.ndarray


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
    used, offsets, splits = _place_entries(tables, rows)
    lengths = chain_lengths(np.diff(splits, axis=1))
    ordered = values[used] if rows.order is None else values[rows.order[used]]
    order = _chain_order(ordered, splits, lengths)
    return Entries(
        tables, _frozen(offsets[order]), _frozen(ordered[order]), _frozen(splits),
        _frozen(lengths),
    )  # fmt: skip


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
        bias = np.zeros(plan.groups * plan.group_outputs, read.dtype)
    flat_read, flat_write = _frozen(read.reshape(-1)), write.reshape(-1)
    bias = _frozen(bias)

    def task(number: int) -> None:
        _gather_task(
            tables.record, number, tables.outer_origins, tables.inner_origins,
            tables.image_rows, tables.places, entries.offsets, entries.values,
            entries.splits, entries.lengths, flat_read, flat_write, bias, activation,
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
    _, offsets, splits = _place_entries(tables, rows)
    partial = _correlate(
        tables, _frozen(offsets), _frozen(splits), read, gradient, dvalues.size
    )
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
    step = 1 << max(0, int(entries).bit_length() - 3)
    rounded = -(-int(entries) // step) * step
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


def _place_entries(
    tables: PlanTables, rows: Rows
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the rows' entries, their offsets in cells, and the blocks' beginnings.

    The places are those in `rows.indices`, without the gaps between rows; the blocks'
    beginnings count without them.
    """
    plan = tables.plan
    counts = (rows.end - rows.begin).astype(np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    used = np.arange(len(row)) + np.repeat(rows.begin - (ends - counts), counts)
    indices = rows.indices[used]
    group = np.arange(len(counts)) % (plan.groups * plan.group_outputs)
    group = group // plan.group_outputs % plan.group_block
    shift = (group * plan.group_channels * plan.channel_cells).astype(np.int32)
    offsets = tables.offsets[indices] + shift[row]
    place = row * plan.blocks + indices // plan.block_length
    block_counts = np.bincount(place, minlength=len(counts) * plan.blocks)
    splits = np.zeros((len(counts), plan.blocks + 1), np.int32)
    splits[:, 0] = ends - counts
    block_counts = block_counts.reshape(len(counts), plan.blocks)
    splits[:, 1:] = splits[:, :1] + np.cumsum(block_counts, axis=1)
    return used, offsets, splits


def chain_lengths(counts: np.ndarray) -> np.ndarray:
    """The products in one chain of each block: blocks are cut into even chains."""
    chains = np.maximum(1, -(-counts // CHAIN_ENTRIES))
    return np.maximum(1, -(-counts // chains)).astype(np.int32)


def _chain_order(
    values: np.ndarray, splits: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """The order that sorts each chain by the values' magnitude.

    A sum that takes the small products first is smaller while it is rounded.
    """
    counts = np.diff(splits, axis=1).reshape(-1)
    number = np.arange(len(values)) - np.repeat(splits[:, :-1].reshape(-1), counts)
    chain = number // np.repeat(lengths.reshape(-1), counts)
    # Chains are numbered in order; where one begins, the number grows.
    begins = np.diff(chain, prepend=0) != 0
    begins |= number == 0
    return np.lexsort((np.abs(values), np.cumsum(begins)))


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
    cells = 2 + channels * plan.channel_cells
    cells += plan.output_block * (plan.band * plan.strip + longest)

    def task(number: int) -> None:
        _wgrad_task(
            tables.record, number, tables.slots, tables.outer_origins,
            tables.inner_origins, tables.image_rows, tables.places,
            tables.gradient_places, offsets, splits, longest, flat_read, flat_gradient,
            partial[number],
            _cells(cells, plan.lanes, read.dtype),
        )  # fmt: skip

    threads = 1 if tables.threads == 1 else None
    cpu_threads.run(task, tables.slots, threads)
    return partial


@_entry
def _gather_task(
    record, number, outer_origins, inner_origins, image_rows, places, offsets, values,
    splits, lengths, read, write, bias, activation, cells, digest=_DIGEST,
):  # fmt: skip
    plan = record[0]
    task = _decode(plan, number)
    task_channels = (task.group_end - task.group_begin) * plan.group_channels
    # The first cell takes what belongs nowhere.
    waste = cells[: plan.lanes]
    planes = cells[plan.lanes : (1 + task_channels * plan.channel_cells) * plan.lanes]
    sums = cells[plan.lanes + len(planes) :]
    starts = np.empty(plan.lanes, np.int64)
    _pack_planes(
        plan, task, outer_origins, inner_origins, image_rows, places, read, starts,
        planes,
    )  # fmt: skip
    tiles = -(-task.columns // plan.tile)
    for row in range(plan.band):
        if not _output_starts(plan, task, image_rows[task.outer_phase], row, starts):
            continue
        for tile in range(tiles):
            column = tile * task.columns // tiles
            size = (tile + 1) * task.columns // tiles - column
            for first in range(task.output_begin, task.output_end, plan.output_block):
                outputs = min(plan.output_block, task.output_end - first)
                for block in range(plan.blocks):
                    sum_products(
                        planes, row * plan.pitch + column, offsets, values, splits,
                        lengths, task.row_base + first, outputs, block, sums, size,
                        bias, first, block == 0,
                    )  # fmt: skip
                if activation:
                    _activate(sums[: outputs * size * plan.lanes], activation)
                _write_tile(
                    plan, task, column, size, first, outputs, sums, write, starts, waste
                )
    finish_stores()


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
def _pack_planes(
    plan, task, outer_origins, inner_origins, image_rows, places, read, starts, planes
):
    """Copies what a task reads into its planes, zeros where there is no input."""
    channels = (task.group_end - task.group_begin) * plan.group_channels
    zeros = np.zeros(plan.lanes, read.dtype)
    inner = plan.inner
    used = (plan.band + plan.outer.reach) * plan.pitch
    # No tap reaches the cells after the last row, but the search for Inf does.
    for plane in range(plan.outer.subs * inner.subs):
        _clear(plan, planes, plane * plan.plane_cells, channels, used, plan.plane_cells)
    for outer_sub in range(plan.outer.subs):
        for row in range(plan.band + plan.outer.reach):
            _input_starts(plan, task, outer_origins, image_rows, outer_sub, row, starts)
            for sub in range(inner.subs):
                # Column j of this plane is input `start + pace * j`.
                pace = inner.step * inner.stride
                start = inner_origins[task.inner_phase] + inner.step * sub
                start += pace * task.column
                low = min(plan.pitch, max(0, -(start // pace)))
                high = max(low, min(plan.pitch, (inner.inputs - 1 - start) // pace + 1))
                at = (outer_sub * inner.subs + sub) * plan.plane_cells
                at += row * plan.pitch
                _clear(plan, planes, at, channels, 0, low)
                _clear(plan, planes, at, channels, high, plan.pitch)
                if not plan.run:
                    _pack_row(
                        plan, read, starts, zeros, start * inner.read_stride,
                        pace * inner.read_stride, planes, at, channels, low, high,
                        places,
                    )  # fmt: skip
                elif sub == 0:
                    low = max(0, -start)
                    high = min(plan.pitch * inner.stride, inner.inputs - start)
                    _pack_run(
                        plan, read, starts, zeros, start * channels, planes, at,
                        places, low * channels, high * channels,
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
            start = min(place * outer.read_stride, outer.read_last)
            starts[lane] = image * plan.read_image + start + first_channel


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
            start = min(place * outer.write_stride, outer.write_last)
            starts[lane] = image * plan.write_image + start
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
def _pack_row(
    plan, read, starts, zeros, shift, pace, planes, at, channels, low, high, places
):
    """Packs the columns from `low` to `high` of one row of each channel.

    Column j of lane l is `read[starts[l] + shift + pace * j]`, a channel further on
    `plan.read_channel` later.
    """
    if plan.read_channel == 1:
        for column in range(low, high):
            _pack_run(
                plan, read, starts, zeros, shift + pace * column, planes, at + column,
                places, 0, channels,
            )  # fmt: skip
    elif pace == 1:
        for channel in range(channels):
            _pack_run(
                plan, read, starts, zeros, shift + channel * plan.read_channel, planes,
                at + channel * plan.channel_cells, places, low, high,
            )  # fmt: skip
    else:
        for channel in range(channels):
            for column in range(low, high):
                _pack_run(
                    plan, read, starts, zeros,
                    shift + channel * plan.read_channel + pace * column, planes,
                    at + channel * plan.channel_cells + column, places, 0, 1,
                )  # fmt: skip


@_inner
def _pack_run(plan, read, starts, zeros, shift, planes, at, places, begin, end):
    """Packs the numbers `begin` to `end` of a run of memory of each lane.

    Number i, `read[starts[l] + shift + i]`, goes to the cell `at + places[i]`.
    """
    for square in range(begin, end, plan.lanes):
        # The last square overlaps the one before it, if there is one.
        first = max(begin, min(square, end - plan.lanes))
        gather_square(
            read, starts, shift + first, end - first, zeros, planes, at, places, first
        )


@_inner
def _write_tile(plan, task, column, size, first, outputs, sums, write, starts, waste):
    """Writes the finished sums of one tile, to the rows that begin at `starts`."""
    stride = plan.inner.write_stride
    pace = plan.inner.phases * stride
    place = task.inner_phase * stride + pace * (task.column + column)
    place += first * plan.write_channel
    if plan.write_channel == 1:
        # The outputs of one pixel are neighbours, and maybe those of all pixels.
        whole = outputs == pace
        runs, length = (1, size * outputs) if whole else (size, outputs)
        for run in range(runs):
            _write_run(
                plan, sums, run * outputs, 1, length, write, starts, place + run * pace,
                1, waste,
            )  # fmt: skip
        return
    for output in range(outputs):
        _write_run(
            plan, sums, output, outputs, size, write, starts,
            place + output * plan.write_channel, pace, waste,
        )  # fmt: skip


@_inner
def _write_run(plan, sums, at, step, length, write, starts, place, pace, waste):
    """Writes `length` cells, each `step` after the other, to places `pace` apart."""
    if pace == 1:
        for square in range(0, length, plan.lanes):
            # The last square overlaps the one before it, if there is one.
            first = max(0, min(square, length - plan.lanes))
            scatter_square(
                sums, at + first * step, step, length - first, write, starts,
                place + first, waste, plan.streaming != 0,
            )  # fmt: skip
        return
    for i in range(length):
        cell = (at + i * step) * plan.lanes
        for lane in range(plan.lanes):
            if starts[lane] >= 0:
                write[starts[lane] + place + i * pace] = sums[cell + lane]


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


@_entry
def _wgrad_task(
    record, slot, slots, outer_origins, inner_origins, image_rows, places,
    gradient_places, offsets, splits, longest, read, gradient, totals, cells,
    digest=_DIGEST,
):  # fmt: skip
    plan = record[0]
    for number in range(slot * plan.tasks // slots, (slot + 1) * plan.tasks // slots):
        task = _decode(plan, number)
        channels = (task.group_end - task.group_begin) * plan.group_channels
        # The first cell takes what belongs nowhere.
        end = (1 + channels * plan.channel_cells) * plan.lanes
        planes = cells[plan.lanes : end]
        starts = np.empty(plan.lanes, np.int64)
        _pack_planes(
            plan, task, outer_origins, inner_origins, image_rows, places, read, starts,
            planes,
        )  # fmt: skip
        _correlate_task(
            plan, task, image_rows[task.outer_phase], planes, gradient,
            gradient_places, offsets, splits, longest, totals, cells[end:],
        )  # fmt: skip


@_inner
def _correlate_task(
    plan, task, rows, planes, gradient, gradient_places, offsets, splits, longest,
    totals, cells,
):  # fmt: skip
    """Adds the gradients of one task's outputs to `totals`."""
    finite = _all_finite(planes)
    starts = np.empty(plan.lanes, np.int64)
    size = plan.output_block * plan.band * plan.strip * plan.lanes
    # The cell before the gradients takes what belongs nowhere.
    gradients, sums = cells[plan.lanes : plan.lanes + size], cells[plan.lanes + size :]
    for first in range(task.output_begin, task.output_end, plan.output_block):
        outputs = min(plan.output_block, task.output_end - first)
        _pack_gradient(
            plan, task, rows, gradient, first, outputs, gradient_places, starts,
            gradients,
        )  # fmt: skip
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
def _pack_gradient(plan, task, rows, gradient, first, outputs, places, starts, cells):
    """Packs the output's gradient for some channels, zeros where there is no output."""
    zeros = np.zeros(plan.lanes, gradient.dtype)
    step = plan.band * plan.strip
    stride = plan.inner.write_stride
    pace = plan.inner.phases * stride
    shift = task.inner_phase * stride + pace * task.column
    shift += first * plan.write_channel
    for row in range(plan.band):
        _output_starts(plan, task, rows, row, starts)
        at = row * plan.strip
        if plan.write_channel == 1:
            for column in range(task.columns):
                _pack_run(
                    plan, gradient, starts, zeros, shift + pace * column, cells,
                    at + column, places, 0, outputs,
                )  # fmt: skip
            continue
        for output in range(outputs):
            place = shift + output * plan.write_channel
            if pace == 1:
                _pack_run(
                    plan, gradient, starts, zeros, place, cells, at + output * step,
                    places, 0, task.columns,
                )  # fmt: skip
                continue
            for column in range(task.columns):
                _pack_run(
                    plan, gradient, starts, zeros, place + pace * column, cells,
                    at + output * step + column, places, 0, 1,
                )  # fmt: skip


@_inner
def _correlate_outputs(
    plan, task, planes, gradients, first, outputs, offsets, splits, sums, longest
):
    """Adds to each entry's cell of `sums`, tile after tile."""
    tiles = -(-task.columns // plan.tile)
    for part in range(tiles * plan.band):
        row, tile = divmod(part, tiles)
        column = tile * task.columns // tiles
        size = (tile + 1) * task.columns // tiles - column
        for block in range(plan.blocks):
            for output in range(outputs):
                begin = splits[first + output, block]
                end = splits[first + output, block + 1]
                if begin == end:
                    continue
                cell = (output * plan.band + row) * plan.strip + column
                total = output * longest + begin - splits[first + output, 0]
                add_correlations(
                    planes, row * plan.pitch + column, offsets, begin, end, gradients,
                    cell, sums[total * plan.lanes :], size,
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
