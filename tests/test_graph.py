"""The operator inside `tf.function`: shapes, tracing, XLA, SavedModel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings

import sparse_conv
from sparse_conv import execution
from tests import ours
from tests.conftest import skip_unless_usable
from tests.reference import conv2d_reference
from tests.strategies import Call, calls, make_data

X, KERNEL = (2, 6, 5, 4), (3, 3, 4, 6)


def data_of(call: Call):
    """Input, kernel and float64 reference of a call on small integers."""
    data = make_data(replace(call, integers=True))
    x = data.x.reshape(call.problem.input_shape)
    y = conv2d_reference(x, data.kernel, call.problem).reshape(call.output_shape)
    return tf.constant(data.x), data.kernel, y


@settings(max_examples=max(20, settings.default.max_examples // 3))
@given(call=calls())
def test_graph_computes_what_eager_execution_computes(backend, call):
    data = make_data(call)
    x, dy = tf.constant(data.x), tf.constant(data.dy)
    kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
    filters = kernel if call.sparse else tf.constant(data.kernel)
    weights = kernel.values if call.sparse else filters
    bias = None if data.bias is None else tf.constant(data.bias)

    def both(x, dy):
        if call.dtype == "int32":
            return [ours.conv2d(x, filters, **call.options, bias=bias)]
        with tf.GradientTape() as tape:
            tape.watch([x, weights])
            y = ours.conv2d(x, filters, **call.options, bias=bias)
        return [y, *tape.gradient(y, [x, weights], output_gradients=dy)]

    unknown = [tf.TensorSpec([None] * len(t.shape), t.dtype) for t in (x, dy)]
    eager = both(x, dy)
    for function in (tf.function(both), tf.function(both, input_signature=unknown)):
        for a, b in zip(eager, function(x, dy), strict=True):
            assert a.shape == b.shape
            assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ((2, 8, 9, 4), {}, (2, 8, 9, 6)),
        ((None, 8, 9, 4), {}, (None, 8, 9, 6)),
        ((2, None, 9, 4), {}, (2, None, 9, 6)),
        ((2, 8, 9, None), {}, (2, 8, 9, 6)),
        ((None, None, None, None), {}, (None, None, None, 6)),
        ((None, 3, 8, 9, 4), {"strides": 2}, (None, 3, 4, 5, 6)),
        ((2, 8, None, 4), {"padding": "VALID"}, (2, 6, None, 6)),
        ((2, 4, 8, None), {"data_format": "NCHW"}, (2, 6, 8, None)),
        (None, {}, None),
    ],
)
def test_static_shape_of_the_output(backend, spec, options, expected, sparse):
    dense = tf.ones(KERNEL)
    filters = sparse_conv.SparseKernel.from_dense(dense) if sparse else dense
    options = {"strides": 1, "padding": "SAME", **options}
    seen = []

    @tf.function(input_signature=[tf.TensorSpec(spec)])
    def traced(x):
        seen.append(ours.conv2d(x, filters, **options))
        return seen[-1]

    traced.get_concrete_function()
    shape = seen[0].shape
    assert (None if shape.rank is None else tuple(shape)) == expected


def test_static_shape_of_gradients(backend):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones(KERNEL, np.float32))
    seen = []

    @tf.function(input_signature=[tf.TensorSpec((None, 8, None, 4))])
    def traced(x):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel.values])
            y = ours.conv2d(x, kernel, 1, "SAME")
        seen.extend(tape.gradient(y, [x, kernel.values]))

    traced.get_concrete_function()
    assert tuple(seen[0].shape) == (None, 8, None, 4)
    assert tuple(seen[1].shape) == (kernel.nnz,)


def test_one_trace_serves_many_sizes(backend):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 2, 3), np.float32))
    traces = []

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 2))])
    def traced(x):
        traces.append(1)
        return ours.conv2d(x, kernel, 2, "SAME")

    for shape in ((1, 4, 4, 2), (3, 7, 5, 2), (0, 7, 5, 2), (2, 0, 5, 2)):
        x = tf.ones(shape)
        expected = ours.conv2d(x, kernel, 2, "SAME")
        np.testing.assert_array_equal(traced(x).numpy(), expected.numpy())
    assert len(traces) == 1


def test_variables_of_a_kernel_update_without_a_new_trace(backend):
    call = Call(X, KERNEL, density=0.4)
    x, dense, y = data_of(call)
    kernel = sparse_conv.SparseKernel.from_dense(dense, trainable=True)
    traces = []

    @tf.function
    def traced(x):
        traces.append(1)
        return ours.conv2d(x, kernel, 1, "SAME")

    np.testing.assert_array_equal(traced(x).numpy(), y)
    kernel.values.assign(3 * kernel.values)
    np.testing.assert_array_equal(traced(x).numpy(), 3 * y)
    assert len(traces) == 1


def test_variables_made_dense_update_without_a_new_trace(backend):
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))
    kernel = tf.Variable(dense)
    traces = []

    @tf.function
    def traced(x):
        traces.append(1)
        return ours.conv2d(x, kernel, 1, "SAME")

    np.testing.assert_array_equal(traced(x).numpy(), y)
    # The zeros move: a pattern kept from the first call would show.
    kernel.assign(np.roll(dense, 1, axis=3))
    np.testing.assert_array_equal(traced(x).numpy(), np.roll(y, 1, axis=3))
    assert len(traces) == 1


def test_assignment_within_the_graph_is_seen_in_order(backend):
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))
    kernel = sparse_conv.SparseKernel.from_dense(dense, trainable=True)

    @tf.function
    def traced(x):
        before = ours.conv2d(x, kernel, 1, "SAME")
        kernel.values.assign(2 * kernel.values)
        after = ours.conv2d(x, kernel, 1, "SAME")
        kernel.values.assign(kernel.values / 2)
        return before, after, ours.conv2d(x, kernel, 1, "SAME")

    for result, factor in zip(traced(x), (1, 2, 1), strict=True):
        np.testing.assert_array_equal(result.numpy(), factor * y)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("size", [3, 50], ids=["few weights", "many weights"])
def test_gradient_of_what_a_function_captures(backend, sparse, size):
    """TensorFlow captures small tensors as constants; gradients must not care."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((3, 3, 2, size)).astype(np.float32)
    dense[rng.random(dense.shape) < 0.7] = 0
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    filters = kernel if sparse else tf.constant(dense)
    weights = kernel.values if sparse else filters
    x = tf.constant(rng.standard_normal((2, 5, 5, 2)), tf.float32)

    def function(x):
        return ours.conv2d(x, filters, 1, "SAME")

    gradients = []
    for call in (function, tf.function(function)):
        with tf.GradientTape() as tape:
            tape.watch([x, weights])
            y = call(x)
        gradients.append(tape.gradient(y, [x, weights]))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_tf_gradients_inside_a_graph(backend):
    x, dense, _ = data_of(Call(X, KERNEL, density=0.4))
    kernel = tf.constant(dense)

    @tf.function
    def traced(x, kernel):
        y = ours.conv2d(x, kernel, 1, "SAME")
        return tf.gradients(y, [x, kernel])

    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = ours.conv2d(x, kernel, 1, "SAME")
    expected = tape.gradient(y, [x, kernel])
    for a, b in zip(traced(x, kernel), expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_tape_within_and_around(backend):
    """A gradient taken in the graph, differentiated again from outside."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.standard_normal((1, 4, 4, 2)))
    w = tf.constant(rng.standard_normal((3, 3, 2, 3)))

    def penalty(x, w):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(ours.conv2d(x, w, 1, "SAME") ** 2)
        return tf.reduce_sum(tape.gradient(y, x) ** 2)

    results = []
    for function in (penalty, tf.function(penalty)):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            loss = function(x, w)
        results.append(tape.gradient(loss, [x, w]))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)


def test_loops_and_branches(backend):
    x, dense, _ = data_of(Call(X, (3, 3, 4, 4), density=0.3))
    kernel = sparse_conv.SparseKernel.from_dense(dense)

    @tf.function
    def traced(x, n, twice):
        for _ in tf.range(n):
            x = ours.conv2d(x, kernel, 1, "SAME", activation="relu6")
        if twice:
            x = ours.conv2d(x, kernel, 1, "SAME")
        return x

    expected = x
    for _ in range(3):
        expected = ours.conv2d(expected, kernel, 1, "SAME", activation="relu6")
    y = traced(x, tf.constant(3), tf.constant(False))
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
    expected = ours.conv2d(expected, kernel, 1, "SAME")
    y = traced(x, tf.constant(3), tf.constant(True))
    np.testing.assert_array_equal(y.numpy(), expected.numpy())


def test_gradient_through_a_loop(backend):
    x, dense, _ = data_of(Call(X, (3, 3, 4, 4), density=0.3))
    kernel = sparse_conv.SparseKernel.from_dense(dense / 8, trainable=True)

    def repeated(x, n):
        for _ in tf.range(n):
            x = ours.conv2d(x, kernel, 1, "SAME", activation="tanh")
        return x

    gradients = []
    for function in (repeated, tf.function(repeated)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x, tf.constant(3))
        gradients.append(tape.gradient(y, [x, kernel.values]))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-5)


def test_map_fn_and_dataset_map():
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))
    kernel = sparse_conv.SparseKernel.from_dense(dense)

    def one(image):
        return ours.conv2d(image[tf.newaxis], kernel, 1, "SAME")[0]

    np.testing.assert_array_equal(tf.map_fn(one, x).numpy(), y)
    # A pipeline runs on the host, wherever its results go.
    with tf.device("/CPU:0"):
        dataset = tf.data.Dataset.from_tensor_slices(x).map(one, num_parallel_calls=2)
        np.testing.assert_array_equal(np.stack(list(dataset)), y)


def test_two_operators_of_one_name(backend):
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))

    @tf.function
    def traced(x):
        first = ours.conv2d(x, dense, 1, "SAME", name="conv")
        second = ours.conv2d(x, dense, 1, "SAME", name="conv")
        return first + second

    np.testing.assert_array_equal(traced(x).numpy(), 2 * y)
    names = [op.name for op in traced.get_concrete_function(x).graph.get_operations()]
    assert any(name.startswith("conv/") or name == "conv" for name in names)


def test_arrays_in_a_trace_are_constants(backend):
    """As for any of TensorFlow's operations."""
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))
    traced = tf.function(lambda x: ours.conv2d(x, dense, 1, "SAME"))
    np.testing.assert_array_equal(traced(x).numpy(), y)


def test_functions_that_run_eagerly(backend):
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))
    traced = tf.function(lambda x: ours.conv2d(x, dense, 1, "SAME"))
    tf.config.run_functions_eagerly(True)
    try:
        np.testing.assert_array_equal(traced(x).numpy(), y)
    finally:
        tf.config.run_functions_eagerly(False)


def test_error_of_a_running_graph_carries_the_message(backend):
    unknown = tf.TensorSpec([None] * 4)

    @tf.function(input_signature=[unknown, unknown])
    def traced(x, kernel):
        return ours.conv2d(x, kernel, 1, "VALID")

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)height.*Received: "):
        traced(tf.ones((1, 2, 9, 1)), tf.ones((7, 7, 1, 1)))
    assert traced(tf.ones((1, 9, 9, 1)), tf.ones((7, 7, 1, 1))).numpy().max() == 49


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_xla_gets_a_clear_error(backend, gradient):
    x, dense, y = data_of(Call(X, KERNEL, density=0.4))
    kernel = sparse_conv.SparseKernel.from_dense(dense)

    @tf.function(jit_compile=True)
    def compiled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ours.conv2d(x, kernel, 1, "SAME")
        return tape.gradient(y, x) if gradient else y

    with pytest.raises(NotImplementedError, match=r"XLA.*Received: .*jit_compile"):
        compiled(x)
    # And nothing is broken after it.
    result = ours.conv2d(x, kernel, 1, "SAME")
    np.testing.assert_array_equal(result.numpy(), y)


def test_xla_within_a_function_gets_a_clear_error(backend):
    x, dense, _ = data_of(Call(X, KERNEL, density=0.4))
    kernel = sparse_conv.SparseKernel.from_dense(dense)

    @tf.function
    def inner(x):
        return ours.conv2d(x, kernel, 1, "SAME")

    @tf.function(jit_compile=True)
    def outer(x):
        return inner(x) + 1

    inner(x)
    with pytest.raises((NotImplementedError, tf.errors.InvalidArgumentError)) as caught:
        outer(x)
    assert "XLA" in str(caught.value) or "EagerPyFunc" in str(caught.value)


class Model(tf.Module):
    """A module as users write it, with one convolution."""

    def __init__(self, kernel, options, signature):
        super().__init__()
        self.kernel = kernel
        self.options = options
        self.call = tf.function(self.convolve, input_signature=signature)

    def convolve(self, x):
        return ours.conv2d(x, self.kernel, **self.options)


FIRST = """
import sys
import numpy as np
import tensorflow as tf
import sparse_conv

w = np.zeros((3, 3, 4, 8), np.float32)
w[1, 1, 2] = 3.0
kernel = sparse_conv.SparseKernel.from_dense(w)

@tf.function
def call(x):
    return sparse_conv.conv2d(x, kernel, 1, "SAME", backend=sys.argv[1])

x = tf.round(8 * tf.random.normal((2, 7, 7, 4)))
np.testing.assert_array_equal(call(x), 3 * np.tile(x[..., 2:3], 8))
"""


def test_a_graph_may_be_the_first_to_use_a_back_end(backend):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", FIRST, backend.name]
    subprocess.run(command, cwd=root, check=True, timeout=120)


SAVED = {
    "plain": Call(X, KERNEL),
    "strided and padded": Call(
        X, KERNEL, strides=[2, 1], padding=[[0, 0], [1, 2], [3, 0], [0, 0]]
    ),
    "more batch dimensions": Call((2, 3, 6, 5, 4), KERNEL),
}

LOAD = """
import sys
import numpy as np
import tensorflow as tf
data = np.load(sys.argv[1] + "/data.npz")
model = tf.saved_model.load(sys.argv[1])
assert "sparse_conv" not in sys.modules
np.testing.assert_array_equal(model.call(tf.constant(data["x"])).numpy(), data["y"])
"""


def operations(saved_model: Path) -> set[str]:
    """The operations that a SavedModel is made of."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    message = SavedModel.FromString((saved_model / "saved_model.pb").read_bytes())
    graphs = [graph.graph_def for graph in message.meta_graphs]
    nodes = [node for graph in graphs for node in graph.node]
    for graph in graphs:
        for function in graph.library.function:
            nodes.extend(function.node_def)
    return {node.op for node in nodes}


@pytest.mark.parametrize("kind", ["sparse", "trainable", "variable"])
@pytest.mark.parametrize("called", [False, True], ids=["untraced", "called before"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_model_runs_or_is_not_made(tmp_path, name, kind, called):
    call = SAVED[name]
    x, dense, y = data_of(call)
    kernel = (
        tf.Variable(dense)
        if kind == "variable"
        else sparse_conv.SparseKernel.from_dense(dense, trainable=kind == "trainable")
    )
    signature = [tf.TensorSpec([None, *call.input_shape[1:]])]
    model = Model(kernel, {"strides": call.strides, "padding": call.padding}, signature)
    if called:
        np.testing.assert_array_equal(model.call(x).numpy(), y)
    try:
        tf.saved_model.save(model, str(tmp_path))
    except NotImplementedError as error:
        # A refusal is fine if it says what can't be done and what can.
        assert called, error
        assert "SavedModel" in str(error) and "Received: " in str(error)
        return
    assert not any("PyFunc" in op for op in operations(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for factor in (1, 2):
        batch = tf.concat([x] * factor, axis=0)
        expected = np.concatenate([y] * factor)
        np.testing.assert_array_equal(loaded.call(batch).numpy(), expected)
    # Saving must not change what the model itself computes.
    np.testing.assert_array_equal(model.call(x).numpy(), y)


def test_saved_model_runs_without_this_package(tmp_path):
    x, dense, y = data_of(Call(X, KERNEL))
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    options = {"strides": 1, "padding": "SAME"}
    model = Model(kernel, options, [tf.TensorSpec([None, *X[1:]])])
    tf.saved_model.save(model, str(tmp_path))
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y)
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_saved_model_of_a_function_around_the_convolution(tmp_path):
    """The convolution is hidden one function deeper than what is saved."""
    x, dense, _ = data_of(Call(X, KERNEL))
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    inner = tf.function(lambda x: ours.conv2d(x, kernel, 1, "SAME"))
    module = tf.Module()
    module.kernel = kernel
    module.call = tf.function(
        lambda x: inner(x) + 1, input_signature=[tf.TensorSpec(X)]
    )
    expected = module.call(x).numpy()
    try:
        tf.saved_model.save(module, str(tmp_path))
    except (NotImplementedError, AssertionError, ValueError) as error:
        assert "SavedModel" in str(error), error
        return
    assert not any("PyFunc" in op for op in operations(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_array_equal(loaded.call(x).numpy(), expected)


def watch(monkeypatch, name: str, see: Callable[[str, tuple], None]) -> None:
    """Shows every call of a pass to `see`: its name and operands."""
    run = getattr(execution, name)

    def seen(*operands):
        see(name, operands)
        return run(*operands)

    monkeypatch.setattr(execution, name, seen)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_kernel_that_never_changes_is_the_same_tensor_in_every_call(
    backend, sparse, monkeypatch
):
    dense = tf.constant(np.ones(KERNEL, np.float32))
    kernel = sparse_conv.SparseKernel.from_dense(dense) if sparse else dense
    weights = kernel.values if sparse else dense
    met = []
    places = {"fprop": 2, "dgrad": 3}

    def note(name: str, operands: tuple) -> None:
        met.append((name, operands[places[name]] is weights))

    for name in places:
        watch(monkeypatch, name, note)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ours.conv2d(x, kernel, 1, "SAME", bias=tf.ones(KERNEL[-1]))
        return y, tape.gradient(y, x)

    for factor in (1, 2):
        y, dx = gradient(factor * tf.ones(X))
        assert tf.reduce_max(y).numpy() == 36 * factor + 1
        assert tf.reduce_max(dx).numpy() == 54
    assert met == 2 * [("fprop", True), ("dgrad", True)]
    # What is given as an argument may be another one in each call.
    met.clear()
    tf.function(lambda x, w: ours.conv2d(x, w, 1, "SAME"))(tf.ones(X), dense)
    assert met == [("fprop", False)]


@pytest.mark.gpu
def test_every_pass_of_unknown_shapes_runs_where_its_operands_are(monkeypatch):
    skip_unless_usable("cuda")
    devices = set()

    def note(name: str, operands: tuple) -> None:
        tensors = [one for one in operands if isinstance(one, tf.Tensor)]
        for tensor in tensors:
            kind = tf.DeviceSpec.from_string(tensor.backing_device).device_type
            devices.add((name, kind))

    for name in ("fprop", "dgrad", "wgrad"):
        watch(monkeypatch, name, note)
    kernel = tf.constant(np.ones((3, 3, 2, 4), np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None] * 4)])
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = ours.conv2d(x, kernel, 1, "SAME")
        return tape.gradient(y, [x, kernel])

    with tf.device("/GPU:0"):
        gradients(tf.ones([1, 6, 7, 2]))
    assert devices == {("fprop", "GPU"), ("dgrad", "GPU"), ("wgrad", "GPU")}
