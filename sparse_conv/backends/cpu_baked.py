"""Straight-line code for a kernel's pattern on CPUs.

The loops of `cpu_tasks` read a vector of the input for each product. Code that knows
the pattern reads it once for all the output channels that need it: their sums, one cell
each, are held in registers, and a weight is read as part of the instruction that
multiplies by it. The values are data: they may change without new code.

The products of an output are summed in the order that TensorFlow's convolution has, in
chains of about `cpu_tiles.CHAIN_ENTRIES`, each by itself: one chain alone rounds as
TensorFlow's does, several have smaller errors.

Knows plans and entries, and which instructions compute them. Does not know how these
are encoded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparse_conv.backends import cpu_tiles
from sparse_conv.backends.cpu_assembly import (
    SUMS,
    VALUES_IN_REACH,
    Executable,
    Instructions,
    instructions,
)
from sparse_conv.backends.cpu_jobs import BLOCK_BYTES
from sparse_conv.backends.cpu_plan import Plan
from sparse_conv.backends.cpu_tiles import CODE_BYTES, FAR_CODE_BYTES

# Bytes of a cache line, and of the code that a segment ends with, about.
_LINE_BYTES = 64
_SUMS_BYTES = 600
# The parts of a segment, in order.
_ENTER, _BEGIN, _PRODUCTS, _SUMS, _END, _LEAVE = range(6)


class Code(NamedTuple):
    """The code of a pattern in a plan.

    Attributes:
        executable: The memory it is in.
        order: (entries,) the entries in the order in which the code reads their values.
        addresses: (rows, calls) int64: the functions for the output channels from this
            one on, if a tile may begin with it, to be called one after the other; 0
            where there are fewer.
    """

    executable: Executable
    order: np.ndarray
    addresses: np.ndarray


class _Pieces(NamedTuple):
    """The runs of rows that a call of the code computes.

    Attributes:
        begin: (pieces,) the first row of each; `outputs` is their number.
        channel: (pieces,) the output channel that the first row belongs to.
        groups: (pieces,) how many groups of sums, one after the other, they take.
    """

    begin: np.ndarray
    outputs: np.ndarray
    channel: np.ndarray
    groups: np.ndarray


class _Segments(NamedTuple):
    """The loops over the cells: one for each group of sums and block of indices.

    Attributes:
        piece: (segments,) which piece each is part of.
        block: (segments,) its block of indices.
        group: (segments,) its group of sums.
        first: (pieces,) the first segment of each piece.
    """

    piece: np.ndarray
    block: np.ndarray
    group: np.ndarray
    first: np.ndarray


class _Calls(NamedTuple):
    """What is called at a time: some segments of a piece.

    Attributes:
        piece: (calls,) which piece each is part of.
        number: (calls,) its number there.
        first: (calls,) its first segment.
    """

    piece: np.ndarray
    number: np.ndarray
    first: np.ndarray


class _Stream:
    """Instructions that are collected in any order.

    A place is a segment, a part of it, and a number that orders what is in that part.
    """

    def __init__(self, table: Instructions):
        self.table = table
        self._keys: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, name, segment, part, rank=0, register=0, value=0) -> None:
        """Adds instructions of one form; every argument but the name broadcasts."""
        segment = np.asarray(segment, np.int64)
        keys = (segment << 36) + (np.int64(part) << 33) + rank
        numbers = self.table.numbers[name] + np.asarray(register)
        for held, new in (
            (self._keys, keys), (self._numbers, numbers), (self._values, value)
        ):  # fmt: skip
            held.append(np.broadcast_to(new, segment.shape))

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers and the values of all instructions, in order."""
        keys = np.concatenate(self._keys)
        order = np.argsort(keys, kind="stable")
        numbers = np.concatenate(self._numbers)[order]
        values = np.concatenate(self._values).astype(np.int64)[order]
        return numbers, values


def generate(
    plan: Plan,
    row: np.ndarray,
    block: np.ndarray,
    rank: np.ndarray,
    offsets: np.ndarray,
    dtype: str,
) -> Code:
    """The code of a pattern.

    Args:
        plan: What it is made for.
        row: (entries,) the row of each entry, ascending.
        block: (entries,) its block of indices.
        rank: (entries,) in what order an output's products of a block are summed.
        offsets: (entries,) the cells by which it moves a read.
        dtype: "float32" or "float64".

    Returns:
        The code. Its functions take the addresses of the first cell to read, of all
        values in order, and of the sums, the number of cells of each sum, and the
        address of all biases. Sum o of cell j is the cell `j * outputs + o`.

    Raises:
        OSError: The system has no memory for it, or lets none be executed.
    """
    table, itemsize = instructions(dtype), np.dtype(dtype).itemsize
    cell_bytes = itemsize * plan.lanes
    pieces = _pieces(plan)
    segments = _segments(plan, pieces)
    piece = np.searchsorted(pieces.begin, row, side="right") - 1
    group, register = np.divmod(row - pieces.begin[piece], cpu_tiles.CODE_OUTPUTS)
    segment = segments.first[piece] + block * pieces.groups[piece] + group
    order = np.lexsort((register, offsets, rank, segment))
    segment, register = segment[order], register[order]
    offsets = offsets[order].astype(np.int64)
    stream = _Stream(table)
    used = _add_products(
        stream, segment, register, offsets, len(segments.piece), itemsize, cell_bytes
    )
    _add_sums(stream, plan, pieces, segments, used, itemsize, cell_bytes)
    if len(order) * CODE_BYTES > plan.output_parts * FAR_CODE_BYTES:
        _add_fetches(stream, plan, np.bincount(segment, minlength=len(used)))
    calls = _calls(segments, cell_bytes // BLOCK_BYTES)
    _add_loops(stream, pieces, segments, calls, cell_bytes)
    numbers, values = stream.finished()
    starts = _link(table, numbers, values)
    executable = Executable(table.encode(numbers, values))
    rows = pieces.begin[-1] + pieces.outputs[-1]
    addresses = np.zeros((rows, cell_bytes // BLOCK_BYTES), np.int64)
    addresses[pieces.begin[calls.piece], calls.number] = (
        executable.address + starts[numbers == table.numbers["enter"]]
    )
    return Code(executable, order, addresses)


def _link(table: Instructions, numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fills in where each segment jumps to, and what it fetches.

    Returns:
        Where each instruction begins.
    """
    ends = np.cumsum(table.lengths[numbers])
    starts = ends - table.lengths[numbers]
    jumps = numbers == table.numbers["repeat"]
    values[jumps] = starts[numbers == table.numbers["values"]] - ends[jumps]
    # What comes after a segment's jump is the next one's.
    ahead = numbers == table.numbers["ahead"]
    if ahead.any():
        values[ahead] = ends[jumps] - ends[ahead]
    return starts


def _pieces(plan: Plan) -> _Pieces:
    """The rows of each tile that a task may begin; see `cpu_tasks._decode`."""
    begin, outputs = [], []
    channels = plan.groups * plan.group_outputs
    for row_set in range(plan.outer.row_sets * plan.inner.row_sets):
        for group_begin in range(0, plan.groups, plan.group_block):
            group_end = min(plan.groups, group_begin + plan.group_block)
            first = group_begin * plan.group_outputs
            count = (group_end - group_begin) * plan.group_outputs
            for part in range(plan.output_parts):
                low = first + count * part // plan.output_parts
                high = first + count * (part + 1) // plan.output_parts
                for channel in range(low, high, plan.output_block):
                    begin.append(row_set * channels + channel)
                    outputs.append(min(plan.output_block, high - channel))
    rows, counts = np.array(begin), np.array(outputs)
    groups = -(-counts // cpu_tiles.CODE_OUTPUTS)
    return _Pieces(rows, counts, rows % channels, groups)


def _segments(plan: Plan, pieces: _Pieces) -> _Segments:
    counts = pieces.groups * plan.blocks
    first = np.cumsum(counts) - counts
    piece = np.repeat(np.arange(len(counts)), counts)
    block, group = np.divmod(np.arange(len(piece)) - first[piece], pieces.groups[piece])
    return _Segments(piece, block, group, first)


def _calls(segments: _Segments, most: int) -> _Calls:
    """The segments of each piece in up to `most` calls, about equal."""
    ends = np.append(segments.first[1:], len(segments.piece))
    counts = ends - segments.first
    numbers = np.minimum(counts, most)
    piece = np.repeat(np.arange(len(counts)), numbers)
    begins = np.cumsum(numbers) - numbers
    number = np.arange(len(piece)) - begins[piece]
    first = segments.first[piece] + number * counts[piece] // numbers[piece]
    return _Calls(piece, number, first)


def _add_products(
    stream: _Stream,
    segment: np.ndarray,
    register: np.ndarray,
    offsets: np.ndarray,
    segments: int,
    itemsize: int,
    cell_bytes: int,
) -> np.ndarray:
    """Adds the products of all entries, which are in order.

    Returns:
        For each segment and register whether there is a product.
    """
    begins = np.searchsorted(segment, np.arange(segments))
    rank = np.arange(len(segment)) - begins[segment]
    # Its read, and more of the values, come before the first product that needs them.
    read = np.ones(len(segment), bool)
    read[1:] = (segment[1:] != segment[:-1]) | (offsets[1:] != offsets[:-1])
    at = np.flatnonzero(read)
    stream.add(
        "read", segment[at], _PRODUCTS, 4 * rank[at], value=offsets[at] * cell_bytes
    )
    at = np.flatnonzero((rank % VALUES_IN_REACH == 0) & (rank > 0))
    stream.add(
        "more values", segment[at], _PRODUCTS, 4 * rank[at] + 1,
        value=VALUES_IN_REACH * itemsize,
    )  # fmt: skip
    middle = VALUES_IN_REACH // 2
    stream.add(
        "values", np.arange(segments), _BEGIN, 1, value=(begins + middle) * itemsize
    )
    used = np.zeros((segments, SUMS), bool)
    place = segment * used.shape[1] + register
    _, firsts = np.unique(place, return_index=True)
    first = np.zeros(len(segment), bool)
    first[firsts] = True
    used.reshape(-1)[place] = True
    for name, at in (
        ("multiply", firsts), ("multiply and add", np.flatnonzero(~first))
    ):  # fmt: skip
        stream.add(
            name, segment[at], _PRODUCTS, 4 * rank[at] + 2, register[at],
            rank[at] % VALUES_IN_REACH - middle,
        )  # fmt: skip
    return used


def _add_fetches(stream: _Stream, plan: Plan, entries: np.ndarray) -> None:
    """Adds what fetches each segment's code while the one before it runs.

    A processor that runs into code far from it waits for one line after the other.
    """
    bytes_ahead = np.append(entries[1:], 0) * CODE_BYTES + _SUMS_BYTES
    lines = -(-bytes_ahead // (_LINE_BYTES * plan.tile))
    segment = np.repeat(np.arange(len(lines)), lines)
    number = np.arange(len(segment)) - np.repeat(np.cumsum(lines) - lines, lines)
    rank = number * entries[segment] // lines[segment]
    stream.add("fetch", segment, _PRODUCTS, 4 * rank + 3, value=_LINE_BYTES * number)
    every = np.arange(len(lines))
    stream.add("ahead", every, _BEGIN)
    stream.add("fetch on", every, _END, value=_LINE_BYTES * lines)


def _add_sums(
    stream: _Stream,
    plan: Plan,
    pieces: _Pieces,
    segments: _Segments,
    used: np.ndarray,
    itemsize: int,
    cell_bytes: int,
) -> None:
    """Adds what joins each segment's sums with those of the blocks before it."""
    begin = segments.group * cpu_tiles.CODE_OUTPUTS
    counts = pieces.outputs[segments.piece] - begin
    counts = np.minimum(counts, cpu_tiles.CODE_OUTPUTS)
    segment = np.repeat(np.arange(len(counts)), counts)
    register = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    output = begin[segment] + register
    later = segments.block[segment] > 0
    last = segments.block[segment] == plan.blocks - 1
    present = used[segment, register]
    channel = pieces.channel[segments.piece[segment]] + output
    for step, (name, wanted, value) in enumerate((
        ("zero", ~present & (~later | last), 0),
        ("add held", (present | last) & later, output * cell_bytes),
        ("add bias", last, channel * itemsize),
        ("store", present | last | ~later, output * cell_bytes),
    )):  # fmt: skip
        at = np.flatnonzero(wanted)
        stream.add(
            name, segment[at], _SUMS, 4 * register[at] + step, register[at],
            np.broadcast_to(value, wanted.shape)[at],
        )  # fmt: skip


def _add_loops(
    stream: _Stream,
    pieces: _Pieces,
    segments: _Segments,
    calls: _Calls,
    cell_bytes: int,
) -> None:
    """Adds the loops of the segments, and what begins and ends each call."""
    every = np.arange(len(segments.piece))
    stream.add("begin", every, _BEGIN)
    stream.add("next cell", every, _END, 0)
    sums = pieces.outputs[segments.piece] * cell_bytes
    stream.add("next sums", every, _END, 1, value=sums)
    stream.add("repeat", every, _END, 2)
    stream.add("enter", calls.first, _ENTER)
    last = np.append(calls.first[1:], len(every)) - 1
    stream.add("leave", last, _LEAVE)
