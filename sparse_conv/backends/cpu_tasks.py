"""The loops of the CPU back end, for Numba to compile: one task of a job at a time.

Each task copies its part of the input into planes of aligned cells (see `cpu_plan`),
walks the sparse rows for one tile of columns after the other with all of a tile's sums
in registers, and writes the tile back in the caller's layout, with bias and activation.

A task is given the address of its job, its number, and the address of scratch memory.
The words of a job are those of `GatherJob` and `WgradJob`, after the first
`JOB_HEADER`, which belong to the threads. Nothing is allocated here, nothing raises,
and no library but C's is called: the code has to run without Numba.

Only `cpu_code` imports this module, when it has to compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.core import extending, types
from numba.core.compiler_lock import global_compiler_lock
from numba.np import arrayobj

from sparse_conv.backends.cpu_code import ROUTINES, Object, Widths
from sparse_conv.backends.cpu_jobs import HEAD_CELLS, JOB_HEADER, GatherJob, WgradJob
from sparse_conv.backends.cpu_plan import PLAN_DTYPE
from sparse_conv.backends.cpu_vectors import (
    LANE_BLOCKS,
    TILE_CELLS,
    VECTOR_BYTES,
    add_correlations,
    add_lanes,
    compile_routines,
    finish_stores,
    gather_square,
    lanes,
    run_code,
    scatter_square,
    sum_products,
    symbols,
    write_squares,
)

# Called by compiled code alone, without Numba's wrappers and memory manager.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "no_rewrites": True,
    "_nrt": False,
}
_inner = njit(**_OPTIONS)

_WORDS = JOB_HEADER + max(len(GatherJob._fields), len(WgradJob._fields))
_HUGE = 2**40


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


@extending.intrinsic
def _array(typingctx, address, length, dtype):
    """The numbers at an address (int64) as an array."""
    array_type = types.Array(dtype.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        array = context.make_array(array_type)(context, builder)
        itemsize = context.get_constant(
            types.intp, context.get_abi_sizeof(context.get_data_type(array_type.dtype))
        )
        arrayobj.populate_array(
            array,
            data=builder.inttoptr(args[0], array.data.type),
            shape=[args[1]],
            strides=[itemsize],
            itemsize=itemsize,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(types.int64, types.int64, dtype), codegen


def _job_words(kind: type[NamedTuple]) -> Any:
    """Where the words of a job are, by name; a constant of compiled code."""
    return kind(*range(JOB_HEADER, JOB_HEADER + len(kind._fields)))


_GATHER = _job_words(GatherJob)
_WGRAD = _job_words(WgradJob)


def _gather_task(dtype: np.dtype, sum_task: Any) -> Callable[[int, int, int], None]:
    """A task of a Gather; `sum_task` is `_sum_by_loops` or `_sum_by_code`."""
    lane_count = lanes(dtype.itemsize)

    def task(job, number, scratch):
        words = _array(job, _WORDS, np.int64)
        plan = _array(words[_GATHER.record], 1, PLAN_DTYPE)[0]
        outer_origins = _array(words[_GATHER.outer_origins], _HUGE, np.int64)
        inner_origins = _array(words[_GATHER.inner_origins], _HUGE, np.int64)
        image_rows = _array(words[_GATHER.image_rows], _HUGE, np.int64)
        places = _array(words[_GATHER.places], _HUGE, np.int32)
        offsets = _array(words[_GATHER.offsets], _HUGE, np.int32)
        splits = _array(words[_GATHER.splits], _HUGE, np.int32)
        lengths = _array(words[_GATHER.lengths], _HUGE, np.int32)
        codes = _array(words[_GATHER.codes], _HUGE, np.int64)
        values = _array(words[_GATHER.values], _HUGE, dtype)
        read = _array(words[_GATHER.read], _HUGE, dtype)
        write = _array(words[_GATHER.write], _HUGE, dtype)
        bias = _array(words[_GATHER.bias], _HUGE, dtype)
        head = _array(scratch, HEAD_CELLS * lane_count, dtype)
        starts = _array(scratch + 2 * VECTOR_BYTES, 2 * lane_count, np.int64)
        planes = _array(scratch + HEAD_CELLS * VECTOR_BYTES, _HUGE, dtype)
        _zero(head[:lane_count])
        # Only aligned vectors can pass the caches by.
        aligned = words[_GATHER.write] % VECTOR_BYTES == 0
        task = _decode(plan, number)
        channels = (task.group_end - task.group_begin) * plan.group_channels
        _pack_planes(
            plan, task, outer_origins, inner_origins, image_rows, places, read, starts,
            head, planes,
        )  # fmt: skip
        sum_task(
            plan, task, image_rows[task.outer_phase], planes,
            (offsets, splits, lengths, codes), values,
            planes[channels * plan.channel_cells * plan.lanes :], bias,
            words[_GATHER.activation], write, aligned and plan.streaming != 0, starts,
            head[plan.lanes :],
        )  # fmt: skip
        finish_stores()

    return task


def _wgrad_task(dtype: np.dtype) -> Callable[[int, int, int], None]:
    lane_count = lanes(dtype.itemsize)

    def task(job, slot, scratch):
        words = _array(job, _WORDS, np.int64)
        plan = _array(words[_WGRAD.record], 1, PLAN_DTYPE)[0]
        outer_origins = _array(words[_WGRAD.outer_origins], _HUGE, np.int64)
        inner_origins = _array(words[_WGRAD.inner_origins], _HUGE, np.int64)
        image_rows = _array(words[_WGRAD.image_rows], _HUGE, np.int64)
        places = _array(words[_WGRAD.places], _HUGE, np.int32)
        gradient_places = _array(words[_WGRAD.gradient_places], _HUGE, np.int32)
        offsets = _array(words[_WGRAD.offsets], _HUGE, np.int32)
        splits = _array(words[_WGRAD.splits], _HUGE, np.int32)
        read = _array(words[_WGRAD.read], _HUGE, dtype)
        gradient = _array(words[_WGRAD.gradient], _HUGE, dtype)
        partial = _array(words[_WGRAD.partial], _HUGE, dtype)
        totals = partial[slot * words[_WGRAD.entries] :]
        head = _array(scratch, HEAD_CELLS * lane_count, dtype)
        starts = _array(scratch + 2 * VECTOR_BYTES, lane_count, np.int64)
        cells = _array(scratch + HEAD_CELLS * VECTOR_BYTES, _HUGE, dtype)
        _zero(head[:lane_count])
        slots = words[_WGRAD.slots]
        for number in range(
            slot * plan.tasks // slots, (slot + 1) * plan.tasks // slots
        ):
            task = _decode(plan, number)
            channels = (task.group_end - task.group_begin) * plan.group_channels
            _pack_planes(
                plan, task, outer_origins, inner_origins, image_rows, places, read,
                starts, head, cells,
            )  # fmt: skip
            size = channels * plan.channel_cells * plan.lanes
            _correlate_task(
                plan, task, image_rows[task.outer_phase], cells[:size], gradient,
                gradient_places, offsets, splits, words[_WGRAD.longest], totals,
                cells[size:], starts, head,
            )  # fmt: skip

    return task


FUNCTIONS: dict[str, Callable[[np.dtype], Callable[[int, int, int], None]]] = {
    "gather": lambda dtype: _gather_task(dtype, _sum_by_loops),
    "code": lambda dtype: _gather_task(dtype, _sum_by_code),
    "wgrad": _wgrad_task,
}


def compile_function(name: str, dtype: str) -> Object:
    """Compiles one of FUNCTIONS, or the routines that they call.

    Args:
        name: Which one, or `ROUTINES`, which has to be loaded before the others.
        dtype: What it computes with, as NumPy names it.

    Returns:
        Its object code. The function takes three integers after the two pointers that
        Numba's functions begin with.
    """
    widths = Widths(VECTOR_BYTES, TILE_CELLS)
    if name == ROUTINES:
        return Object(symbols(dtype), widths, compile_routines(dtype))
    function = FUNCTIONS[name](np.dtype(dtype))
    word = types.int64
    dispatcher = njit(types.void(word, word, word), **_OPTIONS)(function)
    (compiled,) = dispatcher.overloads.values()
    symbol = compiled.fndesc.llvm_func_name
    with global_compiler_lock:
        compiled.library.get_pointer_to_function(symbol)
    code = compiled.library._get_compiled_object()
    return Object((symbol,), widths, bytes(code))


@_inner
def _sum_by_loops(
    plan, task, rows, planes, entries, values, sums, bias, activation, write, streaming,
    starts, waste,
):  # fmt: skip
    """Computes a task's outputs, and writes each tile at once."""
    offsets, splits, lengths, _ = entries
    tiles = -(-task.columns // plan.tile)
    for row in range(plan.band):
        if not _output_starts(plan, task, rows, row, starts):
            continue
        for tile in range(tiles):
            column = tile * task.columns // tiles
            size = (tile + 1) * task.columns // tiles - column
            for first in range(task.output_begin, task.output_end, plan.output_block):
                outputs = min(plan.output_block, task.output_end - first)
                for block in range(plan.blocks):
                    sum_products(
                        planes, row * plan.pitch + column, offsets, values, splits,
                        lengths, task.row_base + first, outputs, block, plan.blocks,
                        sums, size, bias, first, block == 0,
                    )  # fmt: skip
                if activation:
                    _activate(sums[: outputs * size * plan.lanes], activation)
                if _in_squares(plan, outputs):
                    for part in range(LANE_BLOCKS):
                        _write_part(
                            plan, part, outputs, size, sums, write, starts,
                            _place(plan, task, column, first), waste, streaming,
                        )  # fmt: skip
                else:
                    _write_tile(
                        plan, task, column, size, first, outputs, sums, write, starts,
                        waste,
                    )  # fmt: skip


@_inner
def _sum_by_code(
    plan, task, rows, planes, entries, values, sums, bias, activation, write, streaming,
    starts, waste,
):  # fmt: skip
    """The same by generated code, with each tile written while the next is computed.

    Memory takes longer for all of a tile at once than for some of its lanes after each
    call of the code.
    """
    _, _, _, codes = entries
    tiles = -(-task.columns // plan.tile)
    # Of the tile that waits to be written, if there is one: its outputs, columns and
    # place, and where its sums and the starts of its rows are.
    outputs, size, place, held, held_starts = 0, 0, 0, 0, 0
    for row in range(plan.band):
        new_starts = plan.lanes - held_starts
        if not _output_starts(plan, task, rows, row, starts[new_starts:]):
            continue
        for tile in range(tiles):
            column = tile * task.columns // tiles
            new_size = (tile + 1) * task.columns // tiles - column
            for first in range(task.output_begin, task.output_end, plan.output_block):
                new = plan.output_block * plan.tile * plan.lanes - held
                for part in range(LANE_BLOCKS):
                    code = codes[LANE_BLOCKS * (task.row_base + first) + part]
                    if code != 0:
                        run_code(
                            code, planes, row * plan.pitch + column, values, sums[new:],
                            new_size, bias,
                        )  # fmt: skip
                    if outputs != 0:
                        _write_part(
                            plan, part, outputs, size, sums[held:], write,
                            starts[held_starts:], place, waste, streaming,
                        )  # fmt: skip
                outputs = min(plan.output_block, task.output_end - first)
                size, held, held_starts = new_size, new, new_starts
                place = _place(plan, task, column, first)
                if activation:
                    _activate(sums[held:][: outputs * size * plan.lanes], activation)
                if not _in_squares(plan, outputs):
                    _write_tile(
                        plan, task, column, size, first, outputs, sums[held:], write,
                        starts[held_starts:], waste,
                    )  # fmt: skip
                    outputs = 0
    if outputs != 0:
        for part in range(LANE_BLOCKS):
            _write_part(
                plan, part, outputs, size, sums[held:], write, starts[held_starts:],
                place, waste, streaming,
            )  # fmt: skip


@_inner
def _in_squares(plan, outputs):
    """Whether the outputs of a pixel are whole vectors, one after the other."""
    return plan.write_channel == 1 and outputs % plan.lanes == 0


@_inner
def _place(plan, task, column, first):
    """Where output `first` of a column is, from where its row starts."""
    column = task.inner_phase + plan.inner.phases * (task.column + column)
    return column * plan.inner.write_stride + first * plan.write_channel


@_inner
def _write_part(
    plan, part, outputs, columns, sums, write, starts, place, waste, streaming
):
    """Writes some lanes of a tile whose outputs are in squares."""
    run = outputs // plan.lanes
    pace = plan.inner.phases * plan.inner.write_stride
    write_squares(
        sums, columns * run, run, pace, write, starts, place, waste, streaming, part
    )


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
    plan,
    task,
    outer_origins,
    inner_origins,
    image_rows,
    places,
    read,
    starts,
    zeros,
    planes,
):
    """Copies what a task reads into its planes, zeros where there is no input."""
    channels = (task.group_end - task.group_begin) * plan.group_channels
    inner = plan.inner
    used = (plan.band + plan.outer.reach) * plan.pitch
    rest = plan.plane_cells - used
    # No tap reaches the cells after the last row, but the search for Inf does.
    for plane in range(plan.outer.subs * inner.subs):
        _clear(
            plan, planes, plane * plan.plane_cells + used, channels, rest, rest, rest
        )
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
                _clear(plan, planes, at, channels, low, high, plan.pitch)
                place = start * inner.read_stride
                column_pace = pace * inner.read_stride
                begin, end = 0, channels
                channel_runs, columns = 1, high - low
                if plan.run:
                    # All planes of a row are packed with the first one.
                    begin = max(0, -start) * channels
                    end = min(plan.pitch * inner.stride, inner.inputs - start)
                    end *= channels
                    columns = 1 if sub == 0 else 0
                    low = 0
                elif plan.read_channel != 1:
                    channel_runs, end = channels, 1
                    if column_pace == 1:
                        begin, end, columns = low, high, 1
                        low = 0
                _pack_runs(
                    plan, read, starts, zeros, place + low * column_pace, planes,
                    at + low, places, begin, end, channel_runs, plan.read_channel,
                    plan.channel_cells, columns, column_pace, 1,
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
def _clear(plan, planes, at, channels, low, high, end):
    """Zeros the cells up to `low` and from `high` to `end` of each channel."""
    for channel in range(channels):
        cell = channel * plan.channel_cells + at
        for i in range(cell * plan.lanes, (cell + low) * plan.lanes):
            planes[i] = 0
        for i in range((cell + high) * plan.lanes, (cell + end) * plan.lanes):
            planes[i] = 0


@_inner
def _pack_runs(
    plan, read, starts, zeros, shift, planes, at, places, begin, end, channels,
    channel_pace, channel_step, columns, column_pace, column_step,
):  # fmt: skip
    """Packs the numbers `begin` to `end` of some runs of memory of each lane.

    Number i of a run, `read[starts[l] + shift + i]`, goes to the cell `at + places[i]`.
    A channel further on, a run begins `channel_pace` later, and its cells begin
    `channel_step` later; the same for columns.
    """
    for run in range(channels * columns):
        channel = run // columns
        column = run - channel * columns
        place = shift + channel * channel_pace + column * column_pace
        cell = at + channel * channel_step + column * column_step
        for square in range(begin, end, plan.lanes):
            # The last square overlaps the one before it, if there is one.
            first = end - plan.lanes if square > end - plan.lanes else square
            first = begin if first < begin else first
            gather_square(
                read, starts, place + first, end - first, zeros, planes, cell, places,
                first,
            )  # fmt: skip


@_inner
def _write_tile(plan, task, column, size, first, outputs, sums, write, starts, waste):
    """Writes the finished sums of one tile, to the rows that begin at `starts`.

    They are written in runs of memory: of the outputs of a pixel, and maybe those of
    all pixels (NHWC), or of the columns of an output (NCHW).
    """
    pace = plan.inner.phases * plan.inner.write_stride
    origin = _place(plan, task, column, first)
    runs, length, step, run_pace, run_step = size, outputs, 1, pace, outputs
    if plan.write_channel != 1:
        runs, length, step, run_pace, run_step = outputs, size, outputs, 1, 1
        run_pace = plan.write_channel
        if pace != 1:
            _scatter(
                plan, outputs, size, sums, write, starts, origin, plan.write_channel,
                pace,
            )  # fmt: skip
            return
    elif outputs == pace:
        runs, length = 1, size * outputs
    for run in range(runs):
        at = run * run_step
        place = origin + run * run_pace
        for square in range(0, length, plan.lanes):
            # The last square overlaps the one before it, if there is one.
            i = length - plan.lanes if square > length - plan.lanes else square
            i = 0 if i < 0 else i
            scatter_square(
                sums, at + i * step, step, length - i, write, starts, place + i, waste,
            )  # fmt: skip


@_inner
def _scatter(plan, outputs, size, sums, write, starts, origin, channel_pace, pace):
    """Writes sums of which no two are neighbours in memory."""
    for cell in range(outputs * size):
        column = cell // outputs
        place = origin + (cell - column * outputs) * channel_pace + column * pace
        for lane in range(plan.lanes):
            if starts[lane] >= 0:
                write[starts[lane] + place] = sums[cell * plan.lanes + lane]


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
def _correlate_task(
    plan, task, rows, planes, gradient, gradient_places, offsets, splits, longest,
    totals, cells, starts, zeros,
):  # fmt: skip
    """Adds the gradients of one task's outputs to `totals`."""
    finite = _all_finite(planes)
    size = plan.output_block * plan.band * plan.strip * plan.lanes
    # The cell before the gradients takes what belongs nowhere.
    gradients, sums = cells[plan.lanes : plan.lanes + size], cells[plan.lanes + size :]
    for first in range(task.output_begin, task.output_end, plan.output_block):
        outputs = min(plan.output_block, task.output_end - first)
        _pack_gradient(
            plan, task, rows, gradient, first, outputs, gradient_places, starts, zeros,
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
def _bounds(plan, splits, row, block, end_block):
    """The first entry of a block of a sparse row, and that of another block."""
    place = row * (plan.blocks + 1)
    return splits[place + block], splits[place + end_block]


@_inner
def _add_lanes(plan, first, outputs, splits, longest, sums, totals):
    """Adds the lanes of each entry's cell to its total."""
    for output in range(outputs):
        begin, end = _bounds(plan, splits, first + output, 0, plan.blocks)
        for i in range(begin, end, plan.lanes):
            add_lanes(sums, output * longest + i - begin, end - i, totals, i)


@_inner
def _all_finite(numbers):
    odd = False
    for i in range(len(numbers)):
        odd |= numbers[i] - numbers[i] != 0
    return not odd


@_inner
def _pack_gradient(
    plan, task, rows, gradient, first, outputs, places, starts, zeros, cells
):
    """Packs the output's gradient for some channels, zeros where there is no output."""
    step = plan.band * plan.strip
    stride = plan.inner.write_stride
    pace = plan.inner.phases * stride
    shift = task.inner_phase * stride + pace * task.column
    shift += first * plan.write_channel
    for row in range(plan.band):
        _output_starts(plan, task, rows, row, starts)
        channels, columns, end = 1, task.columns, outputs
        if plan.write_channel != 1:
            channels, end = outputs, 1
            if pace == 1:
                columns, end = 1, task.columns
        _pack_runs(
            plan, gradient, starts, zeros, shift, cells, row * plan.strip, places, 0,
            end, channels, plan.write_channel, step, columns, pace, 1,
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
                begin, end = _bounds(plan, splits, first + output, block, block + 1)
                if begin == end:
                    continue
                cell = (output * plan.band + row) * plan.strip + column
                row_begin = splits[(first + output) * (plan.blocks + 1)]
                total = output * longest + begin - row_begin
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
            begin, end = _bounds(plan, splits, first + output, 0, plan.blocks)
            for i in range(begin, end):
                total = totals[i]
                source = (offsets[i] + row * plan.pitch) * plan.lanes
                for place in range(task.columns * plan.lanes):
                    if starts[place % plan.lanes] >= 0:
                        total += planes[source + place] * gradients[at + place]
                totals[i] = total
