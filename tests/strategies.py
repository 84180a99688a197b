"""Hypothesis strategies: calls of the public operator, and the data that they take.

A call is small enough for the float64 reference to be instant, and yet reaches what the
usual suites miss: kernels of 7 and more, tails in every dimension, dilation together
with stride, empty rows, densities from 0 to 1, extents of 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from sparse_conv.problem import Problem, make_problem, normalize_geometry

FLOATS = ("float32", "float64", "float16", "bfloat16")
DTYPES = (*FLOATS, "int32")

# Products of a call; the reference takes some 0.1 s for so many.
LARGEST_REFERENCE = 10_000_000


@dataclass(frozen=True)
class Call:
    """The arguments of one call of `conv2d`, and how to make its data.

    Attributes:
        input_shape: All dimensions, in the order of `data_format`.
        kernel_shape: (R, S, C / groups, K).
        strides: As given to `conv2d`; so are padding, data_format and dilations.
        dtype: Name of the dtype of all operands.
        density: Fraction of weights that aren't zero.
        sparse: Whether the kernel is given as a SparseKernel.
        bias: Whether there is one.
        integers: Whether operands are small integers, so that every sum is exact.
        seed: Of the data.
    """

    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, int, int, int]
    strides: Any = 1
    padding: Any = "SAME"
    data_format: str | None = "NHWC"
    dilations: Any = None
    dtype: str = "float32"
    density: float = 0.3
    sparse: bool = True
    bias: bool = False
    integers: bool = False
    seed: int = 0

    @property
    def problem(self) -> Problem:
        """The Problem that the arguments describe."""
        geometry = normalize_geometry(
            self.strides, self.padding, self.data_format, self.dilations
        )
        return make_problem(self.input_shape, self.kernel_shape, geometry)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output with all its batch dimensions."""
        return (*self.input_shape[:-3], *self.problem.output_shape[1:])

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `conv2d` but the tensors."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilations": self.dilations,
        }


@dataclass(frozen=True)
class Data:
    """Arrays of a Call's dtype: input, dense kernel, bias and output gradient."""

    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None
    dy: np.ndarray


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a dtype's name; bfloat16 is none of NumPy's own."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def make_data(call: Call) -> Data:
    """The data of a call, always the same for the same call."""
    rng = np.random.default_rng(call.seed)
    dtype = numpy_dtype(call.dtype)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if call.integers or call.dtype == "int32":
            return rng.integers(-8, 8, shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)

    kernel = draw(call.kernel_shape)
    kernel[rng.random(call.kernel_shape) >= call.density] = 0
    bias = draw(call.kernel_shape[3:]) if call.bias else None
    return Data(draw(call.input_shape), kernel, bias, draw(call.output_shape))


def _spelling(pair: tuple[int, int], nhwc: bool) -> st.SearchStrategy:
    """The ways to write a pair of strides or dilations."""
    ways: list[Any] = [pair, list(pair), np.array(pair)]
    ways.append([1, *pair, 1] if nhwc else [1, 1, *pair])
    if pair[0] == pair[1]:
        ways += [pair[0], [pair[0]], np.int64(pair[0])]
    return st.sampled_from(ways)


def _paddings(nhwc: bool) -> st.SearchStrategy:
    pair = st.tuples(st.integers(0, 9), st.integers(0, 9))
    none = (0, 0)
    explicit = st.tuples(pair, pair).map(
        lambda hw: [none, *hw, none] if nhwc else [none, none, *hw]
    )
    return st.one_of(st.sampled_from(["SAME", "VALID"]), explicit)


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Call:
    """Calls that are valid, over everything that the operator accepts."""
    nhwc = draw(st.booleans())
    size = st.one_of(st.integers(1, 12), st.sampled_from([0, 1, 17, 33]))
    taps = st.one_of(st.integers(1, 4), st.sampled_from([5, 7, 8, 11]))
    step = st.sampled_from([1, 1, 2, 3, 4, 7])
    height, width = draw(size), draw(size)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 5))
    outputs = groups * draw(st.sampled_from([1, 2, 3, 5, 8, 9]))
    batch = draw(st.lists(st.sampled_from([1, 1, 2, 3, 0]), min_size=1, max_size=3))
    image = (height, width, channels) if nhwc else (channels, height, width)
    strides, dilations = ((draw(step), draw(step)) for _ in range(2))
    call = Call(
        input_shape=(*batch, *image),
        kernel_shape=(draw(taps), draw(taps), channels // groups, outputs),
        strides=draw(_spelling(strides, nhwc)),
        padding=draw(_paddings(nhwc)),
        data_format="NHWC" if nhwc else "NCHW",
        dilations=draw(_spelling(dilations, nhwc)),
        dtype=draw(st.sampled_from(dtypes)),
        density=draw(st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.6, 0.9, 1.0])),
        sparse=draw(st.booleans()),
        bias=draw(st.booleans()),
        integers=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return _limited(_made_valid(call))


def _made_valid(call: Call) -> Call:
    """`call`, with padding that leaves room for the kernel where it had none."""
    try:
        _ = call.problem
    except ValueError:
        return replace(call, padding="SAME")
    return call


def _limited(call: Call) -> Call:
    """`call`, with a smaller batch where the reference would take long."""
    p = call.problem
    products = p.n * p.p * p.q * p.k * p.r * p.s * p.group_channels
    if products <= LARGEST_REFERENCE:
        return call
    ones = tuple(min(size, 1) for size in call.input_shape[:-3])
    return replace(call, input_shape=(*ones, *call.input_shape[-3:]))
