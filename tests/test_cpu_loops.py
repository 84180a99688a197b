"""The CPU loops on NumPy arrays: values, what never takes part, threads, processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from sparse_conv.backends import (
    cpu_code,
    cpu_loops,
    cpu_memory,
    cpu_plan,
    cpu_threads,
    cpu_tiles,
)
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Pattern, Rows
from tests.reference import conv2d_reference, dgrad_reference, wgrad_reference
from tests.strategies import Call, Data, calls, make_data
from tests.tolerance import assert_exact, assert_within, error_bound

EXAMPLES = max(150, settings.default.max_examples)
DTYPES = ("float32", "float64", "int32")

# Their outputs are whole vectors, in blocks and parts that may not be.
STREAMED = (
    Call((2, 17, 33, 3), (5, 5, 3, 64), density=0.2),
    Call((1, 9, 40, 128), (3, 3, 128, 208), density=0.6),
    Call((1, 3, 600, 5), (3, 3, 5, 48), density=0.4),
    Call((2, 21, 22, 24), (3, 3, 24, 32), strides=2, density=0.5),
    Call((3, 20, 20, 32), (1, 1, 32, 16), density=0.3),
)
# Large enough for several tasks and threads, channel blocks and tiles of every kind.
LARGE = (
    Call((2, 45, 70, 3), (11, 11, 3, 21), density=0.2),
    Call((3, 30, 40, 24), (3, 3, 24, 20), strides=2, density=0.4),
    Call((2, 33, 24, 31), (5, 5, 33, 18), data_format="NCHW", dilations=2),
    Call((4, 7, 7, 160), (3, 3, 160, 40), density=0.3),
    Call((2, 19, 23, 36), (3, 3, 2, 36), density=0.6),
    Call((2, 40, 50, 64), (1, 1, 64, 40), density=0.2),
    Call((1, 1, 3000, 4), (1, 9, 4, 8), density=0.5),
    Call((2, 3000, 1, 4), (9, 1, 4, 8), density=0.5),
)
LARGE_IDS = [str(call.problem) for call in LARGE]


@pytest.fixture(autouse=True)
def default_threads() -> Iterator[None]:
    yield
    cpu_threads.set_thread_limit(None)


@pytest.fixture
def streams_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans let outputs of every size pass the caches by."""
    monkeypatch.setattr(cpu_tiles, "STREAMED_BYTES", 1)
    cpu_plan.make_plan.cache_clear()
    yield
    cpu_plan.make_plan.cache_clear()


def sparse(kernel: np.ndarray) -> tuple[Pattern, np.ndarray]:
    """The pattern and the values of a dense HWIO kernel."""
    outputs = kernel.shape[3]
    by_row = kernel.transpose(3, 2, 0, 1).reshape(outputs, -1)
    k, indices = np.nonzero(by_row)
    indptr = np.searchsorted(k, np.arange(outputs + 1)).astype(np.int32)
    pattern = Pattern(kernel.shape, indptr, indices.astype(np.int32))
    return pattern, by_row[k, indices]


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An output that shows what was not written."""
    return np.full(shape, np.nan if dtype.kind == "f" else 0x5A5A5A5A, dtype)


def gathered(
    gather: Gather,
    rows: Rows,
    values: np.ndarray,
    read: np.ndarray,
    shape: tuple[int, ...],
    bias: np.ndarray | None = None,
    activation: int = 0,
    baked: bool = False,
) -> np.ndarray:
    write = poisoned(shape, read.dtype)
    # Code is generated for floating-point numbers only.
    baked = baked and read.dtype.kind == "f"
    cpu_loops.gather(gather, rows, values, read, write, bias, activation, baked)
    return write


def run_fprop(
    call: Call, data: Data, x: np.ndarray | None = None, baked: bool = False
) -> np.ndarray:
    problem, (pattern, values) = call.problem, sparse(data.kernel)
    x = (data.x if x is None else x).reshape(problem.input_shape)
    return gathered(
        fprop_gather(problem), pattern.fprop_rows(), values, x, problem.output_shape,
        data.bias, baked=baked,
    )  # fmt: skip


def run_all(call: Call, data: Data, baked: bool = False) -> dict[str, np.ndarray]:
    """Every pass of a call."""
    problem, (pattern, values) = call.problem, sparse(data.kernel)
    forward, backward = fprop_gather(problem), dgrad_gather(problem)
    x = data.x.reshape(problem.input_shape)
    dy = data.dy.reshape(problem.output_shape)
    dvalues = poisoned(values.shape, x.dtype)
    dkernel = poisoned(data.kernel.shape, x.dtype)
    cpu_loops.wgrad(forward, pattern.fprop_rows(), x, dy, dvalues)
    cpu_loops.wgrad_dense(forward, x, dy, dkernel)
    dx = gathered(
        backward, pattern.dgrad_rows(backward), values, dy, problem.input_shape,
        baked=baked,
    )  # fmt: skip
    return {
        "fprop": run_fprop(call, data, baked=baked),
        "dgrad": dx,
        "wgrad": dvalues,
        "wgrad_dense": dkernel,
    }


def references(call: Call, data: Data, absolute: bool = False) -> dict[str, np.ndarray]:
    """The same in float64; `absolute` takes the operands' absolute values."""
    problem, (pattern, _) = call.problem, sparse(data.kernel)
    change = np.abs if absolute else np.asarray
    x = change(data.x).reshape(problem.input_shape)
    dy = change(data.dy).reshape(problem.output_shape)
    kernel = change(data.kernel)
    y = conv2d_reference(x, kernel, problem)
    if data.bias is not None:
        shape = (-1,) if problem.data_format == "NHWC" else (-1, 1, 1)
        y = y + change(data.bias).astype(np.float64).reshape(shape)
    dkernel = wgrad_reference(x, dy, problem)
    return {
        "fprop": y,
        "dgrad": dgrad_reference(dy, kernel, problem),
        "wgrad": dkernel.reshape(-1)[pattern.positions()],
        "wgrad_dense": dkernel,
    }


def terms(call: Call) -> dict[str, int]:
    p = call.problem
    taps, outputs = p.r * p.s, p.n * p.p * p.q
    return {
        "fprop": taps * p.group_channels + 1,
        "dgrad": taps * (p.k // p.groups),
        "wgrad": outputs,
        "wgrad_dense": outputs,
    }


def check(call: Call, baked: bool = False) -> None:
    """Compares every pass with the reference: exactly where sums are exact."""
    data = make_data(call)
    actual, expected = run_all(call, data, baked), references(call, data)
    if call.integers or call.dtype == "int32":
        for name, result in actual.items():
            assert_exact(result, expected[name], name)
        return
    magnitudes, counts = references(call, data, absolute=True), terms(call)
    for name, result in actual.items():
        bound = error_bound(call.dtype, expected[name], magnitudes[name], counts[name])
        assert_within(result, expected[name], bound, name)


@settings(max_examples=EXAMPLES)
@given(call=calls(DTYPES))
def test_every_pass_agrees_with_the_reference(call):
    check(call)


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "random"])
@pytest.mark.parametrize("call", LARGE, ids=LARGE_IDS)
def test_large_problems_agree_with_the_reference(call, integers):
    check(replace(call, integers=integers))


@pytest.mark.usefixtures("streams_all")
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("threads", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", STREAMED, ids=[str(call.problem) for call in STREAMED])
def test_outputs_that_pass_the_caches_by(call, dtype, threads, aligned):
    call = replace(call, dtype=dtype, integers=True)
    cpu_threads.set_thread_limit(threads)
    data = make_data(call)
    problem, (pattern, values) = call.problem, sparse(data.kernel)
    size = math.prod(problem.output_shape)
    memory = poisoned((size + 64,), np.dtype(dtype))
    begin = -memory.ctypes.data % 64 // memory.itemsize + (0 if aligned else 1)
    write = memory[begin : begin + size].reshape(problem.output_shape)
    cpu_loops.gather(
        fprop_gather(problem), pattern.fprop_rows(), values,
        data.x.reshape(problem.input_shape), write, data.bias,
    )  # fmt: skip
    assert_exact(write, references(call, data)["fprop"], "fprop")
    rest = np.delete(memory, np.s_[begin : begin + size])
    assert np.array_equal(rest, poisoned(rest.shape, rest.dtype), equal_nan=True)


@pytest.mark.usefixtures("streams_all")
@pytest.mark.parametrize("core", cpu_tiles.CORES)
@pytest.mark.parametrize("call", STREAMED + LARGE, ids=lambda call: str(call.problem))
def test_plans_for_every_kind_of_core_agree_with_the_reference(call, core, monkeypatch):
    monkeypatch.setattr(cpu_code, "core", lambda: core)
    check(replace(call, integers=True))


def test_gradients_do_not_follow_the_kind_of_core(monkeypatch):
    call = LARGE[3]
    gather, (pattern, _) = fprop_gather(call.problem), sparse(make_data(call).kernel)
    plans = []
    for core in cpu_tiles.CORES:
        monkeypatch.setattr(cpu_code, "core", lambda core=core: core)
        entries = cpu_loops.prepare_wgrad(
            gather, pattern.fprop_rows(), np.dtype("float32")
        )
        plans.append(entries.tables.plan)
    assert len(set(plans)) == 1


def test_any_time_to_wait_for_is_some_rounds():
    assert cpu_threads._rounds(0.0) == 1
    assert cpu_threads._rounds(1e-3) > 1


def check_skipped_zeros(call: Call, baked: bool = False) -> None:
    """Compares outputs that Inf and NaN don't reach with those of a finite input."""
    data = make_data(replace(call, integers=True))
    rng = np.random.default_rng(call.seed)
    odd = rng.choice([np.inf, -np.inf, np.nan], data.x.shape)
    x = np.where(rng.random(data.x.shape) < 0.05, odd, data.x).astype(data.x.dtype)
    problem = call.problem
    # An output that reads an odd input through a weight that is not zero is free.
    met = conv2d_reference(
        ~np.isfinite(x.reshape(problem.input_shape)), data.kernel != 0, problem
    )
    finite = np.where(np.isfinite(x), x, 0)
    expected = run_fprop(call, data, finite, baked)
    actual = run_fprop(call, data, x, baked)
    np.testing.assert_array_equal(actual[met == 0], expected[met == 0])
    assert not np.isfinite(actual[met > 0]).any()


@settings(max_examples=EXAMPLES // 3)
@given(call=calls(("float32", "float64")))
def test_skipped_zeros_never_meet_inf_or_nan(call):
    check_skipped_zeros(call)


@settings(max_examples=EXAMPLES // 3)
@given(call=calls(("float32",)))
def test_weight_gradients_see_inf_and_nan_where_the_definition_does(call):
    data = make_data(replace(call, integers=True))
    rng = np.random.default_rng(call.seed)
    x = data.x.copy()
    if x.size:
        x.reshape(-1)[rng.integers(x.size)] = np.nan
    problem = call.problem
    shape, dy = problem.input_shape, data.dy.reshape(problem.output_shape)
    met = wgrad_reference(np.isnan(x.reshape(shape)), np.ones_like(dy), problem)
    expected = wgrad_reference(np.nan_to_num(x).reshape(shape), dy, problem)
    dkernel = poisoned(data.kernel.shape, x.dtype)
    cpu_loops.wgrad_dense(fprop_gather(problem), x.reshape(shape), dy, dkernel)
    np.testing.assert_array_equal(np.isnan(dkernel), met > 0)
    np.testing.assert_array_equal(dkernel[met == 0], expected[met == 0])


def test_an_output_without_nonzeros_is_plus_zero():
    call = Call((2, 6, 5, 4), (3, 3, 4, 9), density=0.0)
    data = make_data(call)
    y = run_fprop(call, data, np.full_like(data.x, -np.inf))
    np.testing.assert_array_equal(y, np.zeros_like(y))
    assert not np.signbit(y).any()


def test_int32_wraps_around():
    call = Call((1, 2, 3, 2), (1, 1, 2, 3), dtype="int32", density=1.0)
    data = make_data(call)
    x, kernel = np.full_like(data.x, 2**30 + 1), np.full_like(data.kernel, 7)
    y = run_fprop(call, replace(data, x=x, kernel=kernel))
    np.testing.assert_array_equal(y, np.int64(14 * (2**30 + 1)).astype(np.int32))


ACTIVATIONS = {
    0: lambda y: y,
    1: lambda y: np.maximum(y, 0),
    2: lambda y: np.clip(y, 0, 6),
    3: lambda y: np.where(y < 0, np.float64(np.float32(0.2)) * y, y),
    4: lambda y: np.where(y < 0, np.expm1(np.minimum(y, 0)), y),
    5: lambda y: 1 / (1 + np.exp(-y)),
    6: np.tanh,
    7: lambda y: 0.5 * y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))),
    8: lambda y: y / (1 + np.exp(-y)),
}


def check_bias_and_activation(
    dtype: str, activation: int, data_format: str, *, outputs: int, baked: bool = False
) -> None:
    """The epilogue agrees with the reference, by loops or by code."""
    shape = (2, 5, 9, 6) if data_format == "NHWC" else (2, 6, 5, 9)
    kernel = (3, 2, 6, outputs)
    call = Call(shape, kernel, 1, "SAME", data_format, dtype=dtype, bias=True)
    data, problem = make_data(call), call.problem
    # One output channel has a bias alone.
    data.kernel[..., 3] = 0
    pattern, values = sparse(data.kernel)
    actual = gathered(
        fprop_gather(problem), pattern.fprop_rows(), values, data.x,
        problem.output_shape, data.bias, activation, baked=baked,
    )  # fmt: skip
    expected = ACTIVATIONS[activation](references(call, data)["fprop"])
    tolerance = {"float32": 2e-5, "float64": 1e-13, "int32": 0}[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_activation(dtype, activation, data_format):
    if dtype == "int32" and activation > 2:
        pytest.skip("int32 has no such activation")
    check_bias_and_activation(dtype, activation, data_format, outputs=10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan_and_have_limits(activation):
    limits = {1: 0, 2: 0, 4: -1, 5: 0, 6: -1}
    call = Call((1, 4, 4, 1), (1, 1, 1, 1))
    problem, (pattern, values) = call.problem, sparse(np.ones((1, 1, 1, 1), np.float32))
    for value, expected in ((np.nan, np.nan), (-np.inf, limits.get(activation))):
        read = np.full(problem.input_shape, value, np.float32)
        y = gathered(
            fprop_gather(problem), pattern.fprop_rows(), values, read,
            problem.output_shape, None, activation,
        )  # fmt: skip
        if expected is not None:
            np.testing.assert_array_equal(y, np.full_like(y, expected))


@pytest.mark.parametrize("call", LARGE, ids=LARGE_IDS)
def test_results_do_not_depend_on_the_number_of_threads(call):
    data = make_data(call)
    expected = run_all(call, data)
    for limit in (1, 2, 3, 7):
        cpu_threads.set_thread_limit(limit)
        for name, result in run_all(call, data).items():
            np.testing.assert_array_equal(result, expected[name], err_msg=name)


@pytest.mark.parametrize("call", LARGE, ids=LARGE_IDS)
def test_results_do_not_depend_on_what_scratch_memory_held(call):
    cpu_threads.set_thread_limit(1)
    data = make_data(call)
    expected = run_all(call, data)
    # All bits set are NaN; 0x7F800000 is Inf.
    for word in (0, 0xFFFFFFFF, 0x7F800000):
        memory = np.full(2**21 + 16, word, np.uint32)
        address = -(-memory.ctypes.data // 64) * 64
        cpu_memory._scratch.held = (2**23, memory, address)
        for name, result in run_all(call, data).items():
            np.testing.assert_array_equal(result, expected[name], err_msg=name)


def test_concurrent_calls():
    cpu_threads.set_thread_limit(3)
    data = [make_data(call) for call in LARGE]
    expected = [run_all(*pair) for pair in zip(LARGE, data, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = list(pool.map(run_all, LARGE, data))
            for result, wanted in zip(results, expected, strict=True):
                for name in wanted:
                    np.testing.assert_array_equal(result[name], wanted[name])


def test_read_only_and_unusual_memory():
    call = Call((1, 9, 10, 5), (3, 3, 5, 9), integers=True)
    data, problem = make_data(call), call.problem
    odd = np.empty(data.x.nbytes + 4, np.uint8)[4:].view(np.float32)
    x = odd.reshape(data.x.shape)
    x[...] = data.x
    x.flags.writeable = False
    pattern, values = sparse(data.kernel)
    values.flags.writeable = False
    y = gathered(
        fprop_gather(problem), pattern.fprop_rows(), values, x, problem.output_shape
    )
    assert_exact(y, conv2d_reference(x, data.kernel, problem), "fprop")


def test_rows_with_slack_between_them():
    """Rows may own more slots than they fill: what lies between is never read."""
    call = Call((1, 8, 9, 3), (3, 3, 3, 11), integers=True, density=0.5)
    data, problem = make_data(call), call.problem
    pattern, values = sparse(data.kernel)
    length, counts = 27, np.diff(pattern.indptr)
    begin = np.arange(11, dtype=np.int32) * length
    slots = (
        np.repeat(begin, counts)
        + np.arange(pattern.nnz)
        - np.repeat(pattern.indptr[:-1], counts)
    )
    indices = np.full(11 * length, 2**31 - 1, np.int32)
    slack = np.full(11 * length, np.nan, np.float32)
    indices[slots], slack[slots] = pattern.indices, values
    rows = Rows(begin, (begin + counts).astype(np.int32), indices, None)
    y = gathered(fprop_gather(problem), rows, slack, data.x, problem.output_shape)
    assert_exact(y, references(call, data)["fprop"], "fprop")


_FORK = """
import os, sys, threading
import numpy as np
from tests import test_cpu_loops as t
from sparse_conv.backends import cpu_memory, cpu_threads
cpu_threads.set_thread_limit(2)
call = t.LARGE[0]
data = t.make_data(call)
expected = t.run_fprop(call, data)
sys.stdout.flush()
with cpu_threads._state.lock, cpu_memory._blocks.lock:
    child = os.fork()
same = np.array_equal(t.run_fprop(call, data), expected)
if child == 0:
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if same and status == 0 else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_with_threads_of_its_own():
    # In a process of its own: a fork of this one would inherit pytest's threads.
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", _FORK], cwd=root, check=True, timeout=120)


def test_tasks_all_run_once():
    """Tasks of compiled code, in more threads than there are cores."""
    call = Call((3, 40, 60, 5), (3, 3, 5, 40), integers=True)
    data = make_data(call)
    expected = references(call, data)["fprop"]
    for limit in (1, 2, 5, 16):
        cpu_threads.set_thread_limit(limit)
        for _ in range(30):
            assert_exact(run_fprop(call, data), expected, f"{limit} threads")


def test_thread_limit():
    with pytest.raises(ValueError, match="at least 1"):
        cpu_threads.set_thread_limit(0)
    cpu_threads.set_thread_limit(5)
    assert cpu_threads.thread_count() == 5
    cpu_threads.set_thread_limit(None)
    assert cpu_threads.thread_count() >= 1


def test_numbers_of_threads(monkeypatch):
    monkeypatch.setattr(cpu_threads.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu_threads._environment_threads.cache_clear()
    assert cpu_threads.thread_count() == 6
    assert cpu_threads.thread_count(4) == 4
    assert cpu_threads.thread_count(40) == 6
    for text, expected in (("3", 3), ("2,1", 2), ("90", 6), ("", 6), ("dynamic", 6)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        cpu_threads._environment_threads.cache_clear()
        assert cpu_threads.thread_count() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cpu_threads._environment_threads.cache_clear()
    # TensorFlow's setting is nearer to the user than the environment's.
    assert cpu_threads.thread_count(5) == 5
    cpu_threads.set_thread_limit(9)
    assert cpu_threads.thread_count(5) == 9
    monkeypatch.undo()
    cpu_threads._environment_threads.cache_clear()


_SETTING = """
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
import sparse_conv
from sparse_conv.backends import cpu_threads
kernel = sparse_conv.SparseKernel.from_dense(tf.ones((3, 3, 8, 8)))
sparse_conv.conv2d(tf.ones((4, 64, 64, 8)), kernel, 1, "SAME")
assert cpu_threads._state.helpers == 0
"""


def test_the_setting_of_tensorflow_is_honoured():
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", _SETTING], cwd=root, check=True, timeout=120)
