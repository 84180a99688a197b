"""What launches on GPUs take beside tensors: patterns, and kernels in their form.

Knows the memory of these operands, and when they are made: once for a pattern, or for a
tensor. All memory comes from TensorFlow's allocator. Does not know what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from sparse_conv import bridge
from sparse_conv.bridge import Memory, Place, known_memory
from sparse_conv.gather import Gather
from sparse_conv.launch import Launch
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.spmm import PlacedRows
from sparse_conv.streams import Step, ordered
from sparse_conv.tensor_cache import cached

# Raw memory is asked for in elements of a dtype that TensorFlow keeps on the GPU: its
# int32 tensors live in host memory.
_CELL = tf.float32
_INDEX_BYTES = 4
# Of arrays in one piece of memory: more than any function wants.
_ALIGNMENT = 16

Operands = Mapping[str, Memory]
# What has to be launched before operands are read.
Before = tuple[Step, Operands] | None


class ValuesOf:
    """The operands that stand for a SparseKernel: its rows, and its values.

    Attributes:
        fixed: Operands that are the same for all tensors.
    """

    def __init__(self, rows: Operands):
        """Takes the rows of the pattern."""
        self.fixed = rows

    def operands(self, w: tf.Tensor) -> tuple[Operands, Before]:
        """The others, for a tensor, and what has to be launched before."""
        return {"values": known_memory(w)}, None


class CompressedKernel:
    """Those of a dense kernel: rows found on the GPU, without a wait of the host.

    Attributes:
        fixed: None, see `ValuesOf`.
    """

    def __init__(self, compress: Launch, gather: Gather, place: Place):
        """Takes the launch that finds the rows of what is computed."""
        self.fixed: Operands = {}
        self._launch = compress
        self._gather = gather
        self._place = place

    def operands(self, w: tf.Tensor) -> tuple[Operands, Before]:
        """See `ValuesOf`."""
        return cached(w, self._launch, lambda: self._compressed(w)), None

    def _compressed(self, w: tf.Tensor) -> Operands:
        gather, place = self._gather, self._place
        slots = gather.rows * gather.row_length
        # One piece of memory: to make one, and to learn its address, takes the host
        # some 50 us.
        sizes = {
            "values": slots * w.dtype.size,
            "indices": slots * _INDEX_BYTES,
            "begin": gather.rows * _INDEX_BYTES,
            "end": gather.rows * _INDEX_BYTES,
        }
        padded = {name: _padded(size) for name, size in sizes.items()}
        rows = _pieces(raw_memory(sum(padded.values()), place), padded)
        ordinal = bridge.ordinal_of(place)
        step = Step(self._launch, ordinal, {"taps": _kernel_taps(gather, place)})
        with ordered(ordinal) as lane:
            lane.launch(step, {**rows, "kernel": known_memory(w)})
        return rows


@dataclass(frozen=True, eq=False, slots=True)
class RowsInPlace:
    """`spmm.PlacedRows` on a GPU.

    Attributes:
        operands: The arrays.
        capacity: As of PlacedRows.
    """

    operands: Operands
    capacity: int


class PlacedKernel:
    """Those of conv2d_spmm: entries in the order in which it copies them.

    Attributes:
        fixed: None, see `ValuesOf`.
    """

    def __init__(
        self,
        place_entries: Launch,
        rows: RowsInPlace,
        nbytes: int,
        place: Place,
        constant: bool,
    ):
        """Prepares the launch that brings values to their places.

        Args:
            place_entries: That launch.
            rows: The places.
            nbytes: What it writes.
            place: The GPU.
            constant: Whether it is always the same tensor that holds the values.
        """
        self.fixed: Operands = {}
        self._rows = rows
        self._nbytes = nbytes
        self._place = place
        self._constant = constant
        self._step = Step(place_entries, bridge.ordinal_of(place), rows.operands)

    def operands(self, w: tf.Tensor) -> tuple[Operands, Before]:
        """See `ValuesOf`."""
        if self._constant:
            # By its rows: other patterns may have the same values.
            return cached(w, self._rows, lambda: self._placed(w)), None
        # Variables hand over a new tensor each time.
        return self._unplaced(w)

    def _unplaced(self, w: tf.Tensor) -> tuple[Operands, tuple[Step, Operands]]:
        entries = raw_memory(self._nbytes, self._place)
        operands = {"values": known_memory(w), "write": entries}
        return {"entries": entries}, (self._step, operands)

    def _placed(self, w: tf.Tensor) -> Operands:
        entries, launch = self._unplaced(w)
        with ordered(bridge.ordinal_of(self._place)) as lane:
            lane.launch(*launch)
        return entries


def pattern_rows(
    pattern: Pattern, key: object, rows: Callable[[], Rows], place: Place
) -> Operands:
    """A pattern's rows on the GPU, uploaded once.

    Args:
        pattern: The pattern.
        key: What the rows depend on beside it.
        rows: Makes them.
        place: The GPU.
    """
    return pattern.cached(("cuda", key, place), lambda: _upload_rows(rows(), place))


def upload_places(placed: PlacedRows, place: Place) -> RowsInPlace:
    """The places of a kernel's entries on the GPU."""
    names = ("sources", "offsets", "spans")
    arrays = {name: getattr(placed, name).ravel() for name in names}
    return RowsInPlace(_upload_pieces(arrays, place), placed.capacity)


@functools.lru_cache(maxsize=1024)
def upload_origins(gather: Gather, place: Place) -> Memory:
    """The operand `origins` on the GPU, uploaded once."""
    return _upload(np.array(gather.h.origins + gather.w.origins), place)


def raw_memory(nbytes: int, place: Place) -> Memory:
    """GPU memory for at least so many bytes, with arbitrary contents."""
    # In rows, whose number needs no more than 31 bits.
    shape = (_padded(nbytes) // _ALIGNMENT, _ALIGNMENT // _CELL.size)
    return bridge.output(shape, _CELL, place)[1]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _upload_rows(rows: Rows, place: Place) -> Operands:
    arrays = {"begin": rows.begin, "end": rows.end, "indices": rows.indices}
    if rows.order is not None:
        arrays["order"] = rows.order
    return _upload_pieces(arrays, place)


def _upload_pieces(arrays: Mapping[str, np.ndarray], place: Place) -> Operands:
    """int32 arrays in one piece of GPU memory."""
    together = _upload(np.concatenate(list(arrays.values())), place)
    return _pieces(together, {name: array.nbytes for name, array in arrays.items()})


def _pieces(together: Memory, sizes: Mapping[str, int]) -> dict[str, Memory]:
    """Pieces of some memory that follow each other, of so many bytes each."""
    pieces, address = {}, together.address
    for name, size in sizes.items():
        pieces[name] = Memory(address, together.owner)
        address += size
    return pieces


def _upload(array: np.ndarray, place: Place) -> Memory:
    """An int32 array in GPU memory, through a dtype that TensorFlow keeps there."""
    cells = np.ascontiguousarray(array, np.int32).view(_CELL.as_numpy_dtype)
    with tf.device(place.device):
        return bridge.memory_of(tf.identity(tf.constant(cells)))


@functools.lru_cache(maxsize=1024)
def _kernel_taps(gather: Gather, place: Place) -> Memory:
    taps = [np.ravel(axis.kernel_taps) for axis in (gather.h, gather.w)]
    return _upload(np.concatenate(taps), place)
