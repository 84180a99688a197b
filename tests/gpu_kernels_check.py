"""Compares every GPU function with the definition, and times some.

Needs CuPy and a GPU, no TensorFlow:

    python -m tests.gpu_kernels_check check      problems x configurations x dtypes
    python -m tests.gpu_kernels_check sanitize   a few of each, for compute-sanitizer
    python -m tests.gpu_kernels_check baked      generated code alone, likewise
    python -m tests.gpu_kernels_check spmm       conv2d_spmm alone, likewise
    python -m tests.gpu_kernels_check time       the seed's main case and its neighbours
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import types
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

if find_spec("tensorflow") is None:
    # Only modules that know nothing of TensorFlow are wanted, not the package's front.
    _package = types.ModuleType("sparse_conv")
    _package.__path__ = [str(Path(__file__).resolve().parent.parent / "sparse_conv")]
    sys.modules.setdefault("sparse_conv", _package)

from sparse_conv import baked, plan, spmm
from sparse_conv.baked import BakedConfig
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.launch import Launch
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.problem import Geometry, Problem, make_problem
from sparse_conv.spmm import SpmmConfig
from sparse_conv.tiling import make_block
from tests.baked_configs import fitted
from tests.reference import conv2d_reference, dgrad_reference, wgrad_reference

H200 = plan.DeviceLimits(132, 232448, 8)
Arrays = Mapping[str, np.ndarray | None]
# (launch, arrays, names of the outputs) -> outputs
Runner = Callable[[Launch, Arrays, tuple[str, ...]], dict[str, np.ndarray]]
# Unit roundoff of the stored and of the accumulated numbers.
ROUNDOFF = {
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-24),
    "float32": (2.0**-24, 2.0**-24),
    "float64": (2.0**-53, 2.0**-53),
    "int32": (0.0, 0.0),
}


def problem(
    n, h, w, c, k, r, s, *, strides=(1, 1), dilations=(1, 1), padding="SAME",
    groups=1, data_format="NHWC",
) -> Problem:  # fmt: skip
    """A Problem from its sizes; `c` and `k` count all groups."""
    geometry = Geometry(strides, padding, dilations, data_format)
    shape = (n, h, w, c) if data_format == "NHWC" else (n, c, h, w)
    return make_problem(shape, (r, s, c // groups, k), geometry)


def stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """`numbers` as the GPU stores them."""
    if dtype == "bfloat16":
        bits = np.asarray(numbers, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.asarray(numbers).astype(dtype)


def numbers_of(array: np.ndarray, dtype: str) -> np.ndarray:
    """What stored numbers mean, in float64."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def random_numbers(rng, shape, dtype: str) -> np.ndarray:
    """Stored random numbers."""
    if dtype == "int32":
        return rng.integers(-9, 10, shape).astype(np.int32)
    return stored(rng.standard_normal(shape), dtype)


def random_pattern(rng, shape, density: float) -> Pattern:
    """A pattern with an empty row, where there are several rows."""
    r, s, c, k = shape
    mask = rng.random((k, c * r * s)) < density
    if k > 2:
        mask[k // 2] = False
    counts = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    return Pattern(shape, counts, np.nonzero(mask)[1].astype(np.int32))


def dense_kernel(pattern: Pattern, values: np.ndarray) -> np.ndarray:
    """The HWIO kernel with these values, in their dtype."""
    kernel = np.zeros(pattern.shape, values.dtype)
    kernel.reshape(-1)[pattern.positions()] = values
    return kernel


def rows_arrays(rows: Rows) -> dict[str, np.ndarray | None]:
    """The operands that describe sparse rows."""
    return {
        "begin": np.ascontiguousarray(rows.begin),
        "end": np.ascontiguousarray(rows.end),
        "indices": rows.indices,
        "order": rows.order,
    }


def origins(gather: Gather) -> np.ndarray:
    """The operand `origins`."""
    return np.array(gather.h.origins + gather.w.origins, np.int32)


def kernel_taps(gather: Gather) -> np.ndarray:
    """The operand `taps`."""
    h, w = np.array(gather.h.kernel_taps), np.array(gather.w.kernel_taps)
    return np.concatenate([h.reshape(-1), w.reshape(-1)]).astype(np.int32)


class Case:
    """Random operands of one problem in one dtype."""

    def __init__(self, p: Problem, dtype: str, density: float = 0.3, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.problem, self.dtype = p, dtype
        self.pattern = random_pattern(rng, p.kernel_shape, density)
        self.values = random_numbers(rng, self.pattern.nnz, dtype)
        self.x = random_numbers(rng, p.input_shape, dtype)
        self.dy = random_numbers(rng, p.output_shape, dtype)
        self.bias = random_numbers(rng, p.k, dtype)

    def numbers(self, array: np.ndarray) -> np.ndarray:
        """An operand in float64."""
        return numbers_of(array, self.dtype)

    def kernel(self) -> np.ndarray:
        """The dense kernel in float64."""
        return dense_kernel(self.pattern, self.numbers(self.values))

    @functools.cached_property
    def expected(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What each pass should give, and the same with absolute values."""
        p, w = self.problem, self.kernel()
        x, dy, bias = map(self.numbers, (self.x, self.dy, self.bias))
        bias = bias if p.data_format == "NHWC" else bias[:, None, None]
        results = {}
        passes = {
            "fprop": lambda x, dy, w, b: conv2d_reference(x, w, p) + b,
            "dgrad": lambda x, dy, w, b: dgrad_reference(dy, w, p),
            "wgrad": lambda x, dy, w, b: wgrad_reference(x, dy, p),
        }
        for name, f in passes.items():
            exact = f(x, dy, w, bias)
            results[name] = exact, f(*map(np.abs, (x, dy, w, bias)))
        return results

    def check(self, name: str, got: np.ndarray, terms: int, at=slice(None)) -> None:
        """Raises AssertionError where `got` is further off than rounding explains."""
        exact, size = (array.reshape(-1)[at] for array in self.expected[name])
        store, accumulate = ROUNDOFF[self.dtype]
        got = self.numbers(got).reshape(-1)
        bound = 1.01 * store * np.abs(exact) + 2 * (terms + 4) * accumulate * size
        if self.dtype == "float16":
            bound = bound + 2.0**-24
        wrong = ~(np.abs(got - exact) <= bound)
        assert not wrong.any(), (
            f"{name} {self.dtype} {self.problem}: {wrong.sum()} of {wrong.size} wrong, "
            f"first at {np.flatnonzero(wrong)[:4]}: {got[wrong][:4]}, "
            f"expected {exact[wrong][:4]}"
        )


def run_fprop(run: Runner, case: Case, config=None, device=H200) -> None:
    """Checks the forward pass, with a bias."""
    gather = fprop_gather(case.problem)
    launch = plan.gather_launch(
        gather, case.dtype, case.pattern.nnz,
        has_bias=True, has_order=False, device=device, config=config,
    )  # fmt: skip
    arrays = {
        "read": case.x, "values": case.values, "bias": case.bias,
        "origins": origins(gather),
        "write": np.empty(case.problem.output_shape, case.x.dtype),
        **rows_arrays(case.pattern.fprop_rows()),
    }  # fmt: skip
    got = run(launch, arrays, ("write",))["write"]
    case.check("fprop", got, gather.row_length)


def run_dgrad(run: Runner, case: Case, config=None, device=H200) -> None:
    """Checks the input gradient."""
    gather = dgrad_gather(case.problem)
    launch = plan.gather_launch(
        gather, case.dtype, case.pattern.nnz,
        has_bias=False, has_order=True, device=device, config=config,
    )  # fmt: skip
    arrays = {
        "read": case.dy, "values": case.values, "origins": origins(gather),
        "write": np.empty(case.problem.input_shape, case.x.dtype),
        **rows_arrays(case.pattern.dgrad_rows(gather)),
    }  # fmt: skip
    got = run(launch, arrays, ("write",))["write"]
    case.check("dgrad", got, gather.row_length)


def both_passes(case: Case) -> tuple[tuple, tuple]:
    """Of each pass: name, gather, rows, what is read, shape of the result, bias."""
    p = case.problem
    fprop, dgrad = fprop_gather(p), dgrad_gather(p)
    fprop_rows, dgrad_rows = case.pattern.fprop_rows(), case.pattern.dgrad_rows(dgrad)
    return (
        ("fprop", fprop, fprop_rows, case.x, p.output_shape, case.bias),
        ("dgrad", dgrad, dgrad_rows, case.dy, p.input_shape, None),
    )


def run_baked(run: Runner, case: Case, config: BakedConfig, device=H200) -> int:
    """Checks both passes by generated code; returns how many comparisons were made."""
    count = 0
    for name, gather, rows, read, shape, bias in both_passes(case):
        block = baked.make_baked_block(
            gather, case.dtype, fitted(config, gather), device
        )
        if block is None:
            continue
        # Wherever what is read and written may leave the L2 cache first, results are
        # the same.
        streams = device is LITTLE
        block = dataclasses.replace(block, streams_in=streams, streams_out=streams)
        arrays = {
            "read": read, "bias": bias, "write": np.empty(shape, read.dtype),
            "origins": origins(gather) if baked.needs_origins(gather) else None,
        }  # fmt: skip
        values = case.numbers(case.values)
        parts = []
        for function in baked.bake(gather, rows, values, case.dtype, block):
            launch = baked.baked_launch(gather, case.dtype, block, function)
            parts.append(run(launch, arrays, ("write",))["write"])
        # What a part doesn't write is NaN.
        got = functools.reduce(
            lambda one, other: np.where(np.isnan(case.numbers(one)), other, one), parts
        )
        case.check(name, got, gather.row_length)
        count += 1
    return count


def run_spmm(run: Runner, case: Case, config: SpmmConfig) -> int:
    """Checks both passes by conv2d_spmm; returns how many comparisons were made."""
    count = 0
    for name, gather, rows, read, shape, bias in both_passes(case):
        group_in = gather.in_channels // gather.groups
        block = spmm.make_spmm_block(
            gather, case.dtype,
            dataclasses.replace(config, chunk=min(config.chunk, group_in)),
        )  # fmt: skip
        if block is None:
            continue
        placed = spmm.place_rows(gather, rows, case.dtype, block)
        if not spmm.fits(case.dtype, block, placed.capacity, H200):
            continue
        sizes = (gather, case.dtype, block, placed.capacity)
        arrays = {
            "values": case.values, "sources": placed.sources,
            "offsets": placed.offsets, "spans": placed.spans,
            "write": np.empty(spmm.entries_bytes(*sizes), np.uint8),
        }  # fmt: skip
        entries = run(spmm.place_launch(*sizes), arrays, ("write",))["write"]
        arrays = {
            "read": read, "entries": entries, "bias": bias,
            "origins": origins(gather), "write": np.empty(shape, read.dtype),
        }  # fmt: skip
        launch = spmm.spmm_launch(*sizes)
        case.check(name, run(launch, arrays, ("write",))["write"], gather.row_length)
        count += 1
    return count


def run_wgrad(run: Runner, case: Case, dense: bool, config=None, device=H200) -> None:
    """Checks the kernel's gradient, at the nonzeros or everywhere."""
    gather = fprop_gather(case.problem)
    first, second, nbytes = plan.wgrad_launches(
        gather, case.dtype, case.pattern.nnz, dense=dense, device=device, config=config
    )
    arrays = {
        "read": case.x, "gradient": case.dy, "origins": origins(gather),
        "workspace": np.empty(nbytes, np.uint8),
    }  # fmt: skip
    if not dense:
        rows = rows_arrays(case.pattern.fprop_rows())
        arrays.update({name: rows[name] for name in ("begin", "end", "indices")})
    results = int(np.prod(case.problem.kernel_shape)) if dense else case.pattern.nnz
    if not results:
        return
    workspace = run(first, arrays, ("workspace",))["workspace"]
    write = np.empty(results, case.x.dtype)
    got = run(second, {"workspace": workspace, "write": write}, ("write",))["write"]
    at = slice(None) if dense else case.pattern.positions()
    case.check("wgrad", got, case.problem.n * case.problem.p * case.problem.q, at)


def run_compress(run: Runner, case: Case, transposed: bool) -> None:
    """Checks the rows found in a dense kernel."""
    p = case.problem
    gather = dgrad_gather(p) if transposed else fprop_gather(p)
    launch = plan.compress_launch(
        gather, case.dtype, p.kernel_shape, transposed=transposed
    )
    values = np.where(
        case.numbers(case.values) == 0, stored(np.ones(1), case.dtype), case.values
    )
    kernel = dense_kernel(case.pattern, values)
    if case.dtype in ("float32", "float64"):
        kernel[kernel == 0] = -0.0
    slots = gather.rows * gather.row_length
    arrays = {
        "kernel": kernel, "taps": kernel_taps(gather),
        "begin": np.empty(gather.rows, np.int32),
        "end": np.empty(gather.rows, np.int32),
        "indices": np.empty(slots, np.int32), "values": np.empty(slots, kernel.dtype),
    }  # fmt: skip
    got = run(launch, arrays, ("begin", "end", "indices", "values"))
    rows = case.pattern.dgrad_rows(gather) if transposed else case.pattern.fprop_rows()
    values = values if rows.order is None else values[rows.order]
    for row in range(gather.rows):
        begin, end = got["begin"][row], got["end"][row]
        assert begin == row * gather.row_length, (row, begin)
        wanted = slice(rows.begin[row], rows.end[row])
        np.testing.assert_array_equal(got["indices"][begin:end], rows.indices[wanted])
        np.testing.assert_array_equal(got["values"][begin:end], values[wanted])


PROBLEMS = [
    problem(1, 9, 11, 3, 5, 3, 3),
    problem(2, 40, 37, 3, 20, 5, 3, strides=(2, 1)),
    problem(2, 33, 20, 6, 8, 3, 5, strides=(2, 3), dilations=(3, 2)),
    problem(3, 17, 19, 8, 12, 3, 3, groups=4, padding="VALID"),
    problem(5, 7, 7, 40, 70, 1, 1, strides=(2, 2)),
    problem(1, 30, 70, 3, 40, 11, 11),
    problem(1, 30, 45, 65, 3, 7, 5, padding=((5, 1), (0, 9))),
    problem(2, 14, 14, 6, 6, 3, 3, groups=6, dilations=(2, 2)),
    problem(1, 2, 3, 2, 4, 3, 3, strides=(5, 4)),
    problem(4, 1, 1, 33, 9, 1, 1),
]
CONFIGS = [
    plan.TileConfig(4, 4, 4, 2, 2, 8, 32, 4),
    plan.TileConfig(4, 4, 3, 2, 1, 16, 8, 3),
    plan.TileConfig(4, 4, 1, 3, 2, 9, 28, 2),
    plan.TileConfig(2, 8, 8, 4, 2, 8, 16, 5),
    plan.TileConfig(2, 8, 5, 1, 1, 16, 4, 64),
    plan.TileConfig(1, 8, 8, 8, 1, 4, 8, 2),
    plan.TileConfig(4, 4, 4, 2, 1, 16, 8, 3, passes=2),
    plan.TileConfig(1, 8, 2, 2, 4, 9, 14, 3),
    plan.TileConfig(2, 8, 2, 1, 2, 8, 16, 8, passes=3),
]
# As if there were one multiprocessor, so that a block computes several tiles.
LITTLE = dataclasses.replace(H200, multiprocessors=1)
BAKED_CONFIGS = [
    (BakedConfig(64, 4, 2, 4, 28, 4), LITTLE),
    (BakedConfig(8, 2, 1, 4, 16, 2**20), LITTLE),
    (BakedConfig(8, 2, 1, 4, 16, 2**20), H200),
    (BakedConfig(4, 2, 1, 10, 16, 4, pixels=4, vectors=False), LITTLE),
    (BakedConfig(64, 3, 1, 6, 28, 4, pixels=2), LITTLE),
    (BakedConfig(3, 4, 2, 4, 16, 8, teams=2), LITTLE),
    (BakedConfig(8, 2, 1, 4, 16, 2, splits=4), H200),
    (BakedConfig(6, 4, 1, 4, 16, 1, teams=2, splits=2), H200),
]
SPMM_CONFIGS = [
    SpmmConfig(1, 2, 2, 4, 2, 4, 8, 2**20),
    SpmmConfig(2, 2, 1, 16, 1, 7, 9, 8),
    SpmmConfig(4, 8, 5, 4, 1, 8, 14, 4),
    SpmmConfig(7, 4, 4, 2, 8, 14, 16, 1),
    SpmmConfig(7, 4, 2, 4, 2, 7, 8, 16, images=4),
    SpmmConfig(2, 8, 8, 2, 1, 7, 7, 3, images=2),
]
WGRAD_CONFIGS = [
    plan.WgradConfig(4, 2, 3, 8, 16, 3, 3),
    plan.WgradConfig(4, 8, 1, 18, 7, 2, 100),
]


def other_format(p: Problem) -> Problem:
    """The same problem with channels first."""
    geometry = Geometry(
        (p.stride_h, p.stride_w), ((p.pad_top, p.pad_top), (p.pad_left, p.pad_left)),
        (p.dilation_h, p.dilation_w), "NCHW",
    )  # fmt: skip
    return make_problem((p.n, p.c, p.h, p.w), p.kernel_shape, geometry)


def fits(gather: Gather, dtype: str, config) -> bool:
    """Whether the GPU can hold a configuration of conv2d_gather."""
    if not isinstance(config, plan.TileConfig):
        return True
    return make_block(gather, dtype, config, H200) is not None


def check(
    run: Runner, dtypes=tuple(ROUNDOFF), problems=None, configs=None, rest=True
) -> int:
    """Runs everything; returns how many comparisons were made."""
    count = 0
    problems = PROBLEMS if problems is None else problems
    configs = CONFIGS if configs is None else configs
    for p, dtype in itertools.product(
        [*problems, *map(other_format, problems)], dtypes
    ):
        case = Case(p, dtype)
        # The other dtypes differ in loads and stores alone.
        every = dtype in ("float32", "float64")
        for config in (None, plan.Direct(), *(configs if every else configs[::3])):
            for part, gather in (
                (run_fprop, fprop_gather(p)),
                (run_dgrad, dgrad_gather(p)),
            ):
                if fits(gather, dtype, config):
                    part(run, case, config)
                    count += 1
        # Each of these has to be compiled first.
        if dtype == "float32" or p in PROBLEMS[1:3]:
            count += check_baked(run, case)
        if dtype != "int32":
            count += check_spmm(run, case)
        if not rest:
            continue
        for dense, config in itertools.product(
            (False, True), (None, plan.Direct(), *WGRAD_CONFIGS)
        ):
            run_wgrad(run, case, dense, config)
            count += 1
        for transposed in (False, True):
            run_compress(run, case, transposed)
            count += 1
    return count


def check_baked(run: Runner, case: Case) -> int:
    """Checks generated code; returns how many comparisons were made."""
    if case.dtype == "int32":
        return 0
    return sum(run_baked(run, case, config, gpu) for config, gpu in BAKED_CONFIGS)


def check_spmm(run: Runner, case: Case) -> int:
    """Checks conv2d_spmm; returns how many comparisons were made."""
    return sum(run_spmm(run, case, config) for config in SPMM_CONFIGS)


def device_limits() -> plan.DeviceLimits:
    """Those of GPU 0."""
    import cupy

    device = cupy.cuda.Device(0)
    return plan.DeviceLimits.of(device.attributes, int(device.compute_capability))


@functools.lru_cache(maxsize=64)
def _loaded(function: str, defines: tuple, code: str):
    from sparse_conv import jit

    return jit.load_function(function, defines, 0, code)


def launch_on_gpu(launch: Launch, arrays) -> None:
    """Launches with CuPy arrays."""
    function = _loaded(launch.function, launch.defines, launch.code)
    packed = launch.pack(
        {name: array.data.ptr for name, array in arrays.items() if array is not None}
    )
    if launch.grid[0]:
        argument = np.frombuffer(packed, f"V{len(packed)}")[0]
        function(
            launch.grid, launch.block, (argument,), shared_mem=launch.shared_mem_bytes
        )


def gpu_runner(launch: Launch, arrays: Arrays, outputs: tuple[str, ...]):
    """Runs a launch on GPU 0; outputs are poisoned before."""
    import cupy

    given = {name: cupy.asarray(a) for name, a in arrays.items() if a is not None}
    for name in outputs:
        given[name].view(cupy.uint8).fill(0xFF)
    launch_on_gpu(launch, given)
    return {name: cupy.asnumpy(given[name]) for name in outputs}


def time_launches(launches, arrays, repeats: int = 30) -> tuple[float, float]:
    """Median and least microseconds of a sequence of launches, with a cold L2."""
    import cupy

    flush = cupy.zeros(64 * 2**20, cupy.float32)
    times = []
    for _ in range(repeats + 3):
        # Reading leaves no lines that the timed launches would have to write back.
        flush.sum()
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for launch in launches:
            launch_on_gpu(launch, arrays)
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3)
    return float(np.median(times[3:])), float(np.min(times[3:]))


def gpu_case(p: Problem, density: float, dtype: str = "float32"):
    """Operands on the GPU for timing: a dict with those of every pass."""
    import cupy

    rng = np.random.default_rng(1)
    pattern = random_pattern(rng, p.kernel_shape, density)
    gather = fprop_gather(p)
    rows = rows_arrays(pattern.fprop_rows())
    host = {
        "read": random_numbers(rng, p.input_shape, dtype),
        "gradient": random_numbers(rng, p.output_shape, dtype),
        "values": random_numbers(rng, pattern.nnz, dtype), "origins": origins(gather),
        "begin": rows["begin"], "end": rows["end"], "indices": rows["indices"],
    }  # fmt: skip
    arrays = {name: cupy.asarray(array) for name, array in host.items()}
    arrays["write"] = cupy.empty(p.output_shape, host["read"].dtype)
    return pattern, gather, arrays


def time_fprop(p: Problem, density: float, configs=(None,), dtype="float32") -> None:
    """Prints the times of the forward pass."""
    pattern, gather, arrays = gpu_case(p, density, dtype)
    device = device_limits()
    for config in configs:
        launch = plan.gather_launch(
            gather, dtype, pattern.nnz, has_bias=False, has_order=False,
            device=device, config=config,
        )  # fmt: skip
        median, least = time_launches([launch], arrays)
        text = config or plan.explain_gather(gather, dtype, pattern.nnz, device)
        print(f"{median:8.1f} {least:8.1f} us  {p} {dtype}  {text}", flush=True)


def time_wgrad(p: Problem, density: float, dense: bool, configs=(None,)) -> None:
    """Prints the times of the kernel's gradient."""
    import cupy

    pattern, gather, arrays = gpu_case(p, density)
    for config in configs:
        first, second, nbytes = plan.wgrad_launches(
            gather, "float32", pattern.nnz, dense=dense, device=device_limits(),
            config=config,
        )  # fmt: skip
        given = dict(arrays, workspace=cupy.empty(nbytes, cupy.uint8))
        for name in ("begin", "end", "indices") if dense else ():
            given.pop(name)
        given["write"] = cupy.empty(p.r * p.s * p.group_channels * p.k, cupy.float32)
        median, least = time_launches([first, second], given)
        print(
            f"{median:8.1f} {least:8.1f} us  wgrad dense={dense} {p} grid {first.grid} "
            f"block {first.block} shared {first.shared_mem_bytes} {config}",
            flush=True,
        )


def main() -> None:
    """Runs what the command line asks for."""
    import cupy

    if "check" in sys.argv:
        print(check(gpu_runner), "comparisons agree")
    if "sanitize" in sys.argv:
        # Without CuPy's pool the sanitizer sees every array's end.
        cupy.cuda.set_allocator(None)
        count = check(gpu_runner, ("float32",), PROBLEMS[1:4], CONFIGS[::3])
        print(count, "comparisons agree")
    if "baked" in sys.argv:
        cupy.cuda.set_allocator(None)
        problems = [*PROBLEMS[1:5], *map(other_format, PROBLEMS[1:3])]
        cases = [Case(p, dtype) for p in problems for dtype in ("float32", "float16")]
        print(sum(check_baked(gpu_runner, c) for c in cases), "comparisons agree")
    if "spmm" in sys.argv:
        cupy.cuda.set_allocator(None)
        problems = [*PROBLEMS, *map(other_format, PROBLEMS[1:3])]
        cases = [Case(p, dtype) for p in problems for dtype in ("float32", "float16")]
        print(sum(check_spmm(gpu_runner, c) for c in cases), "comparisons agree")
    if "time" in sys.argv:
        time_fprop(problem(1, 256, 512, 3, 64, 11, 11), 0.1)


if __name__ == "__main__":
    main()
