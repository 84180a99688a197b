"""The back end for tensors on NVIDIA GPUs.

Knows which launches serve which pass, and what they need on the device: the rows of a
pattern, the output, scratch. All memory comes from TensorFlow's allocator. Which
function and tile a launch takes is decided in `plan`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from sparse_conv import bridge, costs, plan, spmm, spmm_plan
from sparse_conv.activations import LINEAR
from sparse_conv.backends import cuda_baked, cuda_costs
from sparse_conv.backends.cuda_baked import BakedCode, BakedRun
from sparse_conv.baked import needs_origins
from sparse_conv.baked_plan import choose_baked_block, described, shortlist
from sparse_conv.bridge import Memory, Place, known_memory
from sparse_conv.costs import Estimate
from sparse_conv.costs.terms import gather_of
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.launch import WARP, Launch
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.problem import Problem
from sparse_conv.streams import Step, ordered
from sparse_conv.tensor_cache import cached

# Raw memory is asked for in elements of a dtype that TensorFlow keeps on the GPU: its
# int32 tensors live in host memory.
_CELL = tf.float32
_INDEX_BYTES = 4
# Configurations of generated code that are compared when times may be taken.
_TUNED = 10
# Of arrays in one piece of memory: more than any function wants.
_ALIGNMENT = 16

Operands = Mapping[str, Memory]


@functools.cache
def unavailable() -> str | None:
    """Why no GPU can be used on this machine; None if one can."""
    if importlib.util.find_spec("cupy") is None:
        return (
            "CuPy is not installed; `pip install 'sparse_conv[cuda12]'` (or cuda13) "
            "brings it"
        )
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no GPU ({error})"
    if not tf.config.list_physical_devices("GPU"):
        return "TensorFlow finds no GPU"
    return None


def reason_against(place: Place, dtype: tf.DType, forced: bool) -> str | None:
    """Why this back end doesn't compute for tensors at `place`; None if it does."""
    del forced
    reason = unavailable()
    if reason is None and place.kind != "GPU":
        reason = (
            "TensorFlow keeps int32 tensors in host memory"
            if dtype == tf.int32
            else "the tensors live in host memory"
        )
    return reason


def caches() -> list[Path]:
    """Where CuPy keeps compiled functions."""
    default = Path.home() / ".cupy" / "kernel_cache"
    return [Path(os.environ.get("CUPY_CACHE_DIR") or default)]


def fprop(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
    waits: bool,
    constant: bool,
    has_bias: bool,
    activation: int,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The forward pass."""
    gather = fprop_gather(problem)
    generic = None
    if pattern is not None:
        generic = _spmm_run(
            "fprop", problem, pattern, pattern.fprop_rows, activation, dtype, shape,
            place, constant,
        )  # fmt: skip
    if generic is None:
        launch = plan.gather_launch(
            gather,
            dtype.name,
            _nonzeros(problem, pattern),
            activation,
            has_bias=has_bias,
            has_order=False,
            device=limits(place),
        )
        if pattern is None:
            compress = plan.compress_launch(
                gather, dtype.name, problem.kernel_shape, transposed=False
            )
            kernel = _CompressedKernel(compress, gather, place)
        else:
            rows = _pattern_rows(pattern, "fprop", pattern.fprop_rows, place)
            kernel = _ValuesOf(rows)
        generic = _gather_run(launch, gather, kernel, dtype, shape, place)
    if algorithm != "baked":
        return generic
    code = _baked_code("fprop", gather, pattern, dtype, place)
    fixed = _baked_operands(gather, place)
    return BakedRun(code, activation, fixed, shape, generic, waits=waits)


def dgrad(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
    waits: bool,
    constant: bool,
    shape: tuple[int, ...],
) -> Callable[..., tf.Tensor]:
    """The gradient to the input."""
    gather = dgrad_gather(problem)
    generic = None
    if pattern is not None:
        generic = _spmm_run(
            "dgrad", problem, pattern, lambda: pattern.dgrad_rows(gather), LINEAR.code,
            dtype, shape, place, constant,
        )  # fmt: skip
    if generic is None:
        launch = plan.gather_launch(
            gather,
            dtype.name,
            _nonzeros(problem, pattern),
            has_bias=False,
            has_order=pattern is not None,
            device=limits(place),
        )
        if pattern is None:
            compress = plan.compress_launch(
                gather, dtype.name, problem.kernel_shape, transposed=True
            )
            kernel = _CompressedKernel(compress, gather, place)
        else:
            key = (gather.groups, gather.h.kernel_taps, gather.w.kernel_taps)
            rows = _pattern_rows(
                pattern, key, lambda: pattern.dgrad_rows(gather), place
            )
            kernel = _ValuesOf(rows)
        generic = _gather_run(launch, gather, kernel, dtype, shape, place)
    if algorithm != "baked":
        return generic
    code = _baked_code("dgrad", gather, pattern, dtype, place)
    fixed = _baked_operands(gather, place)
    return BakedRun(code, LINEAR.code, fixed, shape, generic, waits=waits)


def wgrad(
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern | None,
    *,
    algorithm: str,
) -> Callable[..., tf.Tensor]:
    """The gradient to the values of the pattern, or to the dense kernel."""
    del algorithm
    gather = fprop_gather(problem)
    partial, total, workspace_bytes = plan.wgrad_launches(
        gather,
        dtype.name,
        _nonzeros(problem, pattern),
        dense=pattern is None,
        device=limits(place),
    )
    fixed: dict[str, Memory] = {"origins": _origins(gather, place)}
    shape = problem.kernel_shape
    if pattern is not None:
        fixed |= _pattern_rows(pattern, "fprop", pattern.fprop_rows, place)
        shape = (pattern.nnz,)
    cells = (-(-workspace_bytes // _CELL.size),)
    ordinal = bridge.ordinal_of(place)
    steps = [Step(launch, ordinal, fixed) for launch in (partial, total)]

    def run(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        _, workspace = bridge.output(cells, _CELL, place)
        dw, memory = bridge.output(shape, dtype, place)
        operands = {
            "read": known_memory(x),
            "gradient": known_memory(dy),
            "workspace": workspace,
            "write": memory,
        }
        with ordered(ordinal) as lane:
            for step in steps:
                lane.launch(step, operands)
        return dw

    return run


@functools.cache
def machine(place: Place) -> costs.Machine:
    """The GPU's architecture and its multiprocessors."""
    import cupy

    device = cupy.cuda.Device(bridge.ordinal_of(place))
    kind = f"cuda-sm{device.compute_capability}"
    return costs.Machine(kind, limits(place).multiprocessors, WARP)


def estimates(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    nnz: int,
    constant: bool,
    sparse: bool,
) -> tuple[Estimate, ...]:
    """What each algorithm would take; see `sparse_conv.backends`."""
    sizes = (pass_name, problem, dtype.name, nnz, limits(place), machine(place))
    cost = cuda_costs.generic_cost(*sizes, sparse, constant)
    reason = f"functions that read the {nnz} weights"
    if cost.block is not None:
        reason = f"{reason}, in {spmm_plan.described(cost.block)}"
    generic = Estimate("generic", cost.microseconds, reason)
    if not constant:
        reason = "code is generated for a SparseKernel whose values stay the same"
        return generic, Estimate("baked", None, reason)
    return generic, cuda_costs.baked_estimate(*sizes)


def nonzeros(w: tf.Tensor) -> int | None:
    """None: counting the nonzeros of a dense kernel would make the host wait."""
    del w


finish_compiling = cuda_baked.finish_compiling


def tune(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern,
    read: tf.Tensor,
    w: tf.Tensor,
) -> None:
    """Chooses the tiles of generated code by their times."""
    gather = gather_of(pass_name, problem)
    code = _baked_code(pass_name, gather, pattern, dtype, place)
    blocks = shortlist(gather, dtype.name, pattern.nnz, limits(place), _TUNED)
    shape = problem.input_shape if pass_name == "dgrad" else problem.output_shape
    _, memory = bridge.output(shape, dtype, place)
    operands = {"read": known_memory(read), "write": memory}
    code.tune(blocks, _baked_operands(gather, place), operands, w)


def tuned(
    pass_name: str,
    problem: Problem,
    dtype: tf.DType,
    place: Place,
    pattern: Pattern,
) -> str | None:
    """What `tune` chose for a pattern; None if it did not."""
    gather = gather_of(pass_name, problem)
    code = _baked_code(pass_name, gather, pattern, dtype, place)
    if not code.compared:
        return None
    return f"{described(code.block, pattern.nnz)}, the fastest of {code.compared}"


class _ValuesOf:
    """The operands that stand for a kernel whose pattern is known: rows, and values.

    As with the other kernels, `fixed` are those that stay the same. `operands` gives
    those that depend on the tensor, and what has to be launched before they are read.
    """

    def __init__(self, rows: Operands):
        self.fixed = rows

    def operands(self, w: tf.Tensor) -> tuple[Operands, None]:
        return {"values": known_memory(w)}, None


class _CompressedKernel:
    """Those of a dense kernel, found on the GPU without a wait of the host."""

    def __init__(self, compress: Launch, gather: Gather, place: Place):
        self.fixed: Operands = {}
        self._launch = compress
        self._gather = gather
        self._place = place

    def operands(self, w: tf.Tensor) -> tuple[Operands, None]:
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
        rows = _pieces(_raw_memory(sum(padded.values()), place), padded)
        ordinal = bridge.ordinal_of(place)
        step = Step(self._launch, ordinal, {"taps": _kernel_taps(gather, place)})
        with ordered(ordinal) as lane:
            lane.launch(step, {**rows, "kernel": known_memory(w)})
        return rows


class _PlacedKernel:
    """Those of conv2d_spmm: entries in the order in which it copies them."""

    def __init__(
        self,
        place_entries: Launch,
        rows: _PlacedRows,
        nbytes: int,
        place: Place,
        constant: bool,
    ):
        self.fixed: Operands = {}
        self._rows = rows
        self._place = place
        self._nbytes = nbytes
        self._constant = constant
        self._step = Step(place_entries, bridge.ordinal_of(place), rows.operands)

    def operands(self, w: tf.Tensor) -> tuple[Operands, tuple[Step, Operands] | None]:
        if self._constant:
            # By its rows: others may have the same values.
            return cached(w, self._rows, lambda: self._placed(w)), None
        # Variables hand over a new tensor each time.
        return self._place_entries(w)

    def _place_entries(self, w: tf.Tensor) -> tuple[Operands, tuple[Step, Operands]]:
        entries = _raw_memory(self._nbytes, self._place)
        operands = {"values": known_memory(w), "write": entries}
        return {"entries": entries}, (self._step, operands)

    def _placed(self, w: tf.Tensor) -> Operands:
        entries, launch = self._place_entries(w)
        with ordered(bridge.ordinal_of(self._place)) as lane:
            lane.launch(*launch)
        return entries


def _gather_run(
    launch: Launch,
    gather: Gather,
    kernel: _ValuesOf | _CompressedKernel | _PlacedKernel,
    dtype: tf.DType,
    shape: tuple[int, ...],
    place: Place,
) -> Callable[..., tf.Tensor]:
    """The function of fprop and of dgrad."""
    ordinal = bridge.ordinal_of(place)
    step = Step(launch, ordinal, {**kernel.fixed, "origins": _origins(gather, place)})

    def run(read: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
        write, memory = bridge.output(shape, dtype, place)
        own, before = kernel.operands(w)
        operands = {"read": known_memory(read), "write": memory, **own}
        if bias is not None:
            operands["bias"] = known_memory(bias)
        with ordered(ordinal) as lane:
            if before is not None:
                lane.launch(*before)
            lane.launch(step, operands)
        return write

    return run


@dataclass(frozen=True, eq=False, slots=True)
class _PlacedRows:
    """Sparse rows on the GPU, for one configuration of conv2d_spmm."""

    operands: Operands
    capacity: int


def _spmm_run(
    pass_name: str,
    problem: Problem,
    pattern: Pattern,
    make_rows: Callable[[], Rows],
    activation: int,
    dtype: tf.DType,
    shape: tuple[int, ...],
    place: Place,
    constant: bool,
) -> Callable[..., tf.Tensor] | None:
    """A pass by conv2d_spmm; None where it doesn't fit or others are faster."""
    device = limits(place)
    cost = cuda_costs.generic_cost(
        pass_name, problem, dtype.name, pattern.nnz, device, machine(place), True,
        constant,
    )  # fmt: skip
    block, gather = cost.block, gather_of(pass_name, problem)
    if block is None:
        return None

    def placed() -> _PlacedRows:
        found = spmm.place_rows(gather, make_rows(), dtype.name, block)
        arrays = {
            name: getattr(found, name).ravel()
            for name in ("sources", "offsets", "spans")
        }
        return _PlacedRows(_upload_pieces(arrays, place), found.capacity)

    # All that the rows, and where they are placed, depend on.
    taps = (gather.groups, gather.h.kernel_taps, gather.w.kernel_taps)
    layout = (block.lattice, block.config.block_rows)
    rows = pattern.cached(("cuda spmm", pass_name, taps, layout, dtype, place), placed)
    sizes = (gather, dtype.name, block, rows.capacity)
    if not spmm.fits(dtype.name, block, rows.capacity, device):
        # A part of the kernel is far denser than the rest.
        return None
    kernel = _PlacedKernel(
        spmm.place_launch(*sizes), rows, spmm.entries_bytes(*sizes), place, constant
    )
    launch = spmm.spmm_launch(*sizes, activation)
    return _gather_run(launch, gather, kernel, dtype, shape, place)


def _baked_code(
    pass_name: str, gather: Gather, pattern: Pattern, dtype: tf.DType, place: Place
) -> BakedCode:
    """The generated code of a pass, kept with the pattern."""
    # Weak, so that the memory is freed with the pattern's last reference.
    reference = weakref.ref(pattern)

    def rows() -> Rows | None:
        known = reference()
        if known is None:
            return None
        return known.fprop_rows() if pass_name == "fprop" else known.dgrad_rows(gather)

    block = choose_baked_block(gather, dtype.name, pattern.nnz, limits(place)).block
    shapes = pattern.cached(("cuda baked shapes", pass_name), set)
    return pattern.cached(
        ("cuda baked", pass_name, gather, dtype, place),
        lambda: BakedCode(gather, rows, dtype, block, place, shapes),
    )


def _baked_operands(gather: Gather, place: Place) -> Operands:
    return {"origins": _origins(gather, place)} if needs_origins(gather) else {}


def _nonzeros(problem: Problem, pattern: Pattern | None) -> int:
    """The nonzeros of a kernel; all weights where nobody counted the zeros."""
    if pattern is not None:
        return pattern.nnz
    return problem.r * problem.s * problem.group_channels * problem.k


def _pattern_rows(
    pattern: Pattern, key: object, rows: Callable[[], Rows], place: Place
) -> Operands:
    """A pattern's rows on the GPU, uploaded once."""
    return pattern.cached(("cuda", key, place), lambda: _upload_rows(rows(), place))


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
def _origins(gather: Gather, place: Place) -> Memory:
    return _upload(np.array(gather.h.origins + gather.w.origins), place)


@functools.lru_cache(maxsize=1024)
def _kernel_taps(gather: Gather, place: Place) -> Memory:
    taps = [np.ravel(axis.kernel_taps) for axis in (gather.h, gather.w)]
    return _upload(np.concatenate(taps), place)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _raw_memory(nbytes: int, place: Place) -> Memory:
    """GPU memory for so many bytes, a multiple of _ALIGNMENT."""
    # In rows, whose number needs no more than 31 bits.
    shape = (nbytes // _ALIGNMENT, _ALIGNMENT // _CELL.size)
    return bridge.output(shape, _CELL, place)[1]


@functools.cache
def limits(place: Place) -> plan.DeviceLimits:
    """What a plan has to know of a GPU."""
    import cupy

    device = cupy.cuda.Device(bridge.ordinal_of(place))
    return plan.DeviceLimits.of(device.attributes, int(device.compute_capability))
