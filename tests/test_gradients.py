"""Derivatives: of any order, on any tape, and none that nobody asked for."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings

import sparse_conv
from sparse_conv.problem import Problem
from tests import ours
from tests.strategies import Call, calls, make_data


def conv2d_dense(x: tf.Tensor, kernel: tf.Tensor, problem: Problem) -> tf.Tensor:
    """The convolution from its definition, of TensorFlow's simplest operations.

    It is differentiable to any order for any geometry, which `tf.nn.conv2d` is not on
    the CPU.
    """
    p = problem
    nchw = p.data_format == "NCHW"
    if nchw:
        x = tf.transpose(x, (0, 2, 3, 1))
    reach_h = (p.p - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1
    reach_w = (p.q - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1
    below = max(reach_h - p.h - p.pad_top, 0)
    right = max(reach_w - p.w - p.pad_left, 0)
    x = tf.pad(x, [[0, 0], [p.pad_top, below], [p.pad_left, right], [0, 0]])
    y = 0
    for r in range(p.r):
        for s in range(p.s):
            top, left = r * p.dilation_h, s * p.dilation_w
            part = x[:, top :: p.stride_h, left :: p.stride_w][:, : p.p, : p.q]
            part = tf.reshape(part, (p.n, p.p, p.q, p.groups, p.group_channels))
            taps = tf.reshape(kernel[r, s], (p.group_channels, p.groups, -1))
            y += tf.reshape(
                tf.einsum("npqgc,cgk->npqgk", part, taps), (p.n, p.p, p.q, p.k)
            )
    return tf.transpose(y, (0, 3, 1, 2)) if nchw else y


def operands(call: Call):
    """Input, values, a SparseKernel or None, and the function from values to dense."""
    data = make_data(call)
    x = tf.constant(data.x.reshape(call.problem.input_shape))
    if not call.sparse:
        return x, tf.constant(data.kernel), lambda values: values
    kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
    dense = tf.constant(np.argwhere(data.kernel.transpose(3, 2, 0, 1) != 0))
    shape = np.array(data.kernel.shape)[[3, 2, 0, 1]]

    def to_dense(values: tf.Tensor) -> tf.Tensor:
        scattered = tf.scatter_nd(dense, values, shape.astype(np.int64))
        return tf.transpose(scattered, (2, 3, 1, 0))

    return x, kernel.values, to_dense


def sparse_function(call: Call):
    """`conv2d` as a function of input and values."""
    if not call.sparse:
        return lambda x, w: ours.conv2d(x, w, **call.options)
    pattern = sparse_conv.SparseKernel.from_dense(make_data(call).kernel).pattern

    def function(x: tf.Tensor, w: tf.Tensor) -> tf.Tensor:
        kernel = sparse_conv.SparseKernel(w, pattern)
        return ours.conv2d(x, kernel, **call.options)

    return function


def derivatives(function, x: tf.Tensor, w: tf.Tensor) -> list[tf.Tensor]:
    """First, second and third derivatives, mixed ones among them, in fixed directions.

    The cube keeps every one of them from vanishing.
    """
    with tf.GradientTape(persistent=True) as third:
        third.watch([x, w])
        with tf.GradientTape(persistent=True) as second:
            second.watch([x, w])
            with tf.GradientTape() as first:
                first.watch([x, w])
                loss = tf.reduce_sum(function(x, w) ** 3)
            dx, dw = first.gradient(loss, [x, w])
            along = tf.reduce_sum(dx**2) + tf.reduce_sum(tf.sin(dw))
        ddx, ddw = second.gradient(along, [x, w])
        further = tf.reduce_sum(ddx * tf.cos(x)) + tf.reduce_sum(ddw**2)
    return [dx, dw, ddx, ddw, *third.gradient(further, [x, w])]


def assert_close(actual, expected) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        scale = np.abs(b.numpy()).max(initial=1.0)
        message = f"derivative {number}"
        np.testing.assert_allclose(
            a.numpy() / scale, b.numpy() / scale, rtol=0, atol=1e-11, err_msg=message
        )


@settings(max_examples=max(10, settings.default.max_examples // 6))
@given(call=calls(dtypes=("float64",)))
def test_derivatives_of_order_three(backend, call):
    assume(0 not in call.problem.output_shape and 0 not in call.input_shape)
    assume(call.kernel_shape[0] * call.kernel_shape[1] <= 25)
    problem = call.problem
    x, w, to_dense = operands(call)
    expected = derivatives(lambda x, w: conv2d_dense(x, to_dense(w), problem), x, w)
    folded = Call(**{**vars(call), "input_shape": problem.input_shape})
    assert_close(derivatives(sparse_function(folded), x, w), expected)


SMALL = Call((2, 6, 5, 4), (3, 2, 2, 6), strides=[2, 1], dtype="float64")


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def call(request: pytest.FixtureRequest) -> Call:
    """A small call with a SparseKernel, and with a dense kernel."""
    return Call(**{**vars(SMALL), "sparse": request.param})


def test_derivatives_inside_a_graph(backend, call):
    x, w, to_dense = operands(call)
    function = sparse_function(call)
    expected = derivatives(
        lambda x, w: conv2d_dense(x, to_dense(w), call.problem), x, w
    )
    assert_close(tf.function(lambda x, w: derivatives(function, x, w))(x, w), expected)


def test_derivatives_of_a_graph(backend, call):
    x, w, to_dense = operands(call)
    function = tf.function(sparse_function(call))
    expected = derivatives(
        lambda x, w: conv2d_dense(x, to_dense(w), call.problem), x, w
    )
    assert_close(derivatives(function, x, w), expected)


def test_derivatives_of_a_graph_of_unknown_shapes(backend):
    call = Call(**{**vars(SMALL), "sparse": False})
    x, w, to_dense = operands(call)
    unknown = tf.TensorSpec([None] * 4, tf.float64)
    function = tf.function(sparse_function(call), input_signature=[unknown, unknown])
    expected = derivatives(
        lambda x, w: conv2d_dense(x, to_dense(w), call.problem), x, w
    )
    assert_close(derivatives(function, x, w), expected)


@pytest.mark.parametrize(
    "activation",
    ["relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "swish"],
)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_derivatives_through_bias_and_activation(backend, call, activation, traced):
    x, w, to_dense = operands(call)
    bias = tf.constant(np.linspace(-1, 1, 6))
    pattern = sparse_conv.SparseKernel.from_dense(make_data(call).kernel).pattern
    functions = {
        "elu": tf.nn.elu,
        "gelu": tf.nn.gelu,
        "leaky_relu": tf.nn.leaky_relu,
        "relu": tf.nn.relu,
        "relu6": tf.nn.relu6,
        "sigmoid": tf.sigmoid,
        "swish": tf.nn.silu,
        "tanh": tf.tanh,
    }

    def fused(x, w):
        return ours.conv2d(
            x,
            sparse_conv.SparseKernel(w, pattern) if call.sparse else w,
            **call.options,
            bias=bias,
            activation=activation,
        )

    def plain(x, w):
        return functions[activation](conv2d_dense(x, to_dense(w), call.problem) + bias)

    def both(x, w):
        return derivatives(fused, x, w)

    actual = (tf.function(both) if traced else both)(x, w)
    assert_close(actual, derivatives(plain, x, w))


def test_mixed_second_derivative(backend, call):
    """d/dw of d/dx, and d/dx of d/dw: the two orders agree."""
    x, w, _ = operands(call)
    function = sparse_function(call)
    results = []
    for inner, outer in ((x, w), (w, x)):
        with tf.GradientTape() as second:
            second.watch(outer)
            with tf.GradientTape() as first:
                first.watch(inner)
                y = tf.reduce_sum(function(x, w) ** 2)
            gradient = first.gradient(y, inner)
            dot = tf.reduce_sum(gradient * tf.cos(inner))
        results.append((outer is w, second.gradient(dot, outer)))
    # The reference for both, by central differences of the first derivative.
    step = 1e-6
    for of_w, actual in results:
        inner, outer = (x, w) if of_w else (w, x)
        rng = np.random.default_rng(0)
        direction = tf.constant(rng.standard_normal(outer.shape))
        dots = []
        for moved in (outer + step * direction, outer - step * direction):
            pair = (x, moved) if of_w else (moved, w)
            with tf.GradientTape() as tape:
                tape.watch(inner)
                y = tf.reduce_sum(function(*pair) ** 2)
            dots.append(tf.reduce_sum(tape.gradient(y, inner) * tf.cos(inner)))
        expected = (dots[0] - dots[1]).numpy() / (2 * step)
        along = tf.reduce_sum(actual * direction).numpy()
        np.testing.assert_allclose(along, expected, rtol=1e-5)


def test_persistent_tape_gives_each_gradient_again(backend, call):
    x, w, _ = operands(call)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, w])
        y = sparse_function(call)(x, w)
        z = tf.sin(y)
    once = tape.gradient(z, [x, w])
    again = tape.gradient(z, [x, w])
    for a, b in zip(once, again, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    assert tape.gradient(y, x).shape == x.shape


def test_jacobian_without_vectorisation(backend, call):
    x, w, to_dense = operands(call)
    x = x[:1, :3, :3]
    small = Call(**{**vars(call), "input_shape": tuple(x.shape)})
    jacobians = []
    for function in (
        sparse_function(small),
        lambda x, w: conv2d_dense(x, to_dense(w), small.problem),
    ):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = function(x, w)
        jacobians.append(tape.jacobian(y, x, experimental_use_pfor=False))
    assert_close(jacobians[:1], jacobians[1:])


def test_stop_gradient(backend, call):
    x, w, _ = operands(call)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, w])
        y = sparse_function(call)(tf.stop_gradient(x), w)
        z = tf.stop_gradient(sparse_function(call)(x, w))
    assert tape.gradient(y, x) is None
    assert tape.gradient(y, w) is not None
    assert tape.gradient(z, [x, w]) == [None, None]


def test_stop_recording(backend, call):
    x, w, _ = operands(call)
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        with tape.stop_recording():
            y = sparse_function(call)(x, w)
    assert tape.gradient(y, [x, w]) == [None, None]


def test_output_that_no_loss_uses(backend, call):
    x, w, _ = operands(call)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, w])
        sparse_function(call)(x, w)
        loss = tf.reduce_sum(x)
    assert tape.gradient(loss, w) is None
    zero = tape.gradient(loss, w, unconnected_gradients="zero")
    np.testing.assert_array_equal(zero.numpy(), np.zeros(w.shape))


def test_same_tensor_as_input_and_filters(backend):
    rng = np.random.default_rng(0)
    both = tf.constant(rng.standard_normal((3, 3, 3, 3)))
    problem = Call((3, 3, 3, 3), (3, 3, 3, 3)).problem
    gradients = []
    for function in (
        lambda x, w: ours.conv2d(x, w, 1, "SAME"),
        lambda x, w: conv2d_dense(x, w, problem),
    ):
        with tf.GradientTape() as tape:
            tape.watch(both)
            y = function(both, both)
        gradients.append(tape.gradient(y, both))
    assert_close(gradients[:1], gradients[1:])


def test_same_kernel_twice(backend):
    call = Call((2, 6, 6, 4), (3, 3, 4, 4), dtype="float64")
    x, w, to_dense = operands(call)
    function = sparse_function(call)
    gradients = []
    for conv in (
        function,
        lambda x, w: conv2d_dense(x, to_dense(w), call.problem),
    ):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = conv(tf.sin(conv(x, w)), w)
        gradients.append(tape.gradient(y, [x, w]))
    assert_close(*gradients)


def count_passes(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, from now on, how often a back end runs each pass."""
    module = importlib.import_module(f"sparse_conv.backends.{backend_name}")
    counts: Counter[str] = Counter()

    def counted(name: str, prepare):
        def counting_prepare(*args, **kwargs):
            run = prepare(*args, **kwargs)

            def counting_run(*operands):
                counts[name] += 1
                return run(*operands)

            return counting_run

        return counting_prepare

    for name in ("fprop", "dgrad", "wgrad"):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


# A pass is prepared once for a shape: a width of its own makes each test prepare anew.
WIDTHS = itertools.count(20)


@pytest.mark.parametrize("wanted", ["x", "w", "bias", "nothing"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_gradients_that_nobody_wants_are_not_computed(
    backend, call, wanted, traced, monkeypatch
):
    counts = count_passes(backend.name, monkeypatch)
    call = Call(**{**vars(call), "input_shape": (2, 6, next(WIDTHS), 4)})
    x, w, _ = operands(call)
    bias = tf.zeros(6, tf.float64)
    pattern = sparse_conv.SparseKernel.from_dense(make_data(call).kernel).pattern

    def step(x, w, bias):
        source = {"x": x, "w": w, "bias": bias, "nothing": None}[wanted]
        with tf.GradientTape() as tape:
            if source is not None:
                tape.watch(source)
            filters = sparse_conv.SparseKernel(w, pattern) if call.sparse else w
            y = ours.conv2d(x, filters, **call.options, bias=bias)
        return y if source is None else tape.gradient(y, source)

    (tf.function(step) if traced else step)(x, w, bias)
    expected = Counter(fprop=1, dgrad=int(wanted == "x"), wgrad=int(wanted == "w"))
    assert counts == expected


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_int32_has_no_gradient(backend, traced):
    weight = tf.Variable(2.0)

    def gradients():
        with tf.GradientTape() as tape:
            x = tf.cast(weight * tf.ones((1, 4, 4, 1)), tf.int32)
            y = ours.conv2d(x, tf.ones((3, 3, 1, 1), tf.int32), 1, "SAME")
            loss = tf.reduce_sum(tf.cast(y, tf.float32))
        return tape.gradient(loss, weight)

    if not traced:
        assert gradients() is None
        return
    seen = []
    tf.function(lambda: seen.append(gradients()))()
    assert seen == [None]


def test_forward_mode(backend, call):
    """It works, or it says that it does not; it never returns something else."""
    x, w, to_dense = operands(call)
    rng = np.random.default_rng(0)
    tangents = [tf.constant(rng.standard_normal(t.shape)) for t in (x, w)]
    results = []
    for function in (
        sparse_function(call),
        lambda x, w: conv2d_dense(x, to_dense(w), call.problem),
    ):
        with tf.autodiff.ForwardAccumulator([x, w], tangents) as accumulator:
            y = function(x, w)
        results.append(accumulator.jvp(y))
    assert results[0] is not None
    assert_close(results[:1], results[1:])


def test_forward_over_reverse(backend, call):
    """Hessian-vector products the way that TensorFlow's guide computes them."""
    x, w, to_dense = operands(call)
    rng = np.random.default_rng(0)
    tangents = [tf.constant(rng.standard_normal(t.shape)) for t in (x, w)]
    results = []
    for function in (
        sparse_function(call),
        lambda x, w: conv2d_dense(x, to_dense(w), call.problem),
    ):
        with tf.autodiff.ForwardAccumulator([x, w], tangents) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch([x, w])
                loss = tf.reduce_sum(function(x, w) ** 3)
            gradients = tape.gradient(loss, [x, w])
        results.append([accumulator.jvp(gradient) for gradient in gradients])
    assert_close(*results)


def test_custom_gradient_around_the_operator(backend, call):
    x, w, _ = operands(call)
    function = sparse_function(call)

    @tf.custom_gradient
    def doubled(x):
        y = function(x, w)
        return y, lambda dy: 2 * dy_to_dx(dy)

    def dy_to_dx(dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x, w)
        return tape.gradient(y, x, output_gradients=dy)

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = doubled(x)
    expected = 2 * dy_to_dx(tf.ones_like(y))
    assert_close([tape.gradient(y, x)], [expected])


def test_recompute_grad(backend, call):
    x, w, _ = operands(call)
    function = sparse_function(call)
    gradients = []
    for wrapped in (function, tf.recompute_grad(function)):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = tf.sin(wrapped(x, w))
        gradients.append(tape.gradient(y, [x, w]))
    assert_close(*gradients)


def test_gradient_to_a_slice_of_a_variable(backend):
    """A kernel that is itself computed from variables."""
    rng = np.random.default_rng(0)
    scale = tf.Variable(rng.standard_normal((1, 1, 1, 5)))
    kernel = tf.Variable(rng.standard_normal((3, 3, 2, 5)))
    mask = tf.constant(rng.random((3, 3, 2, 5)) < 0.4, tf.float64)
    x = tf.constant(rng.standard_normal((2, 5, 5, 2)))
    problem = Call((2, 5, 5, 2), (3, 3, 2, 5)).problem
    gradients = []
    for conv in (
        lambda w: ours.conv2d(x, w, 1, "SAME"),
        lambda w: conv2d_dense(x, w, problem),
    ):
        with tf.GradientTape() as tape:
            y = conv(scale * kernel * mask)
        gradients.append(tape.gradient(y, [scale, kernel]))
    assert_close(*gradients)


def test_training_reaches_the_same_place(backend):
    """Gradient descent with a trainable SparseKernel and with a masked dense kernel."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((3, 3, 2, 4)) * (rng.random((3, 3, 2, 4)) < 0.4)
    x = tf.constant(rng.standard_normal((4, 6, 6, 2)))
    target = tf.constant(rng.standard_normal((4, 6, 6, 4)))
    kernel = sparse_conv.SparseKernel.from_dense(dense, trainable=True)
    masked, mask = tf.Variable(dense), tf.constant(dense != 0, tf.float64)
    problem = Call((4, 6, 6, 2), (3, 3, 2, 4)).problem

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            y = ours.conv2d(x, kernel, 1, "SAME")
            loss = tf.reduce_mean((y - target) ** 2)
        gradient = tape.gradient(loss, kernel.trainable_variables)
        kernel.values.assign_sub(0.1 * gradient[0])
        return loss

    losses = []
    for _ in range(5):
        losses.append(step().numpy())
        with tf.GradientTape() as tape:
            y = conv2d_dense(x, masked * mask, problem)
            loss = tf.reduce_mean((y - target) ** 2)
        masked.assign_sub(0.1 * tape.gradient(loss, masked))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(kernel.to_dense().numpy(), masked.numpy(), atol=1e-12)
