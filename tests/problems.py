"""The convolutions that tests run: named shapes, kernels and data.

Knows sizes and random numbers. Does not know what computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from sparse_conv.pattern import Pattern
from sparse_conv.problem import Problem, make_problem, normalize_geometry

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "int32": np.dtype(np.int32),
}
DENSITIES = (0.0, 0.1, 0.6, 1.0)


def make(
    input_shape: tuple[int, int, int, int],
    kernel_shape: tuple[int, int, int, int],
    strides=1,
    padding="SAME",
    dilations=1,
    data_format="NHWC",
) -> Problem:
    """A Problem from the arguments of `tf.nn.conv2d`.

    Unlike there, `input_shape` is (N, H, W, C) for every data format, and an explicit
    padding has pairs for height and width alone.
    """
    if not isinstance(padding, str):
        padding = [(0, 0), *padding, (0, 0)]
    if data_format == "NCHW":
        n, h, w, c = input_shape
        input_shape = (n, c, h, w)
        if not isinstance(padding, str):
            padding = [(0, 0), (0, 0), *padding[1:3]]
    geometry = normalize_geometry(strides, padding, data_format, dilations)
    return make_problem(input_shape, kernel_shape, geometry)


# Arguments of `make` without the data format.
_ARGUMENTS = [
    # Sizes that no tile divides.
    ((2, 7, 5, 3), (3, 3, 3, 4)),
    ((1, 1, 1, 1), (1, 1, 1, 1)),
    ((1, 5, 35, 2), (3, 3, 2, 3), 1, "VALID"),
    ((5, 3, 3, 2), (3, 3, 2, 2)),
    ((1, 3, 70, 1), (1, 3, 1, 2)),
    ((1, 40, 3, 1), (3, 1, 1, 2)),
    # Many input channels, and many output channels.
    ((1, 4, 5, 70), (3, 3, 70, 3)),
    ((1, 3, 4, 5), (2, 2, 5, 67)),
    # Channels in fours, which may be stored together.
    ((2, 6, 7, 8), (3, 3, 8, 24)),
    ((1, 5, 6, 8), (3, 3, 4, 16)),
    # One tap.
    ((2, 5, 6, 9), (1, 1, 9, 7)),
    ((2, 6, 7, 4), (1, 1, 4, 3), 2),
    # Large and odd kernels.
    ((1, 10, 9, 2), (7, 7, 2, 3)),
    ((1, 12, 11, 2), (7, 5, 2, 2), 2),
    ((1, 13, 12, 1), (11, 11, 1, 2)),
    ((1, 14, 13, 1), (11, 11, 1, 2), (4, 3), "VALID"),
    ((1, 6, 8, 2), (1, 5, 2, 2)),
    ((1, 8, 6, 2), (5, 2, 2, 2)),
    # Strides; above the number of taps some inputs have no gradient.
    ((2, 9, 8, 3), (3, 3, 3, 4), 2),
    ((1, 8, 11, 2), (2, 2, 2, 3), 3),
    ((1, 2, 2, 2), (3, 3, 2, 2), 4),
    ((1, 11, 13, 2), (3, 4, 2, 2), (1, 3), "VALID"),
    # Dilations, with every relation to the stride.
    ((1, 9, 8, 3), (3, 3, 3, 2), 1, "SAME", 2),
    ((1, 12, 11, 2), (3, 3, 2, 2), 2, "SAME", 3),
    ((1, 13, 12, 2), (3, 3, 2, 2), 4, "SAME", 2),
    ((1, 13, 14, 2), (2, 3, 2, 2), (2, 6), "SAME", (4, 4)),
    # Padding; it may exceed the kernel.
    ((1, 4, 5, 2), (3, 3, 2, 2), 1, ((4, 0), (1, 5))),
    ((1, 5, 4, 2), (2, 3, 2, 2), 2, ((0, 3), (2, 1)), (2, 1)),
    ((1, 3, 3, 2), (5, 5, 2, 2)),
    # Groups.
    ((2, 5, 6, 4), (3, 3, 2, 6)),
    ((1, 6, 5, 6), (3, 3, 1, 6), 2),
    ((1, 5, 5, 3), (2, 2, 1, 9)),
    # Nothing to read, to write or to sum.
    ((0, 4, 5, 2), (3, 3, 2, 3)),
    ((2, 4, 5, 2), (3, 3, 2, 0)),
    ((2, 2, 5, 2), (3, 3, 2, 3), 1, "VALID"),
]
PROBLEMS = [
    make(*arguments, data_format=data_format)
    for arguments in _ARGUMENTS
    for data_format in ("NHWC", "NCHW")
]
# Without outer taps: padding that is negative, or more than the rest of the kernel has.
PROBLEMS += [
    make((1, 9, 8, 2), (5, 5, 2, 3), data_format="NCHW").cropped(3, 5, 4, 5),
    make((2, 8, 9, 2), (5, 4, 2, 3), 2).cropped(0, 1, 0, 2),
    make((1, 12, 13, 2), (3, 5, 2, 2), 2, "VALID", 2).cropped(2, 3, 1, 4),
    make((1, 10, 11, 4), (4, 4, 2, 6), (1, 3), "SAME", 2).cropped(1, 4, 3, 4),
]
# A few that together have tails, channels in fours, strides, dilations, groups, and
# both layouts.
FEW_PROBLEMS = [
    make((1, 6, 7, 4), (3, 3, 4, 24)),
    make((2, 7, 9, 5), (3, 3, 5, 6)),
    make((1, 9, 8, 4), (5, 3, 2, 6), 2, "SAME", 1, "NCHW"),
    make((1, 8, 11, 3), (2, 3, 3, 3), 3, "VALID", 2),
]


def random_problems(count: int, seed: int) -> list[Problem]:
    """Small problems at random, always the same for a seed."""
    rng = np.random.default_rng(seed)
    return [_random_problem(rng) for _ in range(count)]


def _random_problem(rng: np.random.Generator) -> Problem:
    def draw(high):
        return int(rng.integers(1, high + 1))

    groups = max(1, draw(5) - 2)
    group_channels, group_outputs = draw(6), draw(6)
    kernel = (draw(5), draw(5), group_channels, group_outputs * groups)
    pads = tuple((draw(5) - 1, draw(5) - 1) for _ in range(2))
    padding = (pads, "SAME", "VALID")[draw(3) - 1]
    strides, dilations = (draw(4), draw(4)), (draw(4), draw(4))
    data_format = ("NHWC", "NCHW")[draw(2) - 1]
    shape = (draw(3), draw(14), draw(14), group_channels * groups)
    try:
        return make(shape, kernel, strides, padding, dilations, data_format)
    except ValueError:
        # The kernel exceeds the input by too much.
        return make(shape, kernel, strides, "SAME", dilations, data_format)


@dataclass(frozen=True, eq=False, slots=True)
class Data:
    """The arrays of one problem.

    Attributes:
        x: The input, in the problem's layout.
        dy: A gradient of the output, in the problem's layout.
        dense: The dense kernel, HWIO.
        pattern: Where `dense` is stored; a superset of where it is not zero.
        values: (nnz,) the dense kernel's values there.
        bias: (K,) a bias.
    """

    x: np.ndarray
    dy: np.ndarray
    dense: np.ndarray
    pattern: Pattern
    values: np.ndarray
    bias: np.ndarray


def make_pattern(mask: np.ndarray) -> Pattern:
    """The Pattern of the places where the HWIO `mask` is true."""
    r, s, c, k = mask.shape
    rows = mask.transpose(3, 2, 0, 1).reshape(k, c * r * s)
    indptr = np.concatenate([[0], np.cumsum(rows.sum(1))]).astype(np.int32)
    return Pattern((r, s, c, k), indptr, np.nonzero(rows)[1].astype(np.int32))


def make_mask(
    shape: tuple[int, int, int, int], density: float, rng: np.random.Generator
) -> np.ndarray:
    """A random mask; unless dense, an output, a channel and a tap may have nothing."""
    mask = rng.random(shape) < density
    r, s, c, k = shape
    if density < 1 and k > 2:
        mask[..., rng.integers(k)] = False
    if density < 1 and c > 2:
        mask[:, :, rng.integers(c)] = False
    if density < 1 and r * s > 2:
        mask[rng.integers(r), rng.integers(s)] = False
    return mask


def make_data(
    problem: Problem, dtype: str, density: float, *, whole: bool, seed: int = 0
) -> Data:
    """Random data of a problem.

    Args:
        problem: The sizes.
        dtype: Name of the dtype of all arrays.
        density: Of the kernel.
        whole: Whole numbers from -8 to 7, whose sums are exact; otherwise normally
            distributed numbers.
        seed: Seed of the random numbers.
    """
    rng = np.random.default_rng([seed, *str(problem).encode()])
    whole = whole or dtype == "int32"

    def numbers(shape):
        drawn = rng.integers(-8, 8, shape) if whole else rng.standard_normal(shape)
        return np.asarray(drawn).astype(DTYPES[dtype])

    mask = make_mask(problem.kernel_shape, density, rng)
    dense = np.where(mask, numbers(problem.kernel_shape), np.zeros((), DTYPES[dtype]))
    pattern = make_pattern(mask)
    return Data(
        x=numbers(problem.input_shape),
        dy=numbers(problem.output_shape),
        dense=dense,
        pattern=pattern,
        values=dense.reshape(-1)[pattern.positions()],
        bias=numbers((problem.k,)),
    )
