"""The arguments of a convolution: what is accepted, what is refused, what it means."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_conv.problem import (
    Geometry,
    Problem,
    infer_output_shape,
    make_problem,
    normalize_geometry,
)

PAIRS = [[0, 0], [1, 2], [3, 0], [0, 0]]
PAIRS_NCHW = [[0, 0], [0, 0], [1, 2], [3, 0]]


def geometry(strides=1, padding="SAME", data_format="NHWC", dilations=1) -> Geometry:
    return normalize_geometry(strides, padding, data_format, dilations)


@pytest.mark.parametrize("name", ["strides", "dilations"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(None, (1, 1), id="none"),
        pytest.param(2, (2, 2), id="int"),
        pytest.param(True, (1, 1), id="bool"),
        pytest.param(2.0, (2, 2), id="whole-float"),
        pytest.param([2], (2, 2), id="length-1"),
        pytest.param([2, 3], (2, 3), id="length-2"),
        pytest.param((2, 3), (2, 3), id="tuple"),
        pytest.param([1, 2, 3, 1], (2, 3), id="length-4"),
        pytest.param(range(2, 4), (2, 3), id="range"),
        pytest.param(np.int64(2), (2, 2), id="numpy-int"),
        pytest.param(np.array(2), (2, 2), id="numpy-0d"),
        pytest.param(np.array([2, 3]), (2, 3), id="numpy-array"),
        pytest.param([np.int32(2), np.uint8(3)], (2, 3), id="numpy-ints"),
        pytest.param(tf.constant(2), (2, 2), id="tensor-0d"),
        pytest.param(tf.constant([1, 2, 3, 1]), (2, 3), id="tensor"),
        pytest.param(tf.TensorShape([2, 3]), (2, 3), id="tensor-shape"),
        pytest.param(2**31 - 1, (2**31 - 1, 2**31 - 1), id="largest"),
    ],
)
def test_strides_and_dilations_accepted(name, value, expected):
    assert getattr(geometry(**{name: value}), name) == expected
    assert all(type(x) is int for x in getattr(geometry(**{name: value}), name))


def test_four_strides_follow_the_data_format():
    assert geometry([1, 1, 2, 3], data_format="NCHW").strides == (2, 3)
    assert geometry([1, 2, 3, 1], data_format="NHWC").strides == (2, 3)
    with pytest.raises(NotImplementedError, match="batch and channel"):
        geometry([1, 2, 3, 1], data_format="NCHW")
    with pytest.raises(NotImplementedError, match="batch and channel"):
        geometry([1, 1, 2, 3], data_format="NHWC")


@pytest.mark.parametrize("name", ["strides", "dilations"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        pytest.param(0, ValueError, id="zero"),
        pytest.param(-1, ValueError, id="negative"),
        pytest.param(2**31, ValueError, id="over-32-bits"),
        pytest.param(10**400, ValueError, id="over-any-float"),
        pytest.param([1, 0], ValueError, id="zero-in-pair"),
        pytest.param([1, 0, 1, 1], ValueError, id="zero-in-four"),
        pytest.param([0, 1, 1, 1], ValueError, id="zero-in-batch"),
        pytest.param([], ValueError, id="length-0"),
        pytest.param([1, 2, 2], ValueError, id="length-3"),
        pytest.param([1, 1, 2, 2, 1], ValueError, id="length-5"),
        pytest.param(np.ones((2, 2), int), ValueError, id="matrix"),
        pytest.param([2, 1, 1, 1], NotImplementedError, id="batch"),
        pytest.param([1, 1, 1, 2], NotImplementedError, id="channel"),
        pytest.param(1.5, TypeError, id="fraction"),
        pytest.param([1, 1.5], TypeError, id="fraction-in-pair"),
        pytest.param(float("nan"), TypeError, id="nan"),
        pytest.param(float("inf"), TypeError, id="inf"),
        pytest.param(1j, TypeError, id="complex"),
        pytest.param("x", TypeError, id="str"),
        pytest.param("11", TypeError, id="digits"),
        pytest.param(b"1", TypeError, id="bytes"),
        pytest.param([None, 1], TypeError, id="none-in-pair"),
        pytest.param([[1], [1]], TypeError, id="nested"),
        pytest.param({"h": 1}, TypeError, id="dict"),
        pytest.param(object(), TypeError, id="object"),
    ],
)
def test_strides_and_dilations_refused(name, value, error):
    with pytest.raises(error) as caught:
        geometry(**{name: value})
    # A subclass would do for a caller, but not show that the rule was ours.
    assert type(caught.value) is error
    assert f"`{name}`" in str(caught.value)
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize("name", ["strides", "padding"])
def test_symbolic_tensor_is_refused(name):
    value = {"strides": [2, 2], "padding": PAIRS}[name]

    @tf.function
    def traced():
        with pytest.raises(TypeError, match="known while the graph is built"):
            geometry(**{name: tf.constant(value)})

    traced()


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        pytest.param("SAME", "SAME", id="same"),
        pytest.param("VALID", "VALID", id="valid"),
        pytest.param(b"SAME", "SAME", id="bytes"),
        pytest.param(np.str_("VALID"), "VALID", id="numpy-str"),
        pytest.param(PAIRS, ((1, 2), (3, 0)), id="lists"),
        pytest.param(tuple(map(tuple, PAIRS)), ((1, 2), (3, 0)), id="tuples"),
        pytest.param(np.array(PAIRS), ((1, 2), (3, 0)), id="numpy"),
        pytest.param(tf.constant(PAIRS), ((1, 2), (3, 0)), id="tensor"),
        pytest.param([[0, 0], [1.0, 2], [3, 0], [0, 0]], ((1, 2), (3, 0)), id="float"),
    ],
)
def test_padding_accepted(padding, expected):
    assert geometry(padding=padding).padding == expected


def test_explicit_padding_follows_the_data_format():
    nchw = geometry(padding=PAIRS_NCHW, data_format="NCHW")
    assert nchw.padding == ((1, 2), (3, 0))
    with pytest.raises(ValueError, match="batch and channel"):
        geometry(padding=PAIRS, data_format="NCHW")


@pytest.mark.parametrize(
    ("padding", "error"),
    [
        pytest.param("same", ValueError, id="lower-case"),
        pytest.param("FULL", ValueError, id="full"),
        pytest.param("EXPLICIT", ValueError, id="explicit"),
        pytest.param("", ValueError, id="empty-str"),
        pytest.param([], ValueError, id="empty-list"),
        pytest.param([[1, 1], [1, 1]], ValueError, id="two-pairs"),
        pytest.param([0, 0, 1, 1], ValueError, id="flat"),
        pytest.param([[0], [1], [1], [0]], ValueError, id="singles"),
        pytest.param([[0, 0], [-1, 0], [0, 0], [0, 0]], ValueError, id="negative"),
        pytest.param([[1, 1], [0, 0], [0, 0], [0, 0]], ValueError, id="batch"),
        pytest.param([[0, 0], [0, 0], [0, 0], [1, 1]], ValueError, id="channel"),
        pytest.param([[0, 0], [2**31, 0], [0, 0], [0, 0]], ValueError, id="large"),
        pytest.param([[0, 0], [0.5, 0], [0, 0], [0, 0]], TypeError, id="fraction"),
        pytest.param([[0, 0], ["1", 0], [0, 0], [0, 0]], TypeError, id="str-in-pair"),
        pytest.param(None, TypeError, id="none"),
        pytest.param(1, TypeError, id="int"),
        pytest.param(np.array(1), TypeError, id="numpy-0d"),
        pytest.param({"h": 1}, TypeError, id="dict"),
    ],
)
def test_padding_refused(padding, error):
    with pytest.raises(error) as caught:
        geometry(padding=padding)
    assert type(caught.value) is error
    assert "`padding`" in str(caught.value)
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize(
    ("data_format", "error"),
    [
        pytest.param("nhwc", ValueError, id="lower-case"),
        pytest.param("channels_last", ValueError, id="keras"),
        pytest.param("NCHW_VECT_C", ValueError, id="vectorised"),
        pytest.param("HWNC", ValueError, id="permuted"),
        pytest.param(1, TypeError, id="int"),
        pytest.param(["NHWC"], TypeError, id="list"),
    ],
)
def test_data_format_refused(data_format, error):
    with pytest.raises(error, match=r"`data_format`.*Received: "):
        geometry(data_format=data_format)


def test_data_format_none_is_nhwc():
    assert geometry(data_format=None).data_format == "NHWC"
    assert geometry(data_format=b"NCHW").data_format == "NCHW"


@pytest.mark.parametrize(
    ("input_shape", "kernel_shape", "options", "expected"),
    [
        pytest.param((2, 8, 8, 4), (3, 3, 4, 6), {}, (2, 8, 8, 6), id="plain"),
        pytest.param(
            (2, 3, 8, 8, 4), (3, 3, 4, 6), {}, (2, 3, 8, 8, 6), id="rank-5"
        ),
        pytest.param(
            (2, 4, 8, 8), (3, 3, 4, 6), {"data_format": "NCHW"}, (2, 6, 8, 8), id="nchw"
        ),
        pytest.param(
            (2, 8, 8, 4), (3, 3, 2, 6), {}, (2, 8, 8, 6), id="two-groups"
        ),
        pytest.param((0, 8, 8, 4), (3, 3, 4, 6), {}, (0, 8, 8, 6), id="empty-batch"),
        pytest.param((2, 0, 8, 4), (3, 3, 4, 6), {}, (2, 0, 8, 6), id="empty-image"),
        pytest.param((2, 8, 8, 4), (3, 3, 4, 0), {}, (2, 8, 8, 0), id="no-outputs"),
        pytest.param(
            (2, 8, 8, 4), (9, 8, 4, 6), {"padding": "VALID"}, (2, 0, 1, 6), id="short"
        ),
        pytest.param(
            (2, 8, 8, 4),
            (12, 12, 4, 6),
            {"padding": "VALID", "strides": 5},
            (2, 0, 0, 6),
            id="short-by-less-than-a-stride",
        ),
        pytest.param(
            (2, 0, 8, 4),
            (3, 3, 4, 6),
            {"padding": [[0, 0], [1, 1], [1, 1], [0, 0]]},
            (2, 0, 8, 6),
            id="only-padding-too-little",
        ),
        pytest.param(
            (1, 0, 2, 1),
            (1, 1, 1, 1),
            {"padding": [[0, 0], [1, 1], [1, 1], [0, 0]]},
            (1, 2, 4, 1),
            id="only-padding",
        ),
        pytest.param(
            (2, 8, 8, 4), (3, 3, 4, 6), {"strides": 100}, (2, 1, 1, 6), id="long-stride"
        ),
        pytest.param(
            (2, 8, 8, 4), (11, 11, 4, 6), {}, (2, 8, 8, 6), id="same-large-kernel"
        ),
        pytest.param(
            (None, None, 8, None), (3, 3, 4, 6), {}, (None, None, 8, 6), id="partial"
        ),
        pytest.param(
            (2, 8, 8, 4),
            (None, 3, None, None),
            {"padding": "VALID"},
            (2, None, 6, None),
            id="partial-kernel",
        ),
        pytest.param(
            (2, 8, 8, 4), (None, None, 4, 6), {"strides": 2}, (2, 4, 4, 6),
            id="same-needs-no-kernel-size",
        ),
    ],
)  # fmt: skip
def test_output_shape(input_shape, kernel_shape, options, expected):
    shape = infer_output_shape(input_shape, kernel_shape, geometry(**options))
    assert shape == expected


@pytest.mark.parametrize(
    ("input_shape", "kernel_shape", "options", "message"),
    [
        pytest.param((), (3, 3, 4, 6), {}, "at least 4 dimensions", id="rank-0"),
        pytest.param((8, 8, 4), (3, 3, 4, 6), {}, "at least 4 dimensions", id="rank-3"),
        pytest.param((2, 8, 8, 4), (3, 3, 4), {}, "4 dimensions", id="filter-rank-3"),
        pytest.param((2, 8, 8, 4), (1, 3, 3, 4, 6), {}, "4 dimensions", id="filter-5"),
        pytest.param((2, 8, 8, 4), (3, 3, 3, 6), {}, "multiple", id="channels"),
        pytest.param((2, 8, 8, 4), (3, 3, 8, 6), {}, "multiple", id="too-deep"),
        pytest.param((2, 8, 8, 4), (3, 3, 2, 5), {}, r"groups \(2\)", id="groups"),
        pytest.param((2, 8, 8, 0), (3, 3, 4, 6), {}, "not 0", id="no-input-channels"),
        pytest.param((2, 8, 8, 0), (3, 3, 0, 6), {}, "must not be 0", id="no-channels"),
        pytest.param((2, 8, 8, 4), (0, 3, 4, 6), {}, "must not be 0", id="no-height"),
        pytest.param(
            (2, 8, 8, 4), (12, 3, 4, 6), {"padding": "VALID"}, "height", id="height"
        ),
        pytest.param(
            (2, 8, 8, 4), (3, 12, 4, 6), {"padding": "VALID"}, "width", id="width"
        ),
        pytest.param(
            (2, 8, 8, 4),
            (3, 3, 4, 6),
            {"padding": "VALID", "dilations": 5},
            "negative",
            id="dilated",
        ),
        pytest.param(
            (2, 0, 8, 4), (3, 3, 4, 6), {"padding": "VALID"}, "negative", id="empty"
        ),
        pytest.param(
            (None, None, None, 4), (3, 3, 3, 6), {}, "multiple", id="partly-known"
        ),
    ],
)
def test_shapes_refused(input_shape, kernel_shape, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*Received: "):
        infer_output_shape(input_shape, kernel_shape, geometry(**options))


def test_problem_of_nchw_and_many_batch_dimensions():
    problem = make_problem(
        (2, 3, 5, 4, 9, 8),
        (3, 2, 2, 6),
        geometry([2, 1], PAIRS_NCHW, "NCHW", [1, 2]),
    )
    assert problem == Problem(
        n=30, h=9, w=8, c=4, k=6, r=3, s=2, p=5, q=9, groups=2,
        stride_h=2, stride_w=1, dilation_h=1, dilation_w=2,
        pad_top=1, pad_left=3, data_format="NCHW",
    )  # fmt: skip
    assert problem.group_channels == 2
    assert problem.kernel_shape == (3, 2, 2, 6)
    assert problem.input_shape == (30, 4, 9, 8)
    assert problem.output_shape == (30, 6, 5, 9)
    assert str(problem).startswith("n30_h9w8_c4_k6_r3s2_p5q9_g2_stride2x1")


@pytest.mark.parametrize(
    ("size", "taps", "stride", "dilation", "pad"),
    [
        pytest.param(8, 3, 1, 1, 1, id="even"),
        pytest.param(8, 2, 1, 1, 0, id="odd-cell-after"),
        pytest.param(8, 3, 2, 1, 0, id="stride-takes-the-cell-before"),
        pytest.param(7, 3, 2, 1, 1, id="odd-size-strided"),
        pytest.param(8, 3, 1, 3, 3, id="dilated"),
        pytest.param(8, 4, 2, 3, 4, id="dilated-and-strided"),
        pytest.param(1, 11, 1, 1, 5, id="larger-than-the-image"),
        pytest.param(3, 1, 2, 1, 0, id="stride-beyond-the-kernel"),
    ],
)
def test_same_puts_the_odd_cell_last(size, taps, stride, dilation, pad):
    problem = make_problem(
        (1, size, size, 1), (taps, taps, 1, 1), geometry(stride, "SAME", None, dilation)
    )
    assert (problem.pad_top, problem.pad_left) == (pad, pad)


SIZES = st.integers(1, 40)
TAPS = st.integers(1, 9)
STEPS = st.integers(1, 7)


@given(
    size=st.tuples(SIZES, SIZES),
    taps=st.tuples(TAPS, TAPS),
    strides=st.tuples(STEPS, STEPS),
    dilations=st.tuples(STEPS, STEPS),
    padding=st.sampled_from(["SAME", "VALID", PAIRS]),
)
def test_output_shape_is_tensorflows(size, taps, strides, dilations, padding):
    ours = geometry(strides, padding, "NHWC", dilations)
    input_shape, kernel_shape = (2, *size, 4), (*taps, 2, 6)
    try:
        with tf.Graph().as_default():
            x = tf.compat.v1.placeholder(tf.float32, input_shape)
            w = tf.compat.v1.placeholder(tf.float32, kernel_shape)
            y = tf.nn.conv2d(x, w, strides, padding, dilations=dilations)
            expected = tuple(y.shape)
    except ValueError:
        # TensorFlow's shape function also refuses outputs of size 0, which its
        # operator computes.
        try:
            shape = infer_output_shape(input_shape, kernel_shape, ours)
        except ValueError:
            return
        assert 0 in shape
        return
    assert infer_output_shape(input_shape, kernel_shape, ours) == expected


@given(
    shape=st.tuples(SIZES, SIZES, SIZES, SIZES),
    taps=st.tuples(TAPS, TAPS),
    strides=st.tuples(STEPS, STEPS),
    unknown=st.sets(st.integers(0, 7)),
    padding=st.sampled_from(["SAME", "VALID", PAIRS]),
)
def test_unknown_sizes_never_contradict_known_ones(
    shape, taps, strides, unknown, padding
):
    ours = geometry(strides, padding)
    kernel_shape = (*taps, shape[3], 4)
    try:
        full = infer_output_shape(shape, kernel_shape, ours)
    except ValueError:
        assume(False)
    hidden = [None if i in unknown else x for i, x in enumerate(shape + kernel_shape)]
    partial = infer_output_shape(hidden[:4], hidden[4:], ours)
    assert all(a is None or a == b for a, b in zip(partial, full, strict=True))
