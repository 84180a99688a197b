"""Code that is generated for one kernel agrees with the definition, and compiles.

The emulator runs it on the CPU; NVRTC compiles it for every architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import pytest

from sparse_conv import baked, baked_plan, jit
from sparse_conv.activations import get as get_activation
from sparse_conv.baked import REGISTERS, BakedConfig
from sparse_conv.gather import dgrad_gather, fprop_gather
from sparse_conv.launch import WARP, Launch
from sparse_conv.tiling import PACKS
from tests.baked_configs import fitted
from tests.baked_passes import (
    baked_calls,
    baked_dgrad_calls,
    baked_fprop_calls,
    run_baked,
    tight_gpu,
)
from tests.emulated_passes import LARGE_GPU, LITTLE_GPU, SMALL_GPU
from tests.problems import (
    DTYPES,
    FEW_PROBLEMS,
    PROBLEMS,
    make,
    make_data,
    random_problems,
)
from tests.reference import conv2d_reference, dgrad_reference
from tests.test_kernels_compile import architectures, compile_text
from tests.tolerance import assert_exact, assert_within, error_bound

FLOATS = tuple(dtype for dtype in DTYPES if dtype != "int32")
# Two parts and two chunks at least, tails along every dimension.
SMALL = BakedConfig(outputs=4, warps=2, resident=1, tile_h=3, tile_w=10, chunk=4)
# All outputs in one part, all channels in one chunk.
WHOLE = BakedConfig(outputs=64, warps=1, resident=1, tile_h=4, tile_w=8, chunk=2**20)
# Several pixels a thread, which don't fill the tile, and channels one by one.
STRIPS = BakedConfig(
    outputs=3, warps=1, resident=1, tile_h=5, tile_w=8, chunk=4, pixels=4, vectors=False
)
# Two pixels of as many outputs as there are.
PAIRS = BakedConfig(
    outputs=64, warps=1, resident=1, tile_h=5, tile_w=9, chunk=4, pixels=2
)
# Teams of one warp, where there are two parts for them.
TEAMS = BakedConfig(
    outputs=3, warps=2, resident=1, tile_h=4, tile_w=7, chunk=4, teams=2
)
# Clusters that share the channels, of which each block has several chunks.
SPLITS = BakedConfig(
    outputs=4, warps=2, resident=1, tile_h=3, tile_w=10, chunk=2, splits=2
)
CONFIGS = {
    "small": SMALL, "whole": WHOLE, "strips": STRIPS, "pairs": PAIRS, "teams": TEAMS,
    "splits": SPLITS,
}  # fmt: skip
# Every kind of stride, dilation and padding, groups, both layouts.
VARIED = [problem for problem in PROBLEMS if 0 not in problem.input_shape][::5]


GPUS = {"large": LARGE_GPU, "little": LITTLE_GPU}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("problem", VARIED, ids=str)
def test_both_passes_are_exact(problem, config, gpu):
    if 0 in problem.output_shape:
        pytest.skip("nothing is written, so that no code is generated")
    data = make_data(problem, "float32", 0.4, whole=True)
    device = GPUS[gpu]
    got = run_baked(baked_fprop_calls(problem, data, "float32", config, device))
    assert_exact(got, conv2d_reference(data.x, data.dense, problem), "fprop")
    got = run_baked(baked_dgrad_calls(problem, data, "float32", config, device))
    assert_exact(got, dgrad_reference(data.dy, data.dense, problem), "dgrad")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_a_tile_that_has_no_room_is_loaded_when_the_last_one_has_served(
    problem, config, dtype
):
    data = make_data(problem, dtype, 0.4, whole=True)
    gather = fprop_gather(problem)
    tight = tight_gpu(gather, dtype, fitted(config, gather))
    single = baked.make_baked_block(gather, dtype, fitted(config, gather), tight)
    assert single.buffers == 1
    got = run_baked(baked_fprop_calls(problem, data, dtype, config, tight))
    assert_exact(got, conv2d_reference(data.x, data.dense, problem), "fprop")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_every_dtype_is_as_exact_as_rounding_allows(problem, dtype, config):
    data = make_data(problem, dtype, 0.5, whole=False)
    got = run_baked(baked_fprop_calls(problem, data, dtype, config, LITTLE_GPU))
    exact = conv2d_reference(data.x, data.dense, problem)
    size = conv2d_reference(abs(data.x), abs(data.dense), problem)
    terms = problem.r * problem.s * problem.group_channels
    assert_within(got, exact, error_bound(dtype, exact, size, terms), dtype)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_kernels(density):
    problem = make((1, 6, 7, 4), (3, 3, 4, 6))
    data = make_data(problem, "float32", density, whole=True)
    got = run_baked(baked_fprop_calls(problem, data, "float32", WHOLE))
    assert_exact(got, conv2d_reference(data.x, data.dense, problem), "fprop")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", [None, "relu", "elu", "gelu"])
def test_bias_and_activation(name, layout, dtype):
    problem = make((2, 5, 9, 3), (3, 3, 3, 8), data_format=layout)
    data = make_data(problem, dtype, 0.5, whole=False)
    activation = get_activation(name)
    calls = baked_fprop_calls(
        problem, data, dtype, WHOLE, bias=data.bias, activation=activation.code
    )
    shape = (-1,) if layout == "NHWC" else (-1, 1, 1)
    bias = data.bias.astype(np.float64).reshape(shape)
    exact = conv2d_reference(data.x, data.dense, problem) + bias
    expected = np.asarray(activation.function(exact))
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(
        run_baked(calls), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("teams", [1, 2])
def test_parts_may_be_divided_among_functions(teams, monkeypatch):
    monkeypatch.setattr(baked, "FUNCTION_PRODUCTS", 40)
    problem = make((2, 7, 9, 8), (3, 3, 4, 16))
    data = make_data(problem, "float32", 0.5, whole=True)
    config = dataclasses.replace(SMALL, outputs=2, warps=2 * teams, teams=teams)
    calls = baked_fprop_calls(problem, data, "float32", config)
    assert len(calls) > 1
    exact = conv2d_reference(data.x, data.dense, problem)
    assert_exact(run_baked(calls), exact, "fprop")


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "config",
    [
        # All blocks that there may be, and packets of four sums.
        BakedConfig(32, 2, 1, 6, 9, 4, splits=8),
        # Two parts at a time, the last of which is incomplete; packets of one sum.
        BakedConfig(6, 4, 1, 5, 9, 4, teams=2, splits=2),
        # Several chunks for each block, in one buffer after the other.
        BakedConfig(16, 2, 1, 6, 9, 2, splits=4),
    ],
    ids=str,
)
def test_clusters_share_channels_and_outputs(config, dtype, layout):
    problem = make((2, 11, 9, 32), (3, 3, 32, 34), 1, data_format=layout)
    data = make_data(problem, dtype, 0.3, whole=True)
    relu6 = get_activation("relu6")
    calls = baked_fprop_calls(
        problem, data, dtype, config, bias=data.bias, activation=relu6.code
    )
    for call in calls:
        assert call.launch.cluster == config.splits
        assert call.launch.grid[0] % config.splits == 0
    shape = (-1,) if layout == "NHWC" else (-1, 1, 1)
    exact = conv2d_reference(data.x, data.dense, problem) + data.bias.reshape(shape)
    assert_exact(run_baked(calls), np.clip(exact, 0, 6), str(config))


def test_clusters_are_refused_where_shares_would_differ():
    gather = fprop_gather(make((1, 9, 9, 24), (3, 3, 24, 36)))
    few = dataclasses.replace(LARGE_GPU, cluster_blocks=1)
    for outputs, chunk, splits, device, possible in (
        (12, 6, 4, LARGE_GPU, True), (12, 6, 8, LARGE_GPU, False),
        (9, 6, 2, LARGE_GPU, False), (12, 16, 2, LARGE_GPU, False),
        (12, 24, 2, LARGE_GPU, False), (12, 6, 4, few, False),
    ):  # fmt: skip
        config = BakedConfig(outputs, 2, 1, 4, 9, chunk, splits=splits)
        block = baked.make_baked_block(gather, "float32", config, device)
        assert (block is not None) == possible


def test_small_images_with_many_channels_are_for_clusters():
    gather = fprop_gather(make((1, 14, 14, 1024), (1, 1, 1024, 256)))
    choice = baked_plan.choose_baked_block(gather, "float32", 13_000, LARGE_GPU)
    assert choice.block.config.splits > 1
    assert "clusters" in choice.reason
    without = dataclasses.replace(LARGE_GPU, cluster_blocks=1)
    alone = baked_plan.choose_baked_block(gather, "float32", 13_000, without)
    assert alone.block.config.splits == 1
    assert "clusters" not in alone.reason
    assert choice.clocks < alone.clocks


@pytest.mark.parametrize("dtype", FLOATS)
def test_clusters_compile_where_there_are_some(dtype):
    problem = make((1, 7, 7, 64), (3, 3, 64, 64))
    data = make_data(problem, dtype, 0.1, whole=False)
    for outputs, splits in ((32, 8), (8, 4)):
        config = BakedConfig(outputs, 2, 1, 7, 7, 8, splits=splits)
        launch = baked_fprop_calls(problem, data, dtype, config)[0].launch
        text = jit.source(launch.function, launch.code)
        # The first GPUs that have any, and the newest ones.
        for architecture in (90, architectures()[-1]):
            options = [*jit.options(launch.defines), f"-arch=sm_{architecture}"]
            status, log = compile_text(text, "conv2d_baked.cu", options)
            assert status == 0, log


@pytest.mark.parametrize("nnz, pixels", [(1_800, 2), (3_700, 1)])
def test_two_pixels_share_inputs_where_their_code_stays_near(nnz, pixels):
    gather = fprop_gather(make((32, 224, 224, 64), (3, 3, 64, 64)))
    choice = baked_plan.choose_baked_block(gather, "float32", nnz, LARGE_GPU)
    assert choice.block.config.pixels == pixels
    # Of a single row of taps they share nothing.
    pointwise = fprop_gather(make((32, 224, 224, 64), (1, 1, 64, 64)))
    alone = baked_plan.choose_baked_block(pointwise, "float32", 400, LARGE_GPU)
    assert alone.block.config.pixels == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_fit_into_registers(dtype):
    words = PACKS[dtype][1] // 4
    for shape, kernel in (
        ((32, 56, 56, 64), (3, 3, 64, 64)), ((1, 256, 512, 3), (11, 11, 3, 8)),
    ):  # fmt: skip
        gather = fprop_gather(make(shape, kernel))
        for config in baked_plan._candidates(gather, dtype, 900, LARGE_GPU):
            registers = REGISTERS // ((config.warps + 1) * config.resident * WARP)
            assert config.sums * words < registers, config


@pytest.mark.parametrize("problem", FEW_PROBLEMS, ids=str)
def test_what_the_plan_chooses_is_exact(problem):
    gather = fprop_gather(problem)
    data = make_data(problem, "float32", 0.5, whole=True)
    exact = conv2d_reference(data.x, data.dense, problem)
    for device in (SMALL_GPU, LARGE_GPU):
        choice = baked_plan.choose_baked_block(
            gather, "float32", data.pattern.nnz, device
        )
        if choice.block is None:
            assert problem.k // problem.groups < baked_plan.LEAST_OUTPUTS
            assert problem.groups > 1
            continue
        calls = baked_calls(
            gather, data.pattern.fprop_rows(), data.values, data.x,
            problem.output_shape, "float32", choice.block,
        )  # fmt: skip
        assert_exact(run_baked(calls), exact, str(choice.block.config))


# What can differ in the text around the generated code.
COMPILED = [
    (dtype, layout, channels, chunk, vectors)
    for dtype in FLOATS
    for layout, channels, chunk, vectors in (
        ("NHWC", 8, 8, True), ("NHWC", 8, 4, True), ("NHWC", 8, 4, False),
        ("NHWC", 3, 3, True), ("NCHW", 5, 2, True),
    )
]  # fmt: skip


@functools.cache
def sample(dtype: str, layout: str, channels: int, chunk: int, vectors: bool) -> Launch:
    problem = make((2, 9, 9, channels), (3, 3, channels, 16), data_format=layout)
    data = make_data(problem, dtype, 0.5, whole=True)
    config = dataclasses.replace(
        WHOLE, warps=4, resident=2, chunk=chunk, vectors=vectors
    )
    return baked_fprop_calls(problem, data, dtype, config)[0].launch


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case)))
def test_compiles_for_every_architecture(case):
    launch = sample(*case)
    text = jit.source(launch.function, launch.code)
    every = architectures()
    number = COMPILED.index(case)
    # It knows two kinds of GPUs: the oldest, the newest and one that takes turns.
    for architecture in sorted({every[0], every[-1], every[number % len(every)]}):
        options = [*jit.options(launch.defines), f"-arch=sm_{architecture}"]
        status, log = compile_text(text, "conv2d_baked.cu", options)
        assert status == 0, log


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_leaves_the_cache_first_compiles(dtype):
    launch = sample(dtype, "NHWC", 8, 8, True)
    defines = {**dict(launch.defines), "STREAMS_IN": "1", "STREAMS_OUT": "1"}
    text = jit.source(launch.function, launch.code)
    for architecture in (architectures()[0], 80, architectures()[-1]):
        options = [*jit.options(tuple(defines.items())), f"-arch=sm_{architecture}"]
        status, log = compile_text(text, "conv2d_baked.cu", options)
        assert status == 0, log


@pytest.mark.parametrize(
    ("shape", "kernel", "nnz", "read", "written"),
    [
        # Much code, and more data than the cache has room for beside it.
        ((1, 256, 512, 32), (11, 11, 32, 64), 24_000, True, True),
        # So much code that reading from memory again costs more.
        ((1, 256, 512, 32), (11, 11, 32, 64), 37_000, False, False),
        # Little code.
        ((1, 256, 512, 32), (11, 11, 32, 64), 2_000, False, False),
        # Little data.
        ((1, 28, 28, 128), (3, 3, 128, 128), 15_000, False, False),
        # Results that are larger than the cache.
        ((1, 512, 512, 3), (11, 11, 3, 64), 2_300, False, True),
        ((32, 224, 224, 64), (3, 3, 64, 64), 3_700, False, True),
    ],
)
def test_what_leaves_the_cache_first(shape, kernel, nnz, read, written):
    gather = fprop_gather(make(shape, kernel))
    block = baked_plan.choose_baked_block(gather, "float32", nnz, LARGE_GPU).block
    assert (block.streams_in, block.streams_out) == (read, written)
    unknown = dataclasses.replace(LARGE_GPU, l2_bytes=0)
    block = baked_plan.choose_baked_block(gather, "float32", nnz, unknown).block
    assert (block.streams_in, block.streams_out) == (False, False)


def test_the_sample_compiles_by_itself():
    options = [*jit.options(()), f"-arch=sm_{architectures()[-1]}"]
    status, log = compile_text(jit.source("conv2d_baked"), "conv2d_baked.cu", options)
    assert status == 0, log


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("images", "channels", "config", "bytes_spilt"),
    [
        (1, 3, BakedConfig(64, 8, 2, 16, 16, 3), 0),
        (300, 3, BakedConfig(32, 16, 2, 16, 16, 3, teams=2), 0),
        (300, 3, BakedConfig(64, 8, 2, 16, 16, 3), 0),
        (300, 64, BakedConfig(64, 7, 2, 14, 14, 16), 0),
        # A few registers less than would be needed between two chunks.
        (300, 64, BakedConfig(64, 8, 2, 16, 16, 16), 64),
        (300, 64, BakedConfig(64, 8, 2, 16, 16, 16, vectors=False), 64),
    ],
)
def test_64_sums_stay_in_registers(images, channels, config, bytes_spilt, dtype):
    problem = make((images, 16, 16, channels), (5, 5, channels, 64))
    data = make_data(problem, dtype, 0.1, whole=False)
    launch = baked_fprop_calls(problem, data, dtype, config)[0].launch
    defines = dict(launch.defines)
    # Numbers that are converted land beside the tile, and need no second one.
    lands = int(defines.get("UNIT", 1)) > 1
    loads_ahead = defines["BUFFERED"] == "1" or lands
    assert loads_ahead == (images > 1 or channels > config.chunk)
    options = [*jit.options(launch.defines), "-arch=sm_90", "--ptxas-options=-v"]
    text = jit.source(launch.function, launch.code)
    status, log = compile_text(text, "conv2d_baked.cu", options)
    assert status == 0, log
    spilt = re.search(r"(\d+) bytes spill stores", log)
    assert spilt is not None, log
    assert int(spilt[1]) <= bytes_spilt, log


def test_teams_share_the_parts_of_a_group_evenly():
    gather = fprop_gather(make((1, 9, 9, 8), (3, 3, 4, 36)))
    for outputs, teams, possible in (
        (3, 2, True), (3, 4, False), (6, 3, True), (18, 1, True), (18, 2, False),
    ):  # fmt: skip
        config = BakedConfig(outputs, 2 * teams, 1, 4, 9, 4, teams=teams)
        block = baked.make_baked_block(gather, "float32", config, LARGE_GPU)
        assert (block is not None) == possible
    # A warp more than the teams have room for.
    config = BakedConfig(3, 5, 1, 4, 9, 4, teams=2)
    assert baked.make_baked_block(gather, "float32", config, LARGE_GPU) is None


def test_refusals_name_their_reason():
    def reason(problem, dtype="float32", nnz=100):
        gather = fprop_gather(problem)
        choice = baked_plan.choose_baked_block(gather, dtype, nnz, LARGE_GPU)
        assert choice.block is None
        return choice.reason

    problem = make((1, 9, 9, 8), (3, 3, 8, 8))
    assert "floats only" in reason(problem, dtype="int32")
    assert "too long to compile" in reason(problem, nnz=10**6)
    few = make((1, 9, 9, 8), (3, 3, 4, 6))
    assert "at least 4 output channels" in reason(few)


def random_case(number: int):
    rng = np.random.default_rng(number)
    problem = random_problems(40, seed=7)[number]
    dtype = FLOATS[number % len(FLOATS)]
    pick = [int(rng.choice(options)) for options in ((1, 2, 4, 64), (1, 2, 4, 64))]
    config = BakedConfig(pick[0], 2, 1, *((3, 9), (5, 5), (2, 13))[number % 3], pick[1])
    return problem, dtype, config


@pytest.mark.parametrize("number", range(0, 40, 2))
def test_random_problems_are_exact(number):
    problem, dtype, config = random_case(number)
    data = make_data(problem, dtype, 0.4, whole=True)
    if data.dy.size:
        got = run_baked(baked_fprop_calls(problem, data, dtype, config))
        assert_exact(got, conv2d_reference(data.x, data.dense, problem), "fprop")
        got = run_baked(baked_dgrad_calls(problem, data, dtype, config))
        assert_exact(got, dgrad_reference(data.dy, data.dense, problem), "dgrad")


def test_weights_that_are_no_numbers_are_weights():
    problem = make((1, 4, 5, 2), (1, 1, 2, 8))
    data = make_data(problem, "float32", 1.0, whole=True)
    special = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, 3.4e38, -1.0]
    data.values[:] = np.resize(np.float32(special), data.values.shape)
    got = run_baked(baked_fprop_calls(problem, data, "float32", WHOLE))
    dense = np.zeros(problem.kernel_shape, np.float32)
    dense.reshape(-1)[data.pattern.positions()] = data.values
    with np.errstate(invalid="ignore", over="ignore"):
        products = data.x[..., :, None].astype(np.float64) * dense[0, 0]
        expected = products.sum(-2).astype(np.float32)
    np.testing.assert_array_equal(got, expected)


def test_sizes_that_tiles_hardly_fit_are_not_refused():
    for problem, gather_of in (
        (make((8, 4, 4, 64), (3, 3, 64, 64)), fprop_gather),
        (make((1, 9, 9, 8), (3, 3, 8, 8), dilations=4), fprop_gather),
        (make((1024, 7, 7, 64), (3, 3, 64, 64)), fprop_gather),
        (make((32, 1, 4096, 16), (1, 9, 16, 16)), fprop_gather),
        (make((256, 14, 14, 64), (3, 3, 64, 64), 2), dgrad_gather),
    ):
        choice = baked_plan.choose_baked_block(
            gather_of(problem), "float32", 1000, LARGE_GPU
        )
        assert choice.block is not None, (str(problem), choice.reason)


def test_few_outputs_have_several_pixels_or_no_vectors():
    for channels, outputs in ((3, 3), (32, 3), (64, 1), (64, 8)):
        problem = make((1, 256, 512, channels), (5, 5, channels, outputs))
        gather = fprop_gather(problem)
        nnz = problem.r * problem.s * channels * outputs // 10
        choice = baked_plan.choose_baked_block(gather, "float32", nnz, LARGE_GPU)
        config = choice.block.config
        assert config.pixels > 1 or not config.vectors
        assert config.outputs == outputs


def test_the_shortlist_begins_with_the_choice_and_has_other_tiles():
    gather = fprop_gather(make((1, 64, 64, 16), (3, 3, 16, 32)))
    blocks = baked_plan.shortlist(gather, "float32", 500, LARGE_GPU, 6)
    choice = baked_plan.choose_baked_block(gather, "float32", 500, LARGE_GPU)
    assert blocks[0].config == choice.block.config
    configs = [block.config for block in blocks]
    tiles = {
        (one.outputs, one.teams, one.splits, one.tile_h, one.tile_w) for one in configs
    }
    assert len(tiles) == len(blocks) == 6


def test_few_nonzeros_are_loaded_one_by_one():
    gather = fprop_gather(make((1, 256, 512, 32), (11, 11, 32, 64)))
    few, many = (
        baked_plan.choose_baked_block(gather, "float32", nnz, LARGE_GPU).block
        for nnz in (2_500, 25_000)
    )
    assert few.tile.vector == 1
    assert many.tile.vector > 1


def test_several_converted_numbers_are_loaded_at_once_wherever_they_lie():
    problem = make((1, 32, 64, 16), (3, 3, 16, 3))
    for dtype, chunk, vectors, unit in (
        ("float16", 16, True, 8), ("float16", 16, False, 8), ("bfloat16", 4, False, 4),
        ("float32", 16, False, 1),
    ):  # fmt: skip
        config = dataclasses.replace(STRIPS, chunk=chunk, vectors=vectors)
        block = baked.make_baked_block(fprop_gather(problem), dtype, config, LARGE_GPU)
        assert block.loading.unit == unit
        assert block.tile.vector == (4 if vectors else 1)


def test_few_sums_have_partial_ones_for_each_chunk():
    problem = make((1, 5, 6, 512), (1, 1, 512, 3))
    data = make_data(problem, "float32", 1.0, whole=True)
    data.values[:] = 1
    data.x[:] = 1
    # To this number, ones are added in vain if they come one by one.
    data.x[..., 0] = 2**24
    config = dataclasses.replace(STRIPS, chunk=16)
    got = run_baked(baked_fprop_calls(problem, data, "float32", config))
    np.testing.assert_array_equal(got, np.float32(2**24 + 31 * 16))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_inputs_with_small_weights_are_added_first(config):
    problem = make((1, 9, 12, 8), (3, 3, 8, 6))
    data = make_data(problem, "float32", 0.5, whole=False)
    (call,) = baked_fprop_calls(problem, data, "float32", config)
    pieces = call.launch.code.split("case ")[1:]
    assert pieces
    for piece in pieces:
        loads = re.split(r"LOAD(?:_VECTOR)?\(\d+\)", piece)[1:]
        means = [
            np.mean(np.abs(np.array(
                [int(bits, 16) for bits in re.findall(r"ADD\(\d+, \d+, (\w+)\)", load)],
                np.uint32,
            ).view(np.float32)))
            for load in loads
        ]  # fmt: skip
        assert len(means) > 1
        assert (np.diff(means) >= -1e-6).all()


def test_pieces_are_bounded(monkeypatch):
    gather = dgrad_gather(make((1, 40, 40, 64), (3, 3, 4, 64), 4))
    choice = baked_plan.choose_baked_block(gather, "float32", 200, LARGE_GPU)
    assert choice.block.parts * choice.block.chunks <= baked_plan.MOST_PIECES
    monkeypatch.setattr(baked_plan, "MOST_PIECES", 10)
    baked_plan.choose_baked_block.cache_clear()
    refused = baked_plan.choose_baked_block(gather, "float32", 200, LARGE_GPU)
    baked_plan.choose_baked_block.cache_clear()
    assert "more than 10 pieces" in refused.reason
    monkeypatch.setattr(baked, "FUNCTION_PIECES", 4)
    data = make_data(VARIED[0], "float32", 1.0, whole=True)
    for call in baked_fprop_calls(VARIED[0], data, "float32", SMALL):
        assert call.launch.code.count("case ") <= 4


def test_the_text_and_the_plan_agree_on_sizes():
    text = jit.source("conv2d_baked")

    def number(name):
        return int(re.search(rf"#define {name} (\d+)", text)[1])

    assert number("STAGED") == baked.STAGED
    assert number("ITEMS") == baked.ITEMS
    assert number("PARTIAL_SUMS") == baked.PARTIAL_SUMS
    assert f"static_assert(sizeof(Item) == {baked.ITEM_BYTES}" in text


def test_the_choice_fits_the_gpu_and_covers_every_output():
    for problem in (
        make((1, 256, 512, 3), (11, 11, 3, 64)),
        make((32, 56, 56, 64), (3, 3, 64, 64)),
        make((1, 7, 7, 512), (3, 3, 512, 64)),
        make((1, 256, 512, 32), (11, 11, 32, 3)),
        make((1, 32, 32, 3), (11, 11, 3, 64), data_format="NCHW"),
    ):
        gather = fprop_gather(problem)
        nnz = problem.r * problem.s * problem.c * problem.k // 10
        choice = baked_plan.choose_baked_block(gather, "float32", nnz, LARGE_GPU)
        block, config = choice.block, choice.block.config
        assert block.shared_mem_bytes <= LARGE_GPU.shared_mem_bytes
        assert config.outputs * block.group_parts >= problem.k
        strips = -(-config.tile_h // config.pixels) * config.tile_w
        assert strips <= 32 * config.team_warps
        assert config.chunk * block.chunks >= problem.c
