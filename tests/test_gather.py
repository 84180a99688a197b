"""A Gather visits exactly the products of the definition, for fprop and for dgrad."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_conv.gather import Axis, Gather, dgrad_gather, fprop_gather
from sparse_conv.problem import Geometry, make_problem
from tests.reference import conv2d_reference, dgrad_reference


@st.composite
def problems(draw):
    size = st.integers(1, 9)
    taps = st.integers(1, 5)
    step = st.integers(1, 4)
    pads = st.tuples(st.integers(0, 4), st.integers(0, 4))
    explicit = st.tuples(pads, pads)
    geometry = Geometry(
        strides=(draw(step), draw(step)),
        padding=draw(st.one_of(st.sampled_from(["SAME", "VALID"]), explicit)),
        dilations=(draw(step), draw(step)),
        data_format="NHWC",
    )
    input_shape = (1, draw(size), draw(size), 1)
    kernel_shape = (draw(taps), draw(taps), 1, 1)
    try:
        return make_problem(input_shape, kernel_shape, geometry)
    except ValueError:
        return make_problem(input_shape, (1, 1, 1, 1), geometry)


def gather_dense(gather: Gather, read: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Runs a one-channel Gather from its definition, one product at a time."""
    out = np.full((gather.h.outputs, gather.w.outputs), np.nan)
    rows, columns = axis_reads(gather.h), axis_reads(gather.w)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            out[i, j] = sum(
                read[y, x] * kernel[r, s] for y, r in row for x, s in column
            )
    return out


def axis_reads(axis: Axis) -> list[list[tuple[int, int]]]:
    """For each output along `axis`: the inputs it reads and the taps they meet."""
    reads = []
    for output in range(axis.outputs):
        phase, i = output % axis.phases, output // axis.phases
        taps = axis.kernel_taps[phase % axis.row_sets]
        places = [
            (axis.origins[phase] + axis.step * (i * axis.stride + t), taps[t])
            for t in range(axis.taps)
        ]
        reads.append([(y, r) for y, r in places if r >= 0 and 0 <= y < axis.inputs])
    return reads


@settings(max_examples=300, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_gathers_agree_with_the_definition(problem, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.integers(-8, 8, problem.kernel_shape).astype(np.float64)
    x = rng.integers(-8, 8, problem.input_shape).astype(np.float64)
    dy = rng.integers(-8, 8, problem.output_shape).astype(np.float64)
    y = gather_dense(fprop_gather(problem), x[0, ..., 0], kernel[..., 0, 0])
    np.testing.assert_array_equal(y, conv2d_reference(x, kernel, problem)[0, ..., 0])
    dx = gather_dense(dgrad_gather(problem), dy[0, ..., 0], kernel[..., 0, 0])
    np.testing.assert_array_equal(dx, dgrad_reference(dy, kernel, problem)[0, ..., 0])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_each_kernel_tap_is_in_one_row_set(stride):
    geometry = Geometry((stride, stride), "SAME", (1, 1), "NHWC")
    problem = make_problem((1, 12, 12, 1), (5, 5, 1, 1), geometry)
    axis = dgrad_gather(problem).h
    taps = sorted(tap for taps in axis.kernel_taps for tap in taps if tap >= 0)
    assert taps == list(range(5))
