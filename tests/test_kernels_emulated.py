"""The GPU's functions agree with the definition, run by the emulator.

On whole numbers, whose sums are exact, results are compared for equality; on other data
with the bound that rounding explains.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sparse_conv import plan, tiling
from sparse_conv.gather import dgrad_gather, fprop_gather
from sparse_conv.pattern import Rows
from tests.emulated_passes import (
    LARGE_GPU,
    SMALL_GPU,
    assert_rows,
    compress_call,
    dgrad_call,
    fprop_call,
    run_calls,
    run_wgrads,
    tile_configs,
    wgrad_calls,
)
from tests.emulator import build_functions
from tests.problems import (
    DENSITIES,
    DTYPES,
    FEW_PROBLEMS,
    PROBLEMS,
    make,
    make_data,
    make_pattern,
    random_problems,
)
from tests.reference import conv2d_reference, dgrad_reference, wgrad_reference
from tests.tolerance import assert_exact, assert_within, error_bound

FLOATS = tuple(dtype for dtype in DTYPES if dtype != "int32")

PASSES = ((fprop_call, fprop_gather), (dgrad_call, dgrad_gather))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Builds all functions side by side, before the first test needs one."""
    build_functions(plan.reachable())


def wgrad_at_nonzeros(problem, data) -> np.ndarray:
    dense = wgrad_reference(data.x, data.dy, problem)
    return dense.reshape(-1)[data.pattern.positions()]


def assert_fprop_and_dgrad_exact(problem, dtype, densities, configs_of) -> None:
    """Runs both passes with every density and configuration, in one process."""
    calls, expected, labels = [], [], []
    for density in densities:
        data = make_data(problem, dtype, density, whole=True)
        for gather, make_call, array, reference in (
            (fprop_gather(problem), fprop_call, data.x, conv2d_reference),
            (dgrad_gather(problem), dgrad_call, data.dy, dgrad_reference),
        ):
            result = reference(array, data.dense, problem)
            for config in configs_of(gather, dtype, data.pattern.nnz):
                calls.append(make_call(problem, data, dtype, config=config))
                expected.append(result)
                labels.append(f"{make_call.__name__} density={density} {config}")
    for written, result, label in zip(run_calls(calls), expected, labels, strict=True):
        assert_exact(written["write"], result, label)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_fprop_and_dgrad_are_exact(problem):
    assert_fprop_and_dgrad_exact(problem, "float32", DENSITIES, tile_configs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_fprop_and_dgrad_are_exact_in_every_dtype(problem, dtype):
    assert_fprop_and_dgrad_exact(problem, dtype, (0.3,), one_tile_of_each_variant)


def one_tile_of_each_variant(gather, dtype, nnz):
    """For each compiled variant: some configuration of it that fits."""
    fitting = {
        (config.positions, config.rows): config
        for config in tiling.candidates(gather, dtype, SMALL_GPU)
        if tiling.make_block(gather, dtype, config, SMALL_GPU)
    }
    assert set(fitting) == set(tiling.GATHER_VARIANTS)
    return [None, plan.Direct(), *fitting.values()]


def many_tiles(gather, dtype, nnz):
    """A sample of what the planner compares, and of odder sizes."""
    candidates = set(tiling.candidates(gather, dtype, SMALL_GPU))
    odd = {replace(c, chunk=1, tile_h=max(1, c.tile_h - 1)) for c in candidates}
    group_in = gather.in_channels // gather.groups
    again = {replace(c, chunk=group_in, passes=2) for c in candidates}
    fitting = [
        config
        for config in sorted(candidates | odd | again, key=repr)
        if tiling.make_block(gather, dtype, config, SMALL_GPU)
    ]
    sample = np.random.default_rng(0).choice(len(fitting), 30, replace=False)
    return [fitting[number] for number in sample]


@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_many_tiles_are_exact(problem):
    assert_fprop_and_dgrad_exact(problem, "float32", (0.3,), many_tiles)


@pytest.mark.parametrize("seed", range(8))
def test_random_problems_are_exact(seed):
    for problem in random_problems(5, seed):
        assert_fprop_and_dgrad_exact(problem, "float32", (0.4,), tile_configs)
        assert_wgrads_exact(problem, "float32", (0.4,))


def assert_wgrads_exact(problem, dtype, densities) -> None:
    choices = [
        {"config": None, "device": SMALL_GPU},
        {"config": None, "device": LARGE_GPU},
        {"config": plan.Direct(), "device": LARGE_GPU},
    ]
    data = make_data(problem, dtype, 0.5, whole=True)
    pairs = [wgrad_calls(problem, data, dtype, dense=True, **c) for c in choices]
    expected = [wgrad_reference(data.x, data.dy, problem)] * len(choices)
    for density in densities:
        data = make_data(problem, dtype, density, whole=True)
        for choice in choices[1:]:
            pairs.append(wgrad_calls(problem, data, dtype, dense=False, **choice))
            expected.append(wgrad_at_nonzeros(problem, data))
    for written, result in zip(run_wgrads(pairs), expected, strict=True):
        assert_exact(written, result, "wgrad")


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_wgrad_is_exact(problem):
    assert_wgrads_exact(problem, "float32", DENSITIES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_wgrad_is_exact_in_every_dtype(problem, dtype):
    assert_wgrads_exact(problem, dtype, (0.3,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_rounding_of_fprop_and_dgrad_stays_within_the_bound(problem, dtype):
    data = make_data(problem, dtype, 0.6, whole=False)
    taps = problem.r * problem.s
    for make_call, make_gather, reference, array, terms in (
        (fprop_call, fprop_gather, conv2d_reference, data.x, taps * problem.c),
        (dgrad_call, dgrad_gather, dgrad_reference, data.dy, taps * problem.k),
    ):
        expected = reference(array, data.dense, problem)
        magnitude = reference(magnitudes(array), magnitudes(data.dense), problem)
        bound = error_bound(dtype, expected, magnitude, terms // problem.groups)
        configs = tile_configs(make_gather(problem), dtype, data.pattern.nnz)
        calls = [make_call(problem, data, dtype, config=config) for config in configs]
        for result in run_calls(calls):
            assert_within(result["write"], expected, bound, make_call.__name__)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_rounding_of_wgrad_stays_within_the_bound(problem, dtype):
    data = make_data(problem, dtype, 0.6, whole=False)
    expected = wgrad_reference(data.x, data.dy, problem)
    magnitude = wgrad_reference(magnitudes(data.x), magnitudes(data.dy), problem)
    terms = problem.n * problem.p * problem.q
    bound = error_bound(dtype, expected, magnitude, terms)
    pairs = [wgrad_calls(problem, data, dtype, dense=dense) for dense in (True, False)]
    dense_result, sparse_result = run_wgrads(pairs)
    assert_within(dense_result, expected, bound, "dense wgrad")
    places = data.pattern.positions()
    expected, bound = expected.reshape(-1)[places], bound.reshape(-1)[places]
    assert_within(sparse_result, expected, bound, "wgrad")


def magnitudes(array: np.ndarray) -> np.ndarray:
    return np.abs(array.astype(np.float64))


def test_int32_wraps_around():
    problem = FEW_PROBLEMS[0]
    data = make_data(problem, "int32", 0.5, whole=True)
    large = np.int32(2**28 + 12345)
    data = replace(data, x=data.x * large, dy=data.dy * large, values=data.values * 77)
    dense = np.zeros(problem.kernel_shape, np.int32)
    dense.reshape(-1)[data.pattern.positions()] = data.values
    # Exact in float64: 2^31 * 2^10 * (number of terms) stays below 2^53.
    y = conv2d_reference(data.x, dense, problem)
    dx = dgrad_reference(data.dy, dense, problem)
    calls = [fprop_call(problem, data, "int32"), dgrad_call(problem, data, "int32")]
    for result, expected in zip(run_calls(calls), (y, dx), strict=True):
        assert np.abs(expected).max() > 2**31
        wrapped = expected.astype(np.int64).astype(np.int32)
        np.testing.assert_array_equal(result["write"], wrapped)


ACTIVATIONS = {
    0: lambda x: x,
    1: lambda x: np.maximum(x, 0),
    2: lambda x: np.clip(x, 0, 6),
    # TensorFlow keeps alpha in float32 for every dtype.
    3: lambda x: np.where(x < 0, float(np.float32(0.2)) * x, x),
    4: lambda x: np.where(x < 0, np.expm1(x), x),
    5: lambda x: 1 / (1 + np.exp(-x)),
    6: np.tanh,
    7: lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    8: lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_activations(dtype):
    problem = FEW_PROBLEMS[0]
    data = make_data(problem, dtype, 0.3, whole=False)
    bias = data.bias.astype(np.float64)
    sums = conv2d_reference(data.x, data.dense, problem) + bias
    magnitude = conv2d_reference(magnitudes(data.x), magnitudes(data.dense), problem)
    magnitude += np.abs(bias)
    terms = problem.r * problem.s * problem.c
    codes = [0, 1, 2] if dtype == "int32" else list(ACTIVATIONS)
    configs = tile_configs(fprop_gather(problem), dtype, data.pattern.nnz)
    pairs = [(code, config) for code in codes for config in configs]
    results = run_calls(
        [
            fprop_call(problem, data, dtype, bias=True, activation=code, config=config)
            for code, config in pairs
        ]
    )
    for (code, config), result in zip(pairs, results, strict=True):
        expected = ACTIVATIONS[code](sums)
        if dtype == "int32":
            assert_exact(result["write"], expected, f"activation {code}")
            continue
        # No slope exceeds 1.13; the functions themselves are right to a few units, of
        # numbers near 1 where they are differences.
        bound = 1.13 * error_bound(dtype, expected, magnitude, terms)
        bound += error_bound(dtype, 0 * sums, 1 + np.abs(sums), 4)
        assert_within(result["write"], expected, bound, f"activation {code}, {config}")


def test_nan_passes_every_activation():
    problem = make((1, 3, 4, 2), (1, 1, 2, 3))
    data = make_data(problem, "float32", 1.0, whole=False)
    data.x[0, 1, 1, 0] = np.nan
    calls = [
        fprop_call(problem, data, "float32", activation=code, config=config)
        for code in ACTIVATIONS
        for config in tile_configs(fprop_gather(problem), "float32", data.pattern.nnz)
    ]
    for result in run_calls(calls):
        isnan = np.isnan(result["write"])
        assert isnan[0, 1, 1].all()
        assert isnan.sum() == problem.k


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_skipped_zeros_stop_inf_and_nan(dtype, poison):
    """Channel 0 of the input meets no weight: whatever it holds must not be seen."""
    for problem in FEW_PROBLEMS:
        data = make_data(problem, dtype, 1.0, whole=True)
        keep = data.dense.copy()
        keep[:, :, 0] = 0
        keep[..., 0] = 0
        clean = replace_kernel(data, keep)
        channel = (slice(None),) * (3 if problem.data_format == "NHWC" else 1)
        dirty = replace(clean, x=clean.x.copy(), dy=clean.dy.copy())
        groups = slice(0, None, problem.group_channels)
        dirty.x[(*channel, groups)] = poison
        dirty.dy[(*channel, 0)] = poison
        calls, expected = [], []
        for make_call, make_gather, reference, array in (
            (fprop_call, fprop_gather, conv2d_reference, clean.x),
            (dgrad_call, dgrad_gather, dgrad_reference, clean.dy),
        ):
            gather = make_gather(problem)
            for config in tile_configs(gather, dtype, clean.pattern.nnz):
                calls.append(make_call(problem, dirty, dtype, config=config))
                expected.append(reference(array, keep, problem))
        for result, exact in zip(run_calls(calls), expected, strict=True):
            assert_exact(result["write"], exact, str(problem))


def replace_kernel(data, dense):
    """The same data with another dense kernel, compressed."""
    pattern = make_pattern(dense != 0)
    values = dense.reshape(-1)[pattern.positions()]
    return replace(data, dense=dense, pattern=pattern, values=values)


@pytest.mark.parametrize("problem", PROBLEMS[:60:3], ids=str)
def test_nan_spreads_only_to_what_reads_it(problem):
    """One NaN in the input, one in the gradient; their neighbours share tiles."""
    data = make_data(problem, "float32", 1.0, whole=True)
    clean_dy = data.dy.copy()
    rng = np.random.default_rng(0)
    for array in (data.x, data.dy):
        array.reshape(-1)[rng.integers(array.size)] = np.nan
    calls, expected = [], []
    for make_call, make_gather, reference, array in (
        (fprop_call, fprop_gather, conv2d_reference, data.x),
        (dgrad_call, dgrad_gather, dgrad_reference, data.dy),
    ):
        for config in tile_configs(make_gather(problem), "float32", data.pattern.nnz):
            calls.append(make_call(problem, data, "float32", config=config))
            expected.append(reference(array, data.dense, problem))
    for result, exact in zip(run_calls(calls), expected, strict=True):
        assert_exact(result["write"], exact, str(problem))
    # For wgrad only the input: what a gradient of NaN makes of padding is undefined.
    data = replace(data, dy=clean_dy)
    pairs = [
        wgrad_calls(problem, data, "float32", dense=True, config=config)
        for config in (None, plan.Direct())
    ]
    expected = wgrad_reference(data.x, data.dy, problem)
    for result in run_wgrads(pairs):
        assert_exact(result, expected, "wgrad")


def test_outputs_without_weights_are_plus_zero():
    for problem in FEW_PROBLEMS:
        data = make_data(problem, "float32", 0.0, whole=True)
        calls = [
            make_call(problem, data, "float32", config=config)
            for make_call, make_gather in PASSES
            for config in tile_configs(make_gather(problem), "float32", 0)
        ]
        for result in run_calls(calls):
            assert not result["write"].view(np.int32).any()


def expected_rows(problem, data, transposed) -> tuple[Rows, np.ndarray]:
    if not transposed:
        return data.pattern.fprop_rows(), data.values
    rows = data.pattern.dgrad_rows(dgrad_gather(problem))
    return rows, data.values[rows.order]


@pytest.mark.parametrize("transposed", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_compress_finds_the_rows(problem, transposed):
    cases = [make_data(problem, "float32", d, whole=False) for d in DENSITIES]
    calls = [
        compress_call(problem, data.dense, "float32", transposed=transposed)
        for data in cases
    ]
    for data, result in zip(cases, run_calls(calls), strict=True):
        rows, values = expected_rows(problem, data, transposed)
        assert_rows(result, rows, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_and_compute(dtype):
    """What compress finds is what fprop and dgrad take."""
    problem = FEW_PROBLEMS[2]
    data = make_data(problem, dtype, 0.3, whole=True)
    compressed = run_calls(
        [compress_call(problem, data.dense, dtype, transposed=t) for t in (False, True)]
    )
    calls = []
    for make_call, found in zip((fprop_call, dgrad_call), compressed, strict=True):
        call = make_call(problem, data, dtype)
        arrays = {**call.arrays, **found, "order": None}
        calls.append(replace(call, arrays=arrays))
    y, dx = (result["write"] for result in run_calls(calls))
    assert_exact(y, conv2d_reference(data.x, data.dense, problem), "fprop")
    assert_exact(dx, dgrad_reference(data.dy, data.dense, problem), "dgrad")


@pytest.mark.parametrize("dtype", FLOATS)
def test_compress_keeps_nan_and_drops_both_zeros(dtype):
    problem = make((1, 4, 4, 3), (3, 3, 3, 5))
    data = make_data(problem, dtype, 0.4, whole=False)
    dense = data.dense.copy()
    dense[dense == 0] = -0.0
    dense[0, 1, 2, 3] = np.nan
    with_nan = replace_kernel(data, dense)
    for transposed in (False, True):
        call = compress_call(problem, dense, dtype, transposed=transposed)
        rows, values = expected_rows(problem, with_nan, transposed)
        result = run_calls([call])[0]
        assert_rows(result, rows, values)


def test_offsets_beyond_32_bits():
    """An input of more than 2^32 bytes and 2^31 elements, of which few are read."""
    problem = make((1, 60_000, 40_000, 1), (1, 1, 1, 2), (29_000, 19_000), "VALID")
    small = make((1, 3, 3, 1), (1, 1, 1, 2))
    data = make_data(small, "float16", 1.0, whole=True)
    x = np.zeros(problem.input_shape, np.float16)
    x[:, :: problem.stride_h, :: problem.stride_w] = data.x
    expected = conv2d_reference(data.x, data.dense, small)
    wide = replace(data, x=x)
    configs = tile_configs(fprop_gather(problem), "float16", 2)
    assert len(configs) > 1
    calls = [fprop_call(problem, wide, "float16", config=config) for config in configs]
    for result in run_calls(calls):
        assert_exact(result["write"], expected, "fprop")
