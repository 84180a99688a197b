"""Bad arguments raise before any computation: the same class eagerly and in a trace.

The rules are those of `tf.nn.conv2d`, the classes are Python's own: `ValueError` for a
bad value, shape or combination, `TypeError` for a type or dtype that can't serve,
`NotImplementedError` for what is valid but not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from sparse_conv import backends

PAIRS = [[0, 0], [1, 2], [3, 0], [0, 0]]


@dataclass(frozen=True)
class Bad:
    """A call that must fail.

    Attributes:
        id: Name of the test.
        error: The class that it must raise.
        message: A piece of the message.
        x: Shape of the input. `kernel` is the shape of the filters.
        options: The other arguments; those of the base call where not given.
        about_shapes: Whether only the sizes of tensors show that the call is bad.
    """

    id: str
    error: type[Exception]
    message: str
    x: tuple[int, ...] = (2, 8, 8, 4)
    kernel: tuple[int, ...] = (3, 3, 4, 6)
    options: dict[str, Any] | None = None
    about_shapes: bool = False

    def call(self, x: Any, kernel: Any) -> tf.Tensor:
        options = {"strides": 1, "padding": "SAME", **(self.options or {})}
        return sparse_conv.conv2d(x, kernel, **options)


def shapes(
    id: str, message: str, x=(2, 8, 8, 4), kernel=(3, 3, 4, 6), **options: Any
) -> Bad:
    return Bad(id, ValueError, message, x, kernel, options, about_shapes=True)


def option(id: str, error: type[Exception], message: str, **options: Any) -> Bad:
    return Bad(id, error, message, options=options)


BAD = [
    shapes("input of rank 0", "`input`", x=()),
    shapes("input of rank 2", "`input`", x=(8, 8)),
    shapes("input of rank 3", "`input`", x=(8, 8, 4)),
    shapes("filters of rank 2", "`filters`", kernel=(3, 3)),
    shapes("filters of rank 3", "`filters`", kernel=(3, 3, 4)),
    shapes("filters of rank 5", "`filters`", kernel=(1, 3, 3, 4, 6)),
    shapes("4 channels for 3", "multiple", kernel=(3, 3, 3, 6)),
    shapes("4 channels for 8", "multiple", kernel=(3, 3, 8, 6)),
    shapes("5 outputs in 2 groups", "number of groups", kernel=(3, 3, 2, 5)),
    shapes("no channels", "must not be 0", x=(2, 8, 8, 0), kernel=(3, 3, 0, 6)),
    shapes("no channels in the filters", "must not be 0", kernel=(3, 3, 0, 6)),
    shapes("no channels in the input", "not 0", x=(2, 8, 8, 0)),
    shapes("filters of height 0", "must not be 0", kernel=(0, 3, 4, 6)),
    shapes("filters of width 0", "must not be 0", kernel=(3, 0, 4, 6)),
    shapes("negative height", "height", kernel=(12, 3, 4, 6), padding="VALID"),
    shapes("negative width", "width", kernel=(3, 12, 4, 6), padding="VALID"),
    shapes("negative by dilation", "negative", padding="VALID", dilations=5),
    shapes("no rows under VALID", "negative", x=(2, 0, 8, 4), padding="VALID"),
    shapes("NHWC input read as NCHW", "multiple", x=(2, 9, 8, 4), data_format="NCHW"),
    option("stride 0", ValueError, "`strides`", strides=0),
    option("stride -1", ValueError, "`strides`", strides=-1),
    option("stride 0 of four", ValueError, "`strides`", strides=[1, 0, 1, 1]),
    option("stride 2**31", ValueError, "`strides`", strides=2**31),
    option("3 strides", ValueError, "length 3", strides=[1, 2, 2]),
    option("5 strides", ValueError, "length 5", strides=[1, 1, 2, 2, 1]),
    option("no strides", ValueError, "length 0", strides=[]),
    option(
        "stride in the batch", NotImplementedError, "`strides`", strides=[2, 1, 1, 1]
    ),
    option(
        "stride in channels", NotImplementedError, "`strides`", strides=[1, 1, 1, 2]
    ),
    option(
        "NHWC strides in NCHW",
        NotImplementedError,
        "`strides`",
        strides=[1, 2, 2, 1],
        data_format="NCHW",
    ),
    option("stride 1.5", TypeError, "`strides`", strides=1.5),
    option("stride 'x'", TypeError, "`strides`", strides="x"),
    option("dilation 0", ValueError, "`dilations`", dilations=0),
    option("dilation -1", ValueError, "`dilations`", dilations=-1),
    option("3 dilations", ValueError, "length 3", dilations=[1, 2, 2]),
    option(
        "dilation in the batch",
        NotImplementedError,
        "`dilations`",
        dilations=[2, 1, 1, 1],
    ),
    option(
        "dilation in channels",
        NotImplementedError,
        "`dilations`",
        dilations=[1, 1, 1, 2],
    ),
    option("dilation 'x'", TypeError, "`dilations`", dilations="x"),
    option("padding 'same'", ValueError, "`padding`", padding="same"),
    option("padding 'FULL'", ValueError, "`padding`", padding="FULL"),
    option("padding 'EXPLICIT'", ValueError, "`padding`", padding="EXPLICIT"),
    option("padding None", TypeError, "`padding`", padding=None),
    option("padding 1", TypeError, "`padding`", padding=1),
    option("2 pairs", ValueError, "length 2", padding=[[1, 1], [1, 1]]),
    option("flat padding", ValueError, "pair", padding=[0, 0, 1, 1]),
    option("pairs of length 1", ValueError, "pair", padding=[[0], [1], [1], [0]]),
    option(
        "negative padding",
        ValueError,
        "negative",
        padding=[[0, 0], [-1, 1], [1, 1], [0, 0]],
    ),
    option(
        "padding of the batch",
        ValueError,
        "batch and channel",
        padding=[[1, 1], [0, 0], [0, 0], [0, 0]],
    ),
    option(
        "padding of channels",
        ValueError,
        "batch and channel",
        padding=[[0, 0], [0, 0], [0, 0], [1, 1]],
    ),
    option("data format 'nhwc'", ValueError, "`data_format`", data_format="nhwc"),
    option(
        "data format 'channels_last'",
        ValueError,
        "`data_format`",
        data_format="channels_last",
    ),
    option(
        "data format 'NCHW_VECT_C'",
        ValueError,
        "`data_format`",
        data_format="NCHW_VECT_C",
    ),
    option("data format 1", TypeError, "`data_format`", data_format=1),
    option("unknown activation", ValueError, "`activation`", activation="softermax"),
    option("activation 1", TypeError, "`activation`", activation=1),
    option("bias too long", ValueError, "`bias`", bias=np.zeros(7, np.float32)),
    option("bias too short", ValueError, "`bias`", bias=np.zeros(1, np.float32)),
    option("bias of rank 0", ValueError, "`bias`", bias=np.float32(1)),
    option("bias of rank 2", ValueError, "`bias`", bias=np.zeros((1, 6), np.float32)),
    option("bias of text", TypeError, "`bias`", bias="x"),
    option("unknown back end", ValueError, "`backend`", backend="tpu"),
    option("back end 1", (TypeError, ValueError), "`backend`", backend=1),
]


def assert_refused(bad: Bad, function: Callable, *operands, at_run_time=False) -> None:
    allowed = bad.error if isinstance(bad.error, tuple) else (bad.error,)
    if at_run_time:
        allowed = (*allowed, tf.errors.InvalidArgumentError)
    with pytest.raises(allowed) as caught:
        function(*operands)
    # TensorFlow's own classes, some of which derive from Python's, are not ours.
    assert type(caught.value) in allowed, repr(caught.value)
    assert bad.message in str(caught.value)
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
@pytest.mark.parametrize("kind", ["tensor", "numpy", "variable"])
def test_refused_eagerly(backend, bad, kind):
    make = {
        "tensor": tf.zeros,
        "numpy": lambda shape: np.zeros(shape, np.float32),
        "variable": lambda shape: tf.Variable(tf.zeros(shape)),
    }[kind]
    assert_refused(bad, bad.call, make(bad.x), make(bad.kernel))


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_refused_while_tracing(backend, bad):
    traced = tf.function(bad.call)
    x, kernel = tf.TensorSpec(bad.x), tf.TensorSpec(bad.kernel)
    assert_refused(bad, traced.get_concrete_function, x, kernel)


@pytest.mark.parametrize("spec", ["unknown sizes", "unknown rank"])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_refused_in_a_trace_of_unknown_shapes(backend, bad, spec):
    known = spec == "unknown sizes"
    signature = [
        tf.TensorSpec([None] * len(shape) if known else None)
        for shape in (bad.x, bad.kernel)
    ]
    traced = tf.function(bad.call, input_signature=signature)
    if not bad.about_shapes and not bad.id.startswith("bias too"):
        assert_refused(bad, traced.get_concrete_function)
        return
    operands = tf.zeros(bad.x), tf.zeros(bad.kernel)
    assert_refused(bad, traced, *operands, at_run_time=True)


SPARSE = [
    bad for bad in BAD if len(bad.kernel) == 4 and 0 not in bad.kernel
]  # fmt: skip


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("bad", SPARSE, ids=lambda bad: bad.id)
def test_refused_with_a_sparse_kernel(backend, bad, traced):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones(bad.kernel, np.float32))

    def call(x):
        return bad.call(x, kernel)

    assert_refused(bad, tf.function(call) if traced else call, tf.zeros(bad.x))


REFUSED_DTYPES = [
    "int8", "int16", "int64", "uint8", "uint16", "bool", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "string", "qint8",
]  # fmt: skip


def of_dtype(shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    if dtype == "string":
        return tf.fill(shape, "x")
    if dtype == "qint8":
        return tf.quantization.quantize(tf.zeros(shape), -1, 1, tf.qint8).output
    return tf.cast(tf.zeros(shape), dtype)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("dtype", REFUSED_DTYPES)
def test_dtypes_refused(backend, dtype, traced):
    with tf.device("/CPU:0"):
        x, kernel = of_dtype((2, 8, 8, 4), dtype), of_dtype((3, 3, 4, 6), dtype)

    def call(x, kernel):
        return sparse_conv.conv2d(x, kernel, 1, "SAME")

    function = tf.function(call) if traced else call
    bad = Bad("", TypeError, dtype)
    assert_refused(bad, function, x, kernel)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize(
    ("x", "kernel", "bias"),
    [
        ("float32", "float64", None),
        ("float32", "float16", None),
        ("float16", "float32", None),
        ("bfloat16", "float16", None),
        ("int32", "float32", None),
        ("float32", "int32", None),
        ("float32", "float32", "float64"),
        ("float16", "float16", "float32"),
        ("float32", "float32", "int32"),
    ],
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_dtypes_that_do_not_match_are_refused(backend, x, kernel, bias, sparse, traced):
    dense = tf.ones((3, 3, 4, 6), kernel)
    filters = sparse_conv.SparseKernel.from_dense(dense) if sparse else dense

    def call(x, bias):
        return sparse_conv.conv2d(x, filters, 1, "SAME", bias=bias)

    function = tf.function(call) if traced else call
    operands = tf.zeros((2, 8, 8, 4), x), None if bias is None else tf.zeros(6, bias)
    assert_refused(Bad("", TypeError, bias or kernel), function, *operands)


@pytest.mark.parametrize("which", ["float64 filters", "float64 input", "float64 bias"])
def test_arrays_of_another_dtype_are_treated_alike(backend, which):
    """NumPy's default float64 meets float32: a result or an error, in a trace too."""
    x = np.ones((2, 8, 8, 4), np.float64 if "input" in which else np.float32)
    kernel = np.ones((3, 3, 4, 6), np.float64 if "filters" in which else np.float32)
    bias = np.ones(6, np.float64 if "bias" in which else np.float32)

    def call():
        return sparse_conv.conv2d(x, kernel, 1, "SAME", bias=bias)

    outcomes = []
    for function in (call, tf.function(call)):
        try:
            outcomes.append(function().dtype)
        except TypeError as error:
            assert "float64" in str(error)
            outcomes.append(TypeError)
    assert outcomes[0] == outcomes[1]


def _not_tensors() -> dict[str, Callable[[], Any]]:
    ones = np.ones((2, 8, 8, 4), np.float32)
    return {
        "None": lambda: None,
        "str": lambda: "x",
        "dict": lambda: {"a": 1},
        "object": object,
        "set": lambda: {1},
        "ragged": lambda: tf.ragged.constant([[[[1.0, 2.0]], []]]),
        "sparse tensor": lambda: tf.sparse.from_dense(ones),
        "IndexedSlices": lambda: tf.IndexedSlices(
            tf.constant(ones), tf.constant([0, 1])
        ),
        "text array": lambda: np.full((2, 8, 8, 4), "x"),
        "object array": lambda: np.full((2, 8, 8, 4), object()),
    }


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("which", ["input", "filters"])
@pytest.mark.parametrize("kind", _not_tensors())
def test_what_is_no_tensor_is_refused(backend, kind, which, traced):
    operands = {"input": tf.zeros((2, 8, 8, 4)), "filters": tf.zeros((3, 3, 4, 6))}
    operands[which] = _not_tensors()[kind]()

    def call():
        return sparse_conv.conv2d(**operands, strides=1, padding="SAME")

    function = tf.function(call) if traced else call
    assert_refused(Bad("", TypeError, f"`{which}`"), function)


def test_sparse_kernel_is_no_input(backend):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 4, 6), np.float32))
    bad = Bad("", TypeError, "`input`")
    assert_refused(bad, sparse_conv.conv2d, kernel, kernel, 1, "SAME")


@pytest.mark.parametrize("name", ["strides", "padding"])
def test_symbolic_options_are_refused(backend, name):
    value = {"strides": [2, 2], "padding": PAIRS}[name]

    @tf.function
    def traced(x, kernel, value):
        options = {"strides": 1, "padding": "SAME", name: value}
        return sparse_conv.conv2d(x, kernel, **options)

    x, kernel = tf.zeros((2, 8, 8, 4)), tf.zeros((3, 3, 4, 6))
    bad = Bad("", TypeError, f"`{name}`")
    assert_refused(bad, traced, x, kernel, tf.constant(value))


def test_python_refuses_the_wrong_arguments(backend):
    x, kernel = tf.zeros((2, 8, 8, 4)), tf.zeros((3, 3, 4, 6))
    with pytest.raises(TypeError, match="groups"):
        sparse_conv.conv2d(x, kernel, 1, "SAME", groups=2)
    with pytest.raises(TypeError, match="filters"):
        sparse_conv.conv2d(x)
    with pytest.raises(TypeError):
        # bias and what follows it are named, so that no position of theirs is fixed.
        sparse_conv.conv2d(x, kernel, 1, "SAME", "NHWC", None, None, tf.zeros(6))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "elu", "gelu", "swish"])
def test_int32_has_no_smooth_activation(backend, activation, traced):
    def call(x, kernel):
        return sparse_conv.conv2d(x, kernel, 1, "SAME", activation=activation)

    x = tf.zeros((2, 8, 8, 4), tf.int32)
    kernel = tf.zeros((3, 3, 4, 6), tf.int32)
    function = tf.function(call) if traced else call
    assert_refused(Bad("", TypeError, "int32"), function, x, kernel)


def test_back_end_that_can_not_serve_says_why():
    reason = dict(backends.statuses())["cuda"]
    if reason is None:
        pytest.skip("the CUDA back end can serve on this machine")
    x, kernel = tf.zeros((2, 8, 8, 4)), tf.zeros((3, 3, 4, 6))
    with pytest.raises(NotImplementedError, match=r"(?s)cuda: .+Received: ") as caught:
        sparse_conv.conv2d(x, kernel, 1, "SAME", backend="cuda")
    assert reason in str(caught.value)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_a_refused_call_leaves_nothing_behind(backend, traced):
    """The error comes out of the call itself, and the next call works."""
    x, kernel = tf.ones((2, 8, 8, 4)), tf.ones((3, 3, 4, 6))

    def call(x, kernel, padding):
        return sparse_conv.conv2d(x, kernel, 1, padding)

    function = tf.function(call) if traced else call
    for _ in range(3):
        with pytest.raises(ValueError, match="`padding`"):
            function(x, kernel, "same")
        assert function(x, kernel, "VALID").numpy().max() == 36


GOOD = {
    "stride None": {"strides": None},
    "stride [2]": {"strides": [2]},
    "strides [2, 1]": {"strides": [2, 1]},
    "stride 1.0": {"strides": 1.0},
    "stride np.int64": {"strides": np.int64(2)},
    "strides np.array": {"strides": np.array([2, 2])},
    "strides tf.constant": {"strides": tf.constant([2, 2])},
    "stride True": {"strides": True},
    "stride 5, VALID": {"strides": 5, "padding": "VALID"},
    "stride 100, SAME": {"strides": 100},
    "stride 100, VALID": {"strides": 100, "padding": "VALID"},
    "padding b'SAME'": {"padding": b"SAME"},
    "padding in tuples": {"padding": tuple(map(tuple, PAIRS))},
    "padding larger than the kernel": {"padding": [[0, 0], [9, 9], [9, 9], [0, 0]]},
    "padding 1.0": {"padding": [[0, 0], [1.0, 1.0], [1.0, 1.0], [0, 0]]},
    "dilations None": {"dilations": None},
    "dilation 2": {"dilations": 2},
    "dilations of four": {"dilations": [1, 2, 3, 1]},
    "dilation and stride": {"dilations": 2, "strides": 2},
    "dilation and stride, VALID": {"dilations": 2, "strides": 2, "padding": "VALID"},
    "everything explicit": {"dilations": 2, "strides": 2, "padding": PAIRS},
    "data format None": {"data_format": None},
}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("name", GOOD)
def test_spellings_mean_what_they_mean_to_tensorflow(backend, name, traced):
    options = {"strides": 1, "padding": "SAME", **GOOD[name]}
    rng = np.random.default_rng(0)
    x = tf.constant(rng.integers(-8, 8, (2, 8, 8, 4)), tf.float32)
    kernel = tf.constant(rng.integers(-1, 2, (3, 3, 4, 6)), tf.float32)

    def call(x, kernel):
        return sparse_conv.conv2d(x, kernel, **options)

    y = (tf.function(call) if traced else call)(x, kernel)
    if traced and name == "strides tf.constant":
        # TensorFlow takes this one eagerly only.
        options["strides"] = [2, 2]
    expected = tf.nn.conv2d(x, kernel, **options)
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
