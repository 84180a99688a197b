"""Plans fit the GPU, cover the problem and are packed as the functions read them."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_conv import plan, tiling
from sparse_conv.gather import dgrad_gather, fprop_gather
from sparse_conv.launch import Launch, divisor_words
from sparse_conv.problem import Geometry, Problem, make_problem

H200 = plan.DeviceLimits(multiprocessors=132, shared_mem_bytes=232448)
SMALL = plan.DeviceLimits(multiprocessors=2, shared_mem_bytes=48 * 1024)
GEOMETRY = Geometry((1, 1), "SAME", (1, 1), "NHWC")
MAIN = make_problem((1, 256, 512, 3), (11, 11, 3, 64), GEOMETRY)


def launch_of(problem: Problem, nnz: int, device=H200, **options) -> Launch:
    return plan.gather_launch(
        fprop_gather(problem), "float32", nnz,
        has_bias=False, has_order=False, device=device, **options,
    )  # fmt: skip


@st.composite
def problems(draw):
    step = st.integers(1, 4)
    groups = draw(st.sampled_from([1, 2, 5]))
    geometry = Geometry(
        (draw(step), draw(step)),
        draw(st.sampled_from(["SAME", ((3, 0), (1, 7))])),
        (draw(step), draw(step)),
        draw(st.sampled_from(["NHWC", "NCHW"])),
    )
    n, h, w, c = (draw(st.integers(0, 70)) for _ in range(4))
    c = (c + 1) * groups
    shape = (
        (n, h + 20, w + 20, c)
        if geometry.data_format == "NHWC"
        else (n, c, h + 20, w + 20)
    )
    taps = st.integers(1, 7)
    kernel = (draw(taps), draw(taps), c // groups, groups * draw(st.integers(1, 80)))
    return make_problem(shape, kernel, geometry)


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    dtype=st.sampled_from(sorted(tiling.PACKS)),
    device=st.sampled_from([H200, SMALL]),
)
def test_what_is_chosen_fits_and_covers(problem, dtype, device):
    for gather in (fprop_gather(problem), dgrad_gather(problem)):
        nnz = gather.rows * gather.row_length // 5
        block, _ = tiling.choose_block(gather, dtype, nnz, device)
        if block is None:
            continue
        config, tiles = block.config, block.tiling
        assert block.shared_mem_bytes <= device.shared_mem_bytes
        assert config.warps <= tiling.MAX_WARPS
        assert config.warp_rows <= config.rows
        pixels = config.positions * config.position_warps * 32
        assert config.tile_h * config.tile_w <= pixels
        assert tiles.tiles_h * tiles.tile_h >= tiling.phase_outputs(gather.h)
        assert tiles.tiles_w * tiles.tile_w >= tiling.phase_outputs(gather.w)
        assert block.subtile_groups * tiling.PACKS[dtype][0] >= tiles.subtiles
        group_out = gather.out_channels // gather.groups
        rows = block.row_groups * config.passes * config.block_rows
        assert rows >= gather.groups * group_out


@settings(max_examples=300, deadline=None)
@given(divisor=st.integers(1, 2**31 - 1), dividend=st.integers(0, 2**31 - 1))
def test_division_by_multiplication_is_exact(divisor, dividend):
    magic, shift, kept = divisor_words(divisor)
    assert kept == divisor
    assert magic < 2**32
    for number in (dividend, dividend // divisor * divisor, 2**31 - 1):
        assert number * magic < 2**64
        assert number * magic >> shift == number // divisor
        before = max(0, number // divisor * divisor - 1)
        assert before * magic >> shift == before // divisor


def test_lattice_columns_do_not_collide():
    gather = fprop_gather(
        make_problem((1, 40, 40, 3), (5, 5, 3, 4), replace(GEOMETRY, strides=(2, 3)))
    )
    for channels_last in (False, True):
        lattice = tiling.make_lattice(gather, 7, 6, 3, channels_last=channels_last)
        places = {
            c * lattice.plane_pitch + y * lattice.row_pitch
            + x % lattice.stride_w * lattice.columns + x // lattice.stride_w
            for c in range(3)
            for y in range(lattice.extent_h)
            for x in range(lattice.extent_w)
        }  # fmt: skip
        assert len(places) == 3 * lattice.extent_h * lattice.extent_w
        assert max(places) * tiling.PACK_BYTES < lattice.nbytes


def test_a_launch_packs_pointers_first_and_null_where_there_is_none():
    launch = launch_of(MAIN, 2376)
    packed = launch.pack({"read": 1 << 40, "write": 7})
    pointers = struct.unpack_from(f"<{len(launch.pointers)}Q", packed)
    assert dict(zip(launch.pointers, pointers, strict=True)) == {
        **dict.fromkeys(launch.pointers, 0), "read": 1 << 40, "write": 7,
    }  # fmt: skip
    assert len(packed) % 8 == 0


def test_everything_that_is_launched_is_reachable():
    reachable = set(plan.reachable())
    assert len(reachable) <= 84
    gather, options = fprop_gather(MAIN), {"device": H200}
    for dtype in tiling.PACKS:
        launches = [
            plan.gather_launch(
                gather,
                dtype,
                2376,
                has_bias=True,
                has_order=False,
                config=config,
                **options,
            )
            for config in (None, plan.Direct())
        ]
        for config in (None, plan.Direct()):
            launches += plan.wgrad_launches(
                gather, dtype, 2376, dense=True, config=config, **options
            )[:2]
        launches.append(
            plan.compress_launch(gather, dtype, MAIN.kernel_shape, transposed=False)
        )
        assert {(x.function, x.defines) for x in launches} <= reachable


def test_no_size_is_compiled_in():
    names = {name for _, defines in plan.reachable() for name, _ in defines}
    assert names == {"DTYPE", "POSITIONS", "ROWS", "MANY_PASSES"}


def test_a_lattice_too_large_for_shared_memory_is_read_directly():
    geometry = replace(GEOMETRY, strides=(400, 400))
    problem = make_problem((1, 4000, 4000, 1), (300, 300, 1, 2), geometry)
    assert launch_of(problem, 9000).function == "conv2d_gather_direct"
    text = plan.explain_gather(fprop_gather(problem), "float32", 9000, H200)
    assert "no tile of the input fits into shared memory" in text


def test_a_tiny_problem_takes_no_tiles():
    problem = make_problem((1, 4, 4, 1), (3, 3, 1, 1), GEOMETRY)
    assert launch_of(problem, 3).function == "conv2d_gather_direct"
    text = plan.explain_gather(fprop_gather(problem), "float32", 3, H200)
    assert "tiles don't pay" in text


def test_nothing_to_write_is_an_empty_grid():
    problem = make_problem((0, 9, 9, 3), (3, 3, 3, 4), GEOMETRY)
    assert launch_of(problem, 20).grid[0] == 0
    first, second, nbytes = plan.wgrad_launches(
        fprop_gather(problem), "float32", 0, dense=False, device=H200
    )
    assert (first.grid[0], second.grid[0], nbytes) == (0, 0, 0)


def test_the_gradient_of_an_empty_batch_is_still_computed():
    problem = make_problem((0, 9, 9, 3), (3, 3, 3, 4), GEOMETRY)
    first, second, _ = plan.wgrad_launches(
        fprop_gather(problem), "float32", 0, dense=True, device=H200
    )
    assert first.grid[0] > 0
    assert second.grid[0] > 0


def test_the_workspace_is_bounded():
    problem = make_problem((64, 56, 56, 256), (3, 3, 256, 512), GEOMETRY)
    *_, nbytes = plan.wgrad_launches(
        fprop_gather(problem), "float32", 0, dense=True, device=H200
    )
    entries = int(np.prod(problem.kernel_shape))
    assert nbytes <= max(plan.WORKSPACE_BYTES, 4 * entries)


def test_a_configuration_that_does_not_fit_is_refused():
    config = plan.TileConfig(4, 4, 4, 8, 1, 16, 8, 3)
    with pytest.raises(ValueError, match=r"must fit the GPU .*Received: TileConfig"):
        launch_of(
            MAIN, 2376, device=replace(SMALL, shared_mem_bytes=1024), config=config
        )


def test_compress_needs_the_kernel_of_its_gather():
    problem = make_problem((1, 9, 9, 3), (3, 3, 3, 4), GEOMETRY)
    with pytest.raises(ValueError, match=r"must end in \(3, 4\)"):
        plan.compress_launch(
            fprop_gather(problem), "float32", (3, 3, 4, 3), transposed=False
        )


def test_compress_needs_32_bit_slots():
    problem = make_problem((1, 9, 9, 2**15), (3, 3, 2**15, 2**13), GEOMETRY)
    with pytest.raises(NotImplementedError, match=r"at most 2\^31 - 1 weights"):
        plan.compress_launch(
            fprop_gather(problem), "float32", problem.kernel_shape, transposed=False
        )


def test_clusters_need_hardware_that_has_them_and_room():
    for capability, multiprocessors, blocks in (
        (90, 132, 8), (120, 170, 8), (89, 142, 1), (80, 108, 1), (90, 16, 1),
    ):  # fmt: skip
        assert tiling.cluster_blocks(capability, multiprocessors) == blocks
