"""The pattern of a kernel and the rows that the two passes walk."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.pattern import Pattern, Rows
from sparse_conv.problem import Problem
from tests.strategies import Call, calls, make_data


def pattern_of(dense: np.ndarray) -> Pattern:
    """The pattern of a dense HWIO kernel, one weight at a time."""
    height, width, channels, outputs = dense.shape
    indptr, indices = [0], []
    for k in range(outputs):
        for c in range(channels):
            for r in range(height):
                for s in range(width):
                    if dense[r, s, c, k] != 0:
                        indices.append((c * height + r) * width + s)
        indptr.append(len(indices))
    return Pattern(dense.shape, np.array(indptr, np.int32), np.array(indices, np.int32))


@given(call=calls())
def test_coordinates_and_positions(call):
    dense = make_data(call).kernel
    pattern = pattern_of(dense)
    assert pattern.nnz == np.count_nonzero(dense)
    assert pattern.density == (pattern.nnz / dense.size if dense.size else 0)
    r, s, c, k = pattern.coordinates()
    rebuilt = np.zeros(dense.shape, bool)
    rebuilt[r, s, c, k] = True
    np.testing.assert_array_equal(rebuilt, dense != 0)
    order = np.lexsort((s, r, c, k))
    np.testing.assert_array_equal(order, np.arange(pattern.nnz))
    flat = np.zeros(dense.size, bool)
    flat[pattern.positions()] = True
    np.testing.assert_array_equal(flat.reshape(dense.shape), dense != 0)


@given(call=calls())
def test_cropping_leaves_out_nothing_but_empty_outer_taps(call):
    dense = make_data(call).kernel
    pattern = pattern_of(dense)
    cropped = pattern.cropped()
    if pattern.nnz == 0:
        assert cropped is pattern
        return
    top, bottom, left, right = pattern.tap_range()
    inner = dense[top:bottom, left:right]
    assert np.count_nonzero(inner) == pattern.nnz
    for outer in (inner[0], inner[-1], inner[:, 0], inner[:, -1]):
        assert outer.any()
    expected = pattern_of(inner)
    assert cropped.shape == expected.shape
    np.testing.assert_array_equal(cropped.indptr, expected.indptr)
    np.testing.assert_array_equal(cropped.indices, expected.indices)
    assert cropped.indices.dtype == np.int32


def entries(rows: Rows, gather: Gather) -> set[tuple[int, int, int]]:
    """Every (row, index, place among the values), checked to be in order."""
    assert len(rows.begin) == len(rows.end) == gather.rows
    for array in (rows.begin, rows.end, rows.indices):
        assert array.dtype == np.int32
    found = set()
    for row, (begin, end) in enumerate(zip(rows.begin, rows.end, strict=True)):
        indices = rows.indices[begin:end]
        assert (np.diff(indices) > 0).all(), "indices ascend within a row"
        assert ((indices >= 0) & (indices < gather.row_length)).all()
        places = range(begin, end) if rows.order is None else rows.order[begin:end]
        found |= {(row, int(i), int(j)) for i, j in zip(indices, places, strict=True)}
    assert len(found) == (rows.end - rows.begin).sum()
    return found


def expected_dgrad(pattern: Pattern, gather: Gather, problem: Problem):
    """The same set from the definition of a Gather, one nonzero at a time."""
    result = set()
    group_outputs = problem.k // problem.groups
    for place, (r, s, c, k) in enumerate(zip(*pattern.coordinates(), strict=True)):
        group, k_in_group = divmod(int(k), group_outputs)
        channel = group * problem.group_channels + int(c)
        for set_h, taps_h in enumerate(gather.h.kernel_taps):
            for set_w, taps_w in enumerate(gather.w.kernel_taps):
                if r not in taps_h or s not in taps_w:
                    continue
                th, tw = taps_h.index(r), taps_w.index(s)
                row = (set_h * gather.w.row_sets + set_w) * problem.c + channel
                index = (k_in_group * gather.h.taps + th) * gather.w.taps + tw
                result.add((row, index, place))
    return result


@given(call=calls())
def test_rows_of_both_passes(call):
    problem = call.problem
    pattern = pattern_of(make_data(call).kernel)
    gather = fprop_gather(problem)
    expected = {
        (row, int(pattern.indices[i]), i)
        for row in range(problem.k)
        for i in range(pattern.indptr[row], pattern.indptr[row + 1])
    }
    assert entries(pattern.fprop_rows(), gather) == expected
    gather = dgrad_gather(problem)
    found = entries(pattern.dgrad_rows(gather), gather)
    assert found == expected_dgrad(pattern, gather, problem)


def test_derived_rows_are_built_once():
    call = Call((1, 8, 8, 4), (3, 3, 4, 6), strides=2)
    pattern = pattern_of(make_data(call).kernel)
    gather = dgrad_gather(call.problem)
    assert pattern.dgrad_rows(gather) is pattern.dgrad_rows(gather)
    # Only the way of striding matters, not the size of the image.
    larger = dgrad_gather(Call((3, 20, 30, 4), (3, 3, 4, 6), strides=2).problem)
    if larger.h.kernel_taps == gather.h.kernel_taps:
        assert pattern.dgrad_rows(larger) is pattern.dgrad_rows(gather)
    other = dgrad_gather(Call((1, 8, 8, 4), (3, 3, 4, 6), strides=1).problem)
    assert pattern.dgrad_rows(other) is not pattern.dgrad_rows(gather)


@pytest.mark.parametrize("threads", [8])
def test_threads_share_what_is_derived(threads):
    pattern = pattern_of(make_data(Call((1, 8, 8, 4), (3, 3, 4, 6))).kernel)
    built, results = [], []
    barrier = threading.Barrier(threads)

    def build():
        built.append(1)
        return object()

    def work():
        barrier.wait()
        results.append(pattern.cached("key", build))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(built) == 1
    assert all(result is results[0] for result in results)


@given(dense_shape=st.tuples(*[st.integers(0, 3)] * 4))
def test_patterns_without_weights(dense_shape):
    pattern = pattern_of(np.zeros(dense_shape))
    assert pattern.nnz == 0
    assert pattern.density == 0
    assert len(pattern.positions()) == 0
