"""The back end for tensors on NVIDIA GPUs.

Knows which launches serve which pass, and which operands they take (see
`cuda_operands`). Which function and tile a launch takes is decided in `plan`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from sparse_conv import bridge, costs, plan, spmm, spmm_plan
from sparse_conv.activations import LINEAR
from sparse_conv.backends import cuda_baked, cuda_costs
from sparse_conv.backends.cuda_baked import BakedCode, BakedRun
from sparse_conv.backends.cuda_operands import (
    CompressedKernel,
    Operands,
    PlacedKernel,
    RowsInPlace,
    ValuesOf,
    pattern_rows,
    raw_memory,
    upload_origins,
    upload_places,
)
from sparse_conv.baked import needs_origins
from sparse_conv.baked_plan import choose_baked_block, described, shortlist
from sparse_conv.bridge import Memory, Place, known_memory
from sparse_conv.costs import Estimate
from sparse_conv.costs.terms import gather_of
from sparse_conv.gather import Gather, fprop_gather
from sparse_conv.launch import WARP, Launch
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.problem import Problem
from sparse_conv.streams import Step, ordered

# Configurations of generated code that are compared when times may be taken.
_TUNED = 10


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
    one = _Pass(
        "fprop", problem, dtype, place, pattern, constant, shape, has_bias, activation
    )
    return _run_of(one, algorithm, waits)


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
    one = _Pass("dgrad", problem, dtype, place, pattern, constant, shape)
    return _run_of(one, algorithm, waits)


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
    fixed: dict[str, Memory] = {"origins": upload_origins(gather, place)}
    shape = problem.kernel_shape
    if pattern is not None:
        fixed |= pattern_rows(pattern, "fprop", pattern.fprop_rows, place)
        shape = (pattern.nnz,)
    ordinal = bridge.ordinal_of(place)
    steps = [Step(launch, ordinal, fixed) for launch in (partial, total)]

    def run(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        workspace = raw_memory(workspace_bytes, place)
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


@dataclass(frozen=True, eq=False, slots=True)
class _Pass:
    """A forward pass or input gradient; the attributes are the functions' arguments."""

    name: str
    problem: Problem
    dtype: tf.DType
    place: Place
    pattern: Pattern | None
    constant: bool
    shape: tuple[int, ...]
    has_bias: bool = False
    activation: int = LINEAR.code

    @property
    def gather(self) -> Gather:
        return gather_of(self.name, self.problem)


def _run_of(one: _Pass, algorithm: str, waits: bool) -> Callable[..., tf.Tensor]:
    generic = _generic_run(one)
    if algorithm != "baked":
        return generic
    gather, place = one.gather, one.place
    code = _baked_code(one.name, gather, one.pattern, one.dtype, place)
    fixed = _baked_operands(gather, place)
    return BakedRun(code, one.activation, fixed, one.shape, generic, waits=waits)


def _generic_run(one: _Pass) -> Callable[..., tf.Tensor]:
    """A pass by a function that reads the pattern and the values."""
    place, ordinal = one.place, bridge.ordinal_of(one.place)
    shape, dtype = one.shape, one.dtype
    launch, kernel = _spmm_launch(one) or _gather_launch(one)
    origins = {"origins": upload_origins(one.gather, place)}
    step = Step(launch, ordinal, {**kernel.fixed, **origins})

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


def _gather_launch(one: _Pass) -> tuple[Launch, ValuesOf | CompressedKernel]:
    """A pass by conv2d_gather, or by the function that takes its place."""
    gather, pattern, dtype = one.gather, one.pattern, one.dtype.name
    transposed = one.name == "dgrad"
    launch = plan.gather_launch(
        gather,
        dtype,
        _nonzeros(one.problem, pattern),
        one.activation,
        has_bias=one.has_bias,
        has_order=transposed and pattern is not None,
        device=limits(one.place),
    )
    if pattern is None:
        compress = plan.compress_launch(
            gather, dtype, one.problem.kernel_shape, transposed=transposed
        )
        return launch, CompressedKernel(compress, gather, one.place)
    key = (gather.groups, gather.h.kernel_taps, gather.w.kernel_taps)
    rows = pattern_rows(
        pattern,
        key if transposed else one.name,
        lambda: _rows_of(one.name, gather, pattern),
        one.place,
    )
    return launch, ValuesOf(rows)


def _spmm_launch(one: _Pass) -> tuple[Launch, PlacedKernel] | None:
    """A pass by conv2d_spmm; None where it doesn't fit or others are faster."""
    pattern, dtype, place = one.pattern, one.dtype.name, one.place
    if pattern is None:
        return None
    cost = cuda_costs.generic_cost(
        one.name, one.problem, dtype, pattern.nnz, limits(place), machine(place), True,
        one.constant,
    )  # fmt: skip
    block, gather = cost.block, one.gather
    if block is None:
        return None

    def placed() -> RowsInPlace:
        rows = _rows_of(one.name, gather, pattern)
        return upload_places(spmm.place_rows(gather, rows, dtype, block), place)

    # All that the rows, and where they are placed, depend on.
    taps = (gather.groups, gather.h.kernel_taps, gather.w.kernel_taps)
    layout = (block.lattice, block.config.block_rows)
    rows = pattern.cached(("cuda spmm", one.name, taps, layout, dtype, place), placed)
    sizes = (gather, dtype, block, rows.capacity)
    if not spmm.fits(dtype, block, rows.capacity, limits(place)):
        # A part of the kernel is far denser than the rest.
        return None
    kernel = PlacedKernel(
        spmm.place_launch(*sizes), rows, spmm.entries_bytes(*sizes), place, one.constant
    )
    return spmm.spmm_launch(*sizes, one.activation), kernel


def _rows_of(pass_name: str, gather: Gather, pattern: Pattern) -> Rows:
    if pass_name == "fprop":
        return pattern.fprop_rows()
    return pattern.dgrad_rows(gather)


def _baked_code(
    pass_name: str, gather: Gather, pattern: Pattern, dtype: tf.DType, place: Place
) -> BakedCode:
    """The generated code of a pass, kept with the pattern."""
    # Weak, so that the memory is freed with the pattern's last reference.
    reference = weakref.ref(pattern)

    def rows() -> Rows | None:
        known = reference()
        return None if known is None else _rows_of(pass_name, gather, known)

    block = choose_baked_block(gather, dtype.name, pattern.nnz, limits(place)).block
    shapes = pattern.cached(("cuda baked shapes", pass_name), set)
    return pattern.cached(
        ("cuda baked", pass_name, gather, dtype, place),
        lambda: BakedCode(gather, rows, dtype, block, place, shapes),
    )


def _baked_operands(gather: Gather, place: Place) -> Operands:
    return {"origins": upload_origins(gather, place)} if needs_origins(gather) else {}


def _nonzeros(problem: Problem, pattern: Pattern | None) -> int:
    """The nonzeros of a kernel; all weights where nobody counted the zeros."""
    if pattern is not None:
        return pattern.nnz
    return problem.r * problem.s * problem.group_channels * problem.k


@functools.cache
def limits(place: Place) -> plan.DeviceLimits:
    """What a plan has to know of a GPU."""
    import cupy

    device = cupy.cuda.Device(bridge.ordinal_of(place))
    return plan.DeviceLimits.of(device.attributes, int(device.compute_capability))
