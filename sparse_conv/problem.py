"""The arguments of a convolution, checked and normalised: Geometry and Problem.

Knows the rules of `tf.nn.conv2d` about shapes, strides, padding and dilations. Knows
neither TensorFlow nor sparsity: everything here is integers.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """Strides, padding and dilations of a convolution, before any size is known.

    Attributes:
        strides: Vertical and horizontal stride.
        padding: "SAME", "VALID", or ((top, bottom), (left, right)).
        dilations: Vertical and horizontal dilation.
        data_format: "NHWC" or "NCHW".
    """

    strides: tuple[int, int]
    padding: str | tuple[tuple[int, int], tuple[int, int]]
    dilations: tuple[int, int]
    data_format: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One convolution with every size known; batch dimensions folded into `n`.

    Attributes:
        n: Batch size.
        h: Input height. `w` is the width, `c` the channels of all groups.
        k: Output channels of all groups.
        r: Kernel height. `s` is its width.
        p: Output height. `q` is the width.
        groups: Number of channel groups.
        stride_h: Vertical stride; `stride_w` the horizontal one.
        dilation_h: Vertical dilation; `dilation_w` the horizontal one.
        pad_top: Rows of padding above; `pad_left` columns at the left. What lies
            below and at the right follows from `p` and `q`. Negative where the first
            rows or columns are never read.
        data_format: "NHWC" or "NCHW".
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    p: int
    q: int
    groups: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    pad_top: int
    pad_left: int
    data_format: str

    @property
    def group_channels(self) -> int:
        """Input channels of one group: the third dimension of the kernel."""
        return self.c // self.groups

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """(R, S, C / groups, K), the shape of the dense kernel."""
        return (self.r, self.s, self.group_channels, self.k)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input with its batch dimensions folded, in `data_format`."""
        return self._activation_shape(self.h, self.w, self.c)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output with its batch dimensions folded, in `data_format`."""
        return self._activation_shape(self.p, self.q, self.k)

    def _activation_shape(self, height: int, width: int, channels: int):
        if self.data_format == "NHWC":
            return (self.n, height, width, channels)
        return (self.n, channels, height, width)

    def cropped(self, top: int, bottom: int, left: int, right: int) -> Problem:
        """The same outputs by the kernel's rows and columns of these ranges alone."""
        return dataclasses.replace(
            self,
            r=bottom - top,
            s=right - left,
            pad_top=self.pad_top - top * self.dilation_h,
            pad_left=self.pad_left - left * self.dilation_w,
        )

    def __str__(self) -> str:
        """A short name that reads well as a test id."""
        return (
            f"n{self.n}_h{self.h}w{self.w}_c{self.c}_k{self.k}_r{self.r}s{self.s}"
            f"_p{self.p}q{self.q}_g{self.groups}_stride{self.stride_h}x{self.stride_w}"
            f"_dil{self.dilation_h}x{self.dilation_w}_pad{self.pad_top}x{self.pad_left}"
            f"_{self.data_format.lower()}"
        )


def normalize_geometry(
    strides: Any, padding: Any, data_format: Any = "NHWC", dilations: Any = None
) -> Geometry:
    """Turns the arguments of `tf.nn.conv2d` into a Geometry.

    Args:
        strides: An int, or a sequence of length 1, 2 or 4; None means 1.
        padding: "SAME", "VALID", or four (before, after) pairs in the order of
            `data_format`.
        data_format: "NHWC", "NCHW" or None, which means "NHWC".
        dilations: As `strides`.

    Returns:
        The normalised Geometry.

    Raises:
        ValueError: A value is out of range or a sequence has the wrong length.
        TypeError: An argument has a type that can't serve.
        NotImplementedError: Strides or dilations in the batch or channel dimension.
    """
    data_format = _normalize_data_format(data_format)
    return Geometry(
        strides=_normalize_pair("strides", strides, data_format),
        padding=_normalize_padding(padding, data_format),
        dilations=_normalize_pair("dilations", dilations, data_format),
        data_format=data_format,
    )


def _normalize_data_format(data_format: Any) -> str:
    if data_format is None:
        return "NHWC"
    if isinstance(data_format, bytes):
        data_format = data_format.decode()
    if not isinstance(data_format, str):
        raise TypeError(
            f"`data_format` must be a string. Received: data_format={data_format!r}"
        )
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(
            '`data_format` must be "NHWC" or "NCHW". '
            f"Received: data_format={data_format!r}"
        )
    return data_format


def _integer(name: str, value: Any, received: Any) -> int:
    """`value` as a Python int; whole floats pass, as they do in TensorFlow."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        value = int(value) if float(value).is_integer() else value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be whole numbers. Received: {name}={received!r}"
        ) from None


def _elements(name: str, value: Any) -> Sequence[Any]:
    """The elements of a sequence, array or eager tensor; a scalar gives one."""
    if isinstance(value, str | bytes):
        raise TypeError(f"`{name}` must be whole numbers. Received: {name}={value!r}")
    if hasattr(value, "__array__"):
        try:
            value = np.asarray(value)
        except NotImplementedError:
            raise TypeError(
                f"`{name}` must be known while the graph is built. "
                f"Received: {name}={value!r}"
            ) from None
        if value.ndim > 1:
            raise ValueError(
                f"`{name}` must be a number or a flat sequence. "
                f"Received: {name} of shape {value.shape}"
            )
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, Iterable) else [value]


def _normalize_pair(name: str, value: Any, data_format: str) -> tuple[int, int]:
    if value is None:
        return (1, 1)
    elements = [_integer(name, element, value) for element in _elements(name, value)]
    if len(elements) == 1:
        elements *= 2
    if len(elements) == 4:
        spatial = slice(1, 3) if data_format == "NHWC" else slice(2, 4)
        pair = elements[spatial]
        if elements != [1, *pair, 1] and elements != [1, 1, *pair]:
            _check_positive(name, elements, value)
        others = (
            (elements[0], elements[3])
            if data_format == "NHWC"
            else (elements[0], elements[1])
        )
        if others != (1, 1):
            raise NotImplementedError(
                f"`{name}` must be 1 in the batch and channel dimensions. "
                f"Received: {name}={value!r} with data_format={data_format!r}"
            )
        elements = pair
    if len(elements) != 2:
        raise ValueError(
            f"`{name}` must be a number or a sequence of length 1, 2 or 4. "
            f"Received: {name}={value!r} of length {len(elements)}"
        )
    _check_positive(name, elements, value)
    return (elements[0], elements[1])


def _check_positive(name: str, elements: Sequence[int], received: Any) -> None:
    if not all(1 <= element <= INT32_MAX for element in elements):
        raise ValueError(
            f"`{name}` must be at least 1 and fit 32 bits. "
            f"Received: {name}={received!r}"
        )


def _normalize_padding(padding: Any, data_format: str):
    if isinstance(padding, bytes):
        padding = padding.decode()
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                '`padding` must be "SAME", "VALID" or a list of four pairs. '
                f"Received: padding={padding!r}"
            )
        return padding
    received = padding
    if hasattr(padding, "__array__"):
        try:
            padding = np.asarray(padding).tolist()
        except NotImplementedError:
            raise TypeError(
                "`padding` must be known while the graph is built. "
                f"Received: padding={received!r}"
            ) from None
    if not isinstance(padding, list | tuple):
        raise TypeError(
            '`padding` must be "SAME", "VALID" or a list of four pairs. '
            f"Received: padding={received!r}"
        )
    if len(padding) != 4:
        raise ValueError(
            "Explicit `padding` must have four pairs, one for each dimension of the "
            f"input. Received: padding={received!r} of length {len(padding)}"
        )
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in padding):
        raise ValueError(
            "Each element of an explicit `padding` must be a pair (before, after). "
            f"Received: padding={received!r}"
        )
    pairs = [tuple(_integer("padding", x, received) for x in pair) for pair in padding]
    if not all(0 <= x <= INT32_MAX for pair in pairs for x in pair):
        raise ValueError(
            "Explicit `padding` must not be negative and must fit 32 bits. "
            f"Received: padding={received!r}"
        )
    spatial, others = (
        (pairs[1:3], (pairs[0], pairs[3]))
        if data_format == "NHWC"
        else (pairs[2:4], (pairs[0], pairs[1]))
    )
    if others != ((0, 0), (0, 0)):
        raise ValueError(
            "Explicit `padding` must be 0 in the batch and channel dimensions. "
            f"Received: padding={received!r} with data_format={data_format!r}"
        )
    return (spatial[0], spatial[1])


def infer_output_shape(
    input_shape: Sequence[int | None],
    kernel_shape: Sequence[int | None],
    geometry: Geometry,
) -> tuple[int | None, ...]:
    """Checks the shapes as far as they are known and infers the output's.

    Args:
        input_shape: Batch dimensions, then height, width and channels in the order of
            the data format; None where unknown.
        kernel_shape: (R, S, C / groups, K); None where unknown.
        geometry: The normalised geometry.

    Returns:
        The shape of the output, None where it can't be known yet.

    Raises:
        ValueError: The shapes break a rule of `tf.nn.conv2d`.
    """
    if len(input_shape) < 4:
        raise ValueError(
            "`input` must have at least 4 dimensions. "
            f"Received: input of shape {tuple(input_shape)}"
        )
    if len(kernel_shape) != 4:
        raise ValueError(
            "`filters` must have 4 dimensions (height, width, input channels per "
            f"group, output channels). Received: filters of shape {tuple(kernel_shape)}"
        )
    *batch, first, second, third = input_shape
    nhwc = geometry.data_format == "NHWC"
    h, w, c = (first, second, third) if nhwc else (second, third, first)
    r, s, group_channels, k = kernel_shape
    _check_channels(c, group_channels, k, input_shape, kernel_shape)
    p, _ = _output_size("height", h, r, geometry, 0)
    q, _ = _output_size("width", w, s, geometry, 1)
    return (*batch, p, q, k) if nhwc else (*batch, k, p, q)


def _check_channels(c, group_channels, k, input_shape, kernel_shape) -> None:
    received = (
        f"Received: input of shape {tuple(input_shape)}, "
        f"filters of shape {tuple(kernel_shape)}"
    )
    if 0 in kernel_shape[:3]:
        raise ValueError(
            "The kernel's height, width and input channels must not be 0. " + received
        )
    if c is None or group_channels is None:
        return
    if c == 0 or c % group_channels:
        raise ValueError(
            "The input's channels must be a multiple of the kernel's input channels, "
            "and not 0. " + received
        )
    groups = c // group_channels
    if k is not None and k % groups:
        raise ValueError(
            "The output channels must be a multiple of the number of groups "
            f"({groups}). " + received
        )


def _output_size(
    name: str, size: int | None, taps: int | None, geometry: Geometry, axis: int
) -> tuple[int | None, int | None]:
    """Output extent and the padding before it, along one spatial axis."""
    if size is None or (taps is None and geometry.padding != "SAME"):
        return None, None
    stride, dilation = geometry.strides[axis], geometry.dilations[axis]
    if geometry.padding == "SAME":
        outputs = -(-size // stride)
        if taps is None:
            return outputs, None
        effective = (taps - 1) * dilation + 1
        total = max((outputs - 1) * stride + effective - size, 0)
        # The odd cell of padding goes to the bottom and to the right.
        return outputs, total // 2
    before, after = (0, 0) if geometry.padding == "VALID" else geometry.padding[axis]
    effective = (taps - 1) * dilation + 1
    room = size + before + after - effective + stride
    # TensorFlow's division truncates: just short of one stride too few is still 0.
    if room <= -stride:
        raise ValueError(
            f"The output's {name} would be negative. Received: {name} {size} with "
            f"padding ({before}, {after}), effective kernel {name} {effective}, "
            f"stride {stride}"
        )
    return max(room, 0) // stride, before


@functools.lru_cache(maxsize=4096)
def make_problem(
    input_shape: tuple[int, ...], kernel_shape: tuple[int, ...], geometry: Geometry
) -> Problem:
    """The Problem of fully known shapes.

    Args:
        input_shape: Shape of the input with all its batch dimensions.
        kernel_shape: (R, S, C / groups, K).
        geometry: The normalised geometry.

    Returns:
        The Problem, with the batch dimensions folded into one.

    Raises:
        ValueError: As `infer_output_shape`.
    """
    infer_output_shape(input_shape, kernel_shape, geometry)
    *batch, first, second, third = input_shape
    nhwc = geometry.data_format == "NHWC"
    h, w, c = (first, second, third) if nhwc else (second, third, first)
    r, s, group_channels, k = kernel_shape
    p, pad_top = _output_size("height", h, r, geometry, 0)
    q, pad_left = _output_size("width", w, s, geometry, 1)
    n = 1
    for size in batch:
        n *= size
    return Problem(
        n, h, w, c, k, r, s, p, q, c // group_channels,
        *geometry.strides, *geometry.dilations, pad_top, pad_left,
        geometry.data_format,
    )  # fmt: skip
