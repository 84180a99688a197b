"""The meaning of the operator and of its gradients, in NumPy, from the definition.

Everything is float64, so that its own rounding is far below what the tests allow:
products of float32 numbers are exact in it, and a sum of n terms loses at most n 1e-16.
"""

from __future__ import annotations

import numpy as np

from sparse_conv.problem import Problem


def conv2d_reference(x: np.ndarray, kernel: np.ndarray, problem: Problem) -> np.ndarray:
    """The convolution of `x` (`problem.input_shape`) with a dense HWIO `kernel`."""
    y = np.zeros(
        (problem.n, problem.p, problem.q, problem.groups, _group_outputs(problem))
    )
    x = _grouped(_nhwc(x, problem), problem)
    for (r, s), w in _taps(kernel, problem):
        outputs, inputs = _windows(problem, r, s)
        y[outputs] += np.einsum("npqgc,cgk->npqgk", x[inputs], w)
    return _from_nhwc(y, problem)


def dgrad_reference(dy: np.ndarray, kernel: np.ndarray, problem: Problem) -> np.ndarray:
    """The gradient to the input, for the output's gradient `dy`."""
    dx = np.zeros(
        (problem.n, problem.h, problem.w, problem.groups, problem.group_channels)
    )
    dy = _grouped(_nhwc(dy, problem), problem)
    for (r, s), w in _taps(kernel, problem):
        outputs, inputs = _windows(problem, r, s)
        dx[inputs] += np.einsum("npqgk,cgk->npqgc", dy[outputs], w)
    return _from_nhwc(dx, problem)


def wgrad_reference(x: np.ndarray, dy: np.ndarray, problem: Problem) -> np.ndarray:
    """The gradient to the dense HWIO kernel, also where its weights are zero."""
    x = _grouped(_nhwc(x, problem), problem)
    dy = _grouped(_nhwc(dy, problem), problem)
    dw = np.zeros(problem.kernel_shape)
    for (r, s), _ in _taps(dw, problem):
        outputs, inputs = _windows(problem, r, s)
        taps = np.einsum("npqgc,npqgk->cgk", x[inputs], dy[outputs])
        dw[r, s] = taps.reshape(problem.group_channels, problem.k)
    return dw


def _group_outputs(problem: Problem) -> int:
    return problem.k // problem.groups


def _nhwc(array: np.ndarray, problem: Problem) -> np.ndarray:
    array = np.asarray(array, np.float64)
    return array if problem.data_format == "NHWC" else array.transpose(0, 2, 3, 1)


def _grouped(array: np.ndarray, problem: Problem) -> np.ndarray:
    *spatial, channels = array.shape
    return array.reshape(*spatial, problem.groups, channels // problem.groups)


def _from_nhwc(grouped: np.ndarray, problem: Problem) -> np.ndarray:
    *spatial, groups, channels = grouped.shape
    array = grouped.reshape(*spatial, groups * channels)
    return array if problem.data_format == "NHWC" else array.transpose(0, 3, 1, 2)


def _taps(kernel: np.ndarray, problem: Problem):
    """Each tap's position and its (C / groups, groups, K / groups) weights."""
    shape = (problem.group_channels, problem.groups, _group_outputs(problem))
    for r in range(problem.r):
        for s in range(problem.s):
            yield (r, s), np.asarray(kernel[r, s], np.float64).reshape(shape)


def _windows(problem: Problem, r: int, s: int):
    """Index of the outputs that tap (r, s) reaches, and of the inputs it reads."""
    rows = _window(
        problem.h, problem.p, problem.stride_h, r * problem.dilation_h - problem.pad_top
    )
    columns = _window(
        problem.w,
        problem.q,
        problem.stride_w,
        s * problem.dilation_w - problem.pad_left,
    )
    everything = slice(None)
    return (everything, rows[0], columns[0]), (everything, rows[1], columns[1])


def _window(inputs: int, outputs: int, stride: int, offset: int):
    """Along one axis: the outputs `o` whose input `o * stride + offset` exists."""
    first = max(0, -(offset // stride))
    last = min(outputs - 1, (inputs - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + offset
    return slice(first, last + 1), slice(start, last * stride + offset + 1, stride)
