"""How the CPU loops cut a Gather into tasks that fit a core's cache.

Pure arithmetic on sizes. Knows the layout that the loops work in; does not know how
they compute, nor any array but its own tables.

One spatial axis, the outer one, is cut into lanes. The images lie below each other
along it, in one stack of rows; neighbours share the rows of zeros between them. A chunk
of the stack is `lanes * band` rows long, and lane l holds the rows from `l * band` on.
The cell at (row, column) of a plane thus holds `lanes` numbers, one from each lane's
part of the stack, and a tap moves every lane by the same number of cells: each read is
aligned, however short the rows of an image are. Along the inner axis a task covers one
strip of columns.

A stride splits an axis into as many planes ("subs"), so that within a plane the reads
of neighbouring outputs are neighbours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sparse_conv.backends.cpu_jobs import HEAD_CELLS
from sparse_conv.backends.cpu_tiles import (
    Job,
    Tile,
    candidates,
    choose_tile,
    exceeds_caches,
    is_pointwise,
    outputs_together,
    tile_of,
)
from sparse_conv.gather import Axis, Gather

# Tasks whose planes exceed all of these sizes are slower by this.
_LARGE_PLANES = 2.0
# Sums of the partial results of a wgrad, in bytes at most, and their number.
PARTIAL_BYTES = 64 * 2**20
MAX_SLOTS = 32
# Below this many cycles in all, handing a task to another thread takes longer.
INLINE_CYCLES = 100_000


class Side(NamedTuple):
    """One spatial axis as the loops see it; the names mostly as in `gather.Axis`.

    No row of the outer axis begins beyond `read_last` and `write_last`: where rows are
    pieces of something longer, the last one may overlap the one before it.
    """

    inputs: int
    outputs: int
    phases: int
    visited: int
    step: int
    stride: int
    subs: int
    reach: int
    row_sets: int
    set_factor: int
    read_stride: int
    write_stride: int
    read_last: int
    write_last: int


class Plan(NamedTuple):
    """The numbers that the loops need, all of them integers.

    Sizes are in cells or elements, `*_stride` and the like in elements of the arrays.

    Attributes:
        outer: The axis that is cut into lanes. `inner` is the other one.
        images: Batch size.
        lanes: Numbers in a cell.
        groups: Channel groups. A task takes `group_block` of them.
        group_channels: Channels read in one group; `group_outputs` are written.
        band: Rows of each lane; `strip` is the number of columns of a task.
        pitch: Cells from one row of a plane to the next.
        plane_cells: Cells from one plane to the next.
        channel_cells: Cells from one channel to the next.
        block_length: Indices in one block of channels; `blocks` blocks in a row.
        tile: Columns that are summed together, at most.
        output_block: Output channels that are summed, and written, together.
        run: Whether all that a row of planes holds is read in one run of memory;
            else it is read in one run for each column (NHWC) or channel (NCHW).
        streaming: Whether outputs are written past the caches, if they are aligned.
        output_parts: Tasks that share the outputs of the same planes.
        tasks: Number of tasks.
    """

    outer: Side
    inner: Side
    images: int
    lanes: int
    groups: int
    group_channels: int
    group_outputs: int
    read_image: int
    read_channel: int
    write_image: int
    write_channel: int
    band: int
    strip: int
    pitch: int
    plane_cells: int
    channel_cells: int
    group_block: int
    group_blocks: int
    block_length: int
    blocks: int
    tile: int
    output_block: int
    run: int
    streaming: int
    output_parts: int
    chunks: int
    strips: int
    tasks: int


_SIDE_DTYPE = np.dtype([(name, np.int64) for name in Side._fields])
PLAN_DTYPE = np.dtype(
    [("outer", _SIDE_DTYPE), ("inner", _SIDE_DTYPE)]
    + [(name, np.int64) for name in Plan._fields[2:]]
)


@dataclass(frozen=True, eq=False)
class PlanTables:
    """A Plan and the arrays that go with it.

    Attributes:
        plan: The numbers.
        record: (1,), the same as a structure; it enters compiled code faster.
        outer_origins: (outer.visited,) int64; `inner_origins` (inner.visited,).
        image_rows: (outer.visited,) int64, rows from one image of the stack to the
            next.
        places: int32, where in the planes the numbers of a run of memory go, in cells.
        gradient_places: int32, the same for the packed gradient of a wgrad.
        offsets: (row_length,) int32, the cells by which each index moves a read.
        threads: Threads that are worth using.
        slots: Partial results of a wgrad.
        gather_bytes: Scratch memory of a thread that works on a Gather.
    """

    plan: Plan
    record: np.ndarray
    outer_origins: np.ndarray
    inner_origins: np.ndarray
    image_rows: np.ndarray
    places: np.ndarray
    gradient_places: np.ndarray
    offsets: np.ndarray
    threads: int
    slots: int
    gather_bytes: int


class _View(NamedTuple):
    """One way to take a Gather's pixels for rows and columns.

    Attributes:
        outer: The axis that is cut into lanes; `inner` is the other one.
        outer_side: The same as the loops see it; so is `inner_side`.
        swapped: Whether the outer axis is the width.
        images: Images that are stacked along the outer axis.
    """

    outer: Axis
    inner: Axis
    outer_side: Side
    inner_side: Side
    swapped: bool
    images: int


class _Cut(NamedTuple):
    """One way to cut a Gather, and its estimated time."""

    cycles: float
    total_cycles: float
    view: _View
    band: int
    strip: int
    output_parts: int
    chunks: int
    strips: int
    tasks: int


@functools.lru_cache(maxsize=1024)
def make_plan(job: Job) -> PlanTables:
    """Chooses the cut with the shortest estimated time.

    Args:
        job: What to plan.

    Returns:
        The plan with its tables.

    Raises:
        NotImplementedError: The planes of one tile would have 2^31 cells or more.
    """
    gather = job.gather
    tile = choose_tile(job)
    cut = min(_cuts(job, tile), key=lambda cut: cut[:2])
    plan = _finish(job, cut, tile)
    planes = plan.group_block * plan.group_channels * plan.channel_cells
    # Code names places in bytes.
    unit = job.lanes * job.itemsize if job.code else 1
    if planes * unit >= 2**31:
        raise NotImplementedError(
            "The CPU back end needs scratch memory of less than 2^31 "
            f"{'bytes for generated code' if job.code else 'cells'}. "
            f"Received: {gather}"
        )
    # By generated code one tile is computed while another waits. Where a run of sums is
    # short, a vector more is read.
    tiles = 2 if job.code else 1
    cells = HEAD_CELLS + planes + (tiles * plan.output_block + job.lanes) * plan.tile
    outer, inner = cut.view.outer, cut.view.inner
    partial_bytes = max(1, job.itemsize * gather.out_channels * gather.row_length)
    return PlanTables(
        plan,
        np.array([(tuple(plan.outer), tuple(plan.inner), *plan[2:])], PLAN_DTYPE),
        np.array(outer.origins, np.int64),
        np.array(inner.origins, np.int64),
        _image_rows(outer),
        _places(plan),
        _gradient_places(plan),
        _offsets(plan, gather, cut.view.swapped),
        1 if cut.total_cycles < INLINE_CYCLES else job.threads,
        max(1, min(plan.tasks, MAX_SLOTS, PARTIAL_BYTES // partial_bytes)),
        cells * job.lanes * job.itemsize,
    )


def _views(job: Job) -> Iterator[_View]:
    """The ways to look at a Gather: as it is, transposed, or all pixels in a row."""
    gather = job.gather
    nhwc = gather.data_format == "NHWC"
    read_pixel, write_pixel = (
        (gather.in_channels, gather.out_channels) if nhwc else (1, 1)
    )
    h, w = gather.h, gather.w
    h_side = _side(h, w.row_sets, w.inputs * read_pixel, w.outputs * write_pixel)
    w_side = _side(w, 1, read_pixel, write_pixel)
    yield _View(h, w, h_side, w_side, False, gather.n)
    yield _View(w, h, w_side, h_side, True, gather.n)
    if job.wgrad or not (is_pointwise(h) and is_pointwise(w)):
        return
    pixels = h.inputs * w.inputs * (gather.n if nhwc else 1)
    for width in candidates(-(-pixels // job.lanes)):
        rows = -(-pixels // width)
        outer = replace(h, inputs=rows, outputs=rows)
        inner = replace(w, inputs=width, outputs=width)
        last = pixels - width
        outer_side = _side(outer, 1, width * read_pixel, width * write_pixel)._replace(
            read_last=last * read_pixel, write_last=last * write_pixel
        )
        inner_side = _side(inner, 1, read_pixel, write_pixel)
        images = 1 if nhwc else gather.n
        yield _View(outer, inner, outer_side, inner_side, False, images)


def _side(axis: Axis, set_factor: int, read_stride: int, write_stride: int) -> Side:
    return Side(
        inputs=axis.inputs,
        outputs=axis.outputs,
        phases=axis.phases,
        visited=len(axis.origins),
        step=axis.step,
        stride=axis.stride,
        subs=min(axis.stride, axis.taps),
        reach=(axis.taps - 1) // axis.stride,
        row_sets=axis.row_sets,
        set_factor=set_factor,
        read_stride=read_stride,
        write_stride=write_stride,
        read_last=axis.inputs * read_stride,
        write_last=axis.outputs * write_stride,
    )


def _image_rows(axis: Axis) -> np.ndarray:
    """For each phase: rows of the stack from one image to the next.

    Positions `u` of an image and `u - rows` of the next one are the same row, so at
    least one of them must lie in the padding, wherever both are read.
    """
    reach = (axis.taps - 1) // axis.stride
    subs = min(axis.stride, axis.taps)
    rows = []
    for phase, origin in enumerate(axis.origins):
        outputs = max(0, -((phase - axis.outputs) // axis.phases))
        needed = outputs + reach
        first, last = needed, 0
        for sub in range(subs):
            start = origin + axis.step * sub
            pace = axis.step * axis.stride
            low = max(0, -(start // pace))
            high = (axis.inputs - 1 - start) // pace + 1
            if low < high:
                first, last = min(first, low), max(last, high)
        rows.append(max(1, outputs, min(last, needed), needed - first))
    return np.array(rows, np.int64)


def _group_block(gather: Gather, lanes: int) -> int:
    """Groups that a task takes: enough to fill the vectors of the transpositions."""
    smallest = max(1, min(gather.in_channels, gather.out_channels) // gather.groups)
    return min(gather.groups, -(-2 * lanes // smallest))


def _plane_cells(cells: int) -> int:
    """Rounded up to 2 modulo 4, so that planes don't all meet in one cache set."""
    return cells + (2 - cells) % 4


def _cuts(job: Job, tile: Tile) -> Iterator[_Cut]:
    for view in _views(job):
        outer, inner = view.outer, view.inner
        stack = (view.images - 1) * int(_image_rows(outer).max())
        stack += -(-outer.outputs // outer.phases)
        columns = -(-inner.outputs // inner.phases)
        for tiles in candidates(-(-columns // tile.columns)):
            strip = min(columns, tiles * tile.columns)
            for band in candidates(-(-stack // job.lanes)):
                chunks, strips = -(-stack // (job.lanes * band)), -(-columns // strip)
                yield from _parts(job, tile, view, band, strip, chunks, strips)


def _parts(
    job: Job, tile: Tile, view: _View, band: int, strip: int, chunks: int, strips: int
) -> Iterator[_Cut]:
    """The cuts of one band and strip, with the outputs in one part or several."""
    gather = job.gather
    outer, inner = view.outer_side, view.inner_side
    share = _group_block(gather, job.lanes) / gather.groups
    packed = share * gather.in_channels * outer.subs * inner.subs
    packed *= (band + outer.reach) * (strip + inner.reach)
    size = packed * job.lanes * job.itemsize
    # Cycles for a cell: measured on one core, and only their ratios matter.
    slowness = next((by for most, by in job.core.planes if size <= most), _LARGE_PLANES)
    columns = min(tile.columns, strip)
    pack, write = _transposition_cycles(job, view, strip, columns)
    phases = outer.visited * inner.visited * math.ceil(1 / share)
    most = job.threads if gather.groups == 1 and not job.wgrad else 1
    for parts in range(1, min(most, gather.out_channels) + 1):
        sums = slowness * tile_of(job, columns, tile.length, parts).cycles
        work = band * strip * share * (sums + write * gather.out_channels)
        task_cycles = pack * packed + work / parts + 1_000
        tasks = phases * chunks * strips * parts
        total = tasks * task_cycles
        cycles = math.ceil(tasks / job.threads) * task_cycles
        if total < INLINE_CYCLES:
            cycles = total
        yield _Cut(cycles, total, view, band, strip, parts, chunks, strips, tasks)


def _transposition_cycles(
    job: Job, view: _View, strip: int, columns: int
) -> tuple[float, float]:
    """Cycles to read a cell from the input's layout, and to write one."""
    gather, inner = job.gather, view.inner_side
    if gather.data_format == "NHWC":
        group_block = _group_block(gather, job.lanes)
        read = group_block * gather.in_channels // gather.groups
        if _in_one_run(gather, view, group_block):
            read *= strip + inner.reach
        written = group_block * gather.out_channels // gather.groups
        if written == inner.phases * inner.write_stride:
            written *= columns
    else:
        read = strip if inner.read_stride * inner.step * inner.stride == 1 else 1
        written = columns if inner.write_stride * inner.phases == 1 else 1
    # A square of vectors takes as long however much of it is used. Pixels one below
    # the other are far from each other in memory.
    square = 8.0 * job.lanes * (1.5 if view.swapped else 1.0)
    return square / min(job.lanes, read), square / min(job.lanes, written)


def _finish(job: Job, cut: _Cut, tile: Tile) -> Plan:
    gather, view = job.gather, cut.view
    outer, inner = view.outer_side, view.inner_side
    nhwc = gather.data_format == "NHWC"
    read_plane = gather.h.inputs * gather.w.inputs
    write_plane = gather.h.outputs * gather.w.outputs
    pitch = cut.strip + inner.reach
    plane_cells = _plane_cells((cut.band + outer.reach) * pitch)
    group_block = _group_block(gather, job.lanes)
    outputs = group_block * gather.out_channels // gather.groups
    output_block = outputs_together(job, tile.blocks)
    # Not less than a block, unless there are less in all, and whole vectors, for the
    # transpositions take as long for a part of one.
    output_block = -(-outputs // max(1, outputs // output_block))
    output_block = min(outputs, -(-output_block // job.lanes) * job.lanes)
    return Plan(
        outer=outer,
        inner=inner,
        images=view.images,
        lanes=job.lanes,
        groups=gather.groups,
        group_channels=gather.in_channels // gather.groups,
        group_outputs=gather.out_channels // gather.groups,
        read_image=read_plane * gather.in_channels,
        read_channel=1 if nhwc else read_plane,
        write_image=write_plane * gather.out_channels,
        write_channel=1 if nhwc else write_plane,
        band=cut.band,
        strip=cut.strip,
        pitch=pitch,
        plane_cells=plane_cells,
        channel_cells=plane_cells * outer.subs * inner.subs,
        group_block=group_block,
        group_blocks=-(-gather.groups // group_block),
        block_length=tile.length,
        blocks=tile.blocks,
        tile=tile.columns,
        output_block=output_block,
        run=_in_one_run(gather, view, group_block),
        streaming=_streams(gather, job, cut.output_parts),
        output_parts=cut.output_parts,
        chunks=cut.chunks,
        strips=cut.strips,
        tasks=cut.tasks,
    )


def _in_one_run(gather: Gather, view: _View, group_block: int) -> int:
    """Whether the columns that a task reads lie in memory without gaps."""
    inner = view.inner_side
    if gather.data_format == "NHWC":
        # Several images of one column each would not be neighbours.
        return int(
            group_block == gather.groups
            and inner.read_stride == gather.in_channels
            and inner.step == 1
            and inner.subs == inner.stride
        )
    return 0


def _streams(gather: Gather, job: Job, output_parts: int) -> int:
    """Whether the output is too large for the caches, and written in whole vectors."""
    return int(
        gather.data_format == "NHWC"
        and gather.groups == 1
        and gather.out_channels % (job.lanes * output_parts) == 0
        and exceeds_caches(job)
    )


def _places(plan: Plan) -> np.ndarray:
    """Where in the planes the numbers of a run go; see `Plan.run`."""
    if plan.read_channel != 1:
        return np.arange(plan.pitch + plan.lanes, dtype=np.int32)
    channels = plan.group_block * plan.group_channels
    columns = plan.pitch * plan.inner.stride if plan.run else 1
    # A vector more, for the transpositions read the table in whole vectors.
    column, channel = np.divmod(np.arange(columns * channels + plan.lanes), channels)
    shift, sub = np.divmod(column, plan.inner.stride)
    places = channel * plan.channel_cells + sub * plan.plane_cells + shift
    return places.astype(np.int32)


def _gradient_places(plan: Plan) -> np.ndarray:
    if plan.write_channel != 1:
        return np.arange(plan.strip + plan.lanes, dtype=np.int32)
    step = plan.band * plan.strip
    return step * np.arange(plan.output_block + plan.lanes, dtype=np.int32)


def _offsets(plan: Plan, gather: Gather, swapped: bool) -> np.ndarray:
    channel, tap_h, tap_w = np.ogrid[
        : plan.group_channels, : gather.h.taps, : gather.w.taps
    ]
    outer, inner = (tap_w, tap_h) if swapped else (tap_h, tap_w)
    outer_shift, outer_sub = np.divmod(outer, plan.outer.stride)
    inner_shift, inner_sub = np.divmod(inner, plan.inner.stride)
    plane = outer_sub * plan.inner.subs + inner_sub
    offsets = (
        channel * plan.channel_cells
        + plane * plan.plane_cells
        + outer_shift * plan.pitch
        + inner_shift
    )
    return offsets.reshape(-1).astype(np.int32)
