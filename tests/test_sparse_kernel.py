"""SparseKernel: what it keeps, in which order, and how it is saved."""

from __future__ import annotations

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from sparse_conv import SparseKernel
from sparse_conv.pattern import Pattern
from tests import ours
from tests.strategies import DTYPES, Call, make_data, numpy_dtype


def dense_kernel(
    shape=(3, 2, 4, 5), density=0.4, dtype="float32", seed=0
) -> np.ndarray:
    call = Call((1, 8, 8, shape[2]), shape, density=density, dtype=dtype, seed=seed)
    return make_data(call).kernel


def canonical(dense: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept weights by output channel k, then by (c * R + r) * S + s."""
    return dense.transpose(3, 2, 0, 1)[kept.transpose(3, 2, 0, 1)]


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_from_dense_keeps_the_nonzeros_in_order(shape, density, dtype, seed):
    dense = dense_kernel(shape, density, dtype, seed)
    kernel = SparseKernel.from_dense(dense)
    assert kernel.shape == shape
    assert kernel.dtype == tf.as_dtype(dtype)
    assert kernel.nnz == np.count_nonzero(dense)
    assert kernel.density == pytest.approx(kernel.nnz / dense.size)
    assert kernel.values.shape == (kernel.nnz,)
    assert kernel.values.numpy().tobytes() == canonical(dense, dense != 0).tobytes()
    assert isinstance(kernel.pattern, Pattern)
    np.testing.assert_array_equal(kernel.to_dense().numpy(), dense)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.3, 1.0, 100.0])
def test_threshold(threshold, seed):
    dense = dense_kernel(density=1.0, seed=seed)
    kept = np.abs(dense) > threshold
    kernel = SparseKernel.from_dense(dense, threshold=threshold)
    np.testing.assert_array_equal(kernel.values.numpy(), canonical(dense, kept))
    np.testing.assert_array_equal(kernel.to_dense().numpy(), np.where(kept, dense, 0))


def test_a_weight_at_the_threshold_is_dropped():
    dense = np.array([0.5, -0.5, 0.75, -0.75], np.float32).reshape(1, 1, 1, 4)
    kernel = SparseKernel.from_dense(dense, threshold=0.5)
    np.testing.assert_array_equal(kernel.values.numpy(), [0.75, -0.75])


def test_threshold_of_integers():
    dense = np.array([-(2**31), -2, -1, 0, 1, 2, 2**31 - 1], np.int32)
    kernel = SparseKernel.from_dense(dense.reshape(1, 1, 1, 7), threshold=1)
    np.testing.assert_array_equal(kernel.values.numpy(), [-(2**31), -2, 2, 2**31 - 1])


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_mask(threshold, kind):
    rng = np.random.default_rng(0)
    dense = dense_kernel(density=1.0)
    mask = rng.random(dense.shape) < 0.5
    kept = mask & (np.abs(dense) > threshold)
    given_mask = mask if kind == "numpy" else tf.constant(mask)
    kernel = SparseKernel.from_dense(dense, threshold=threshold, mask=given_mask)
    np.testing.assert_array_equal(kernel.to_dense().numpy(), np.where(kept, dense, 0))
    assert kernel.nnz == kept.sum()


def test_nan_and_infinity_are_kept():
    dense = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30], np.float32)
    kernel = SparseKernel.from_dense(dense.reshape(1, 1, 1, 6))
    np.testing.assert_array_equal(
        kernel.values.numpy(), np.array([np.nan, np.inf, -np.inf, 1e-30], np.float32)
    )


@pytest.mark.parametrize("kind", ["numpy", "tensor", "variable", "keras", "big-endian"])
def test_sources(kind):
    dense = dense_kernel()
    make = {
        "numpy": lambda a: a,
        "tensor": tf.constant,
        "variable": tf.Variable,
        "keras": keras.Variable,
        "big-endian": lambda a: a.astype(">f4"),
    }[kind]
    kernel = SparseKernel.from_dense(make(dense))
    np.testing.assert_array_equal(kernel.to_dense().numpy(), dense)


@pytest.mark.parametrize("source", ["numpy", "variable"])
def test_source_may_change_afterwards(source):
    dense = dense_kernel()
    before = dense.copy()
    given_kernel = tf.Variable(dense) if source == "variable" else dense
    kernel = SparseKernel.from_dense(given_kernel)
    if source == "variable":
        given_kernel.assign(given_kernel + 1)
    else:
        dense += 1
    np.testing.assert_array_equal(kernel.to_dense().numpy(), before)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        pytest.param(ValueError, {"dense": np.ones((3, 3, 4))}, id="rank 3"),
        pytest.param(ValueError, {"dense": np.ones((1, 3, 3, 4, 6))}, id="rank 5"),
        pytest.param(ValueError, {"threshold": -1.0}, id="negative threshold"),
        pytest.param(ValueError, {"threshold": float("nan")}, id="threshold NaN"),
        pytest.param(ValueError, {"mask": np.ones((3, 3), bool)}, id="mask's shape"),
        pytest.param(TypeError, {"mask": np.ones((3, 2, 4, 5))}, id="mask of floats"),
        pytest.param(TypeError, {"dense": np.ones((3, 3, 4, 6), np.int64)}, id="int64"),
        pytest.param(TypeError, {"dense": np.ones((3, 3, 4, 6), bool)}, id="bool"),
        pytest.param(
            TypeError, {"dense": np.ones((3, 3, 4, 6), np.complex64)}, id="complex"
        ),
        pytest.param(TypeError, {"dense": None}, id="None"),
        pytest.param(TypeError, {"dense": "x"}, id="text"),
        pytest.param(TypeError, {"dense": object()}, id="object"),
        pytest.param(TypeError, {"threshold": "x"}, id="threshold of text"),
        pytest.param(TypeError, {"threshold": None}, id="threshold None"),
    ],
)
def test_refused(error, arguments):
    with pytest.raises(error) as caught:
        SparseKernel.from_dense(**{"dense": dense_kernel(), **arguments})
    assert type(caught.value) is error
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize(
    "shape", [(3, 3, 2, 0), (0, 3, 2, 4), (3, 3, 0, 4), (1, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_kernels(shape, density):
    dense = np.full(shape, density, np.float32)
    kernel = SparseKernel.from_dense(dense)
    assert kernel.nnz == np.count_nonzero(dense)
    assert kernel.density == (density if dense.size else 0.0)
    np.testing.assert_array_equal(kernel.to_dense().numpy(), dense)


def test_repr_tells_what_matters():
    kernel = SparseKernel.from_dense(dense_kernel(density=0.4))
    text = repr(kernel)
    for piece in ("SparseKernel", "float32", str(kernel.nnz), f"{kernel.density:.3g}"):
        assert piece in text
    assert "trainable" not in text
    assert "trainable" in repr(
        SparseKernel.from_dense(dense_kernel(density=0.4), trainable=True)
    )


def test_values_are_a_variable_only_when_trainable():
    fixed = SparseKernel.from_dense(dense_kernel(), name="fixed")
    assert isinstance(fixed.values, tf.Tensor)
    assert fixed.name == "fixed"
    assert fixed.variables == fixed.trainable_variables == ()
    trainable = SparseKernel.from_dense(dense_kernel(), trainable=True)
    assert isinstance(trainable.values, tf.Variable)
    assert trainable.trainable_variables == (trainable.values,)


def test_to_dense_is_differentiable():
    dense = dense_kernel(dtype="float64")
    kernel = SparseKernel.from_dense(dense, trainable=True)
    weights = np.arange(dense.size, dtype=np.float64).reshape(dense.shape)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(kernel.to_dense() * weights)
    np.testing.assert_array_equal(
        tape.gradient(loss, kernel.values).numpy(), canonical(weights, dense != 0)
    )


def test_to_dense_in_a_graph():
    dense = dense_kernel()
    kernel = SparseKernel.from_dense(dense, trainable=True)
    traced = tf.function(kernel.to_dense)
    y = traced()
    np.testing.assert_array_equal(y.numpy(), dense)
    assert y.shape == dense.shape
    kernel.values.assign(2 * kernel.values)
    np.testing.assert_array_equal(traced().numpy(), 2 * dense)


def test_can_not_be_made_in_a_graph():
    @tf.function
    def traced(dense):
        return SparseKernel.from_dense(dense).values

    with pytest.raises(TypeError, match="Received: "):
        traced(tf.constant(dense_kernel()))


def test_assignment_to_values_is_seen(backend):
    dense = dense_kernel((3, 3, 4, 6))
    x = tf.ones((2, 6, 6, 4))
    kernel = SparseKernel.from_dense(dense, trainable=True)
    y = ours.conv2d(x, kernel, 1, "SAME")
    kernel.values.assign(2 * kernel.values)
    doubled = ours.conv2d(x, kernel, 1, "SAME")
    np.testing.assert_array_equal(doubled.numpy(), 2 * y.numpy())


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoint_restores_the_values(tmp_path, trainable, dtype):
    dense = dense_kernel(dtype=dtype)
    kernel = SparseKernel.from_dense(dense, trainable=trainable)
    path = tf.train.Checkpoint(kernel=kernel).save(str(tmp_path / "model"))
    other = SparseKernel.from_dense(
        dense * numpy_dtype(dtype).type(2), trainable=trainable
    )
    tf.train.Checkpoint(kernel=other).restore(path).assert_consumed()
    assert other.values.dtype == kernel.values.dtype
    np.testing.assert_array_equal(
        other.to_dense().numpy().astype(np.float64), dense.astype(np.float64)
    )


@pytest.mark.parametrize(
    ("trainable", "traced"),
    [(False, False), (True, False), (True, True)],
    ids=["fixed-eager", "trainable-eager", "trainable-traced"],
)
def test_restored_values_are_used(tmp_path, backend, trainable, traced):
    """By functions that were traced before, too, where the values are a variable."""
    dense = dense_kernel((3, 3, 4, 6))
    kernel = SparseKernel.from_dense(dense, trainable=trainable)
    path = tf.train.Checkpoint(kernel=kernel).save(str(tmp_path / "model"))
    other = SparseKernel.from_dense(2 * dense, trainable=trainable)

    def call(x):
        return ours.conv2d(x, other, 1, "SAME")

    call = tf.function(call) if traced else call
    x = tf.ones((2, 6, 6, 4))
    doubled = call(x).numpy()
    tf.train.Checkpoint(kernel=other).restore(path).assert_consumed()
    np.testing.assert_array_equal(2 * call(x).numpy(), doubled)


def test_fixed_values_of_a_traced_function_are_not_restored(tmp_path):
    """A graph holds on to them, so other values are refused, and equal ones taken."""
    dense = dense_kernel((3, 3, 4, 6))
    kernel = SparseKernel.from_dense(dense)
    path = tf.train.Checkpoint(kernel=kernel).save(str(tmp_path / "model"))
    for scale in (1, 2):
        other = SparseKernel.from_dense(scale * dense)
        traced = tf.function(lambda x, k=other: ours.conv2d(x, k, 1, "SAME"))
        traced(tf.ones((2, 6, 6, 4)))
        checkpoint = tf.train.Checkpoint(kernel=other)
        if scale == 1:
            checkpoint.restore(path).assert_consumed()
        else:
            with pytest.raises(ValueError, match=r"before a tf\.function.*Received: "):
                checkpoint.restore(path)


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("difference", ["positions", "number", "shape"])
def test_checkpoint_of_another_pattern_is_refused(tmp_path, trainable, difference):
    dense = np.zeros((3, 2, 4, 5), np.float32)
    dense[0, 0, :, 0] = 1
    kernel = SparseKernel.from_dense(dense, trainable=trainable)
    path = tf.train.Checkpoint(kernel=kernel).save(str(tmp_path / "model"))
    if difference == "positions":
        dense = np.roll(dense, 1, axis=1)
    elif difference == "number":
        dense[1, 1] = 1
    else:
        dense = dense.reshape(2, 3, 4, 5)
    other = SparseKernel.from_dense(dense, trainable=trainable)
    before = other.values.numpy().copy()
    with pytest.raises(ValueError):
        tf.train.Checkpoint(kernel=other).restore(path).assert_consumed()
    assert other.values.numpy().tobytes() == before.tobytes()


def test_checkpoint_of_another_dtype_is_refused(tmp_path):
    dense = dense_kernel()
    kernel = SparseKernel.from_dense(dense)
    path = tf.train.Checkpoint(kernel=kernel).save(str(tmp_path / "model"))
    other = SparseKernel.from_dense(dense.astype(np.float64))
    with pytest.raises(ValueError, match=r"dtype.*Received: "):
        tf.train.Checkpoint(kernel=other).restore(path)


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
def test_checkpoint_is_compressed(tmp_path, trainable):
    dense = dense_kernel((7, 7, 64, 64), density=0.05)
    kernel = SparseKernel.from_dense(dense, trainable=trainable)
    tf.train.Checkpoint(kernel=kernel).save(str(tmp_path / "model"))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < dense.nbytes / 4


def test_checkpoint_with_an_optimizer(tmp_path):
    dense = dense_kernel((3, 3, 4, 6))
    x = tf.ones((2, 6, 6, 4))

    def trained(steps, path=None):
        kernel = SparseKernel.from_dense(dense, trainable=True)
        optimizer = keras.optimizers.Adam(0.1)
        optimizer.build(kernel.trainable_variables)
        checkpoint = tf.train.Checkpoint(kernel=kernel, optimizer=optimizer)
        if path is not None:
            checkpoint.restore(path)
        for _ in range(steps):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(ours.conv2d(x, kernel, 1, "SAME") ** 2)
            gradients = tape.gradient(loss, kernel.trainable_variables)
            optimizer.apply(gradients, kernel.trainable_variables)
        return kernel, checkpoint

    _, halfway = trained(2)
    resumed, _ = trained(2, halfway.save(str(tmp_path / "model")))
    straight, _ = trained(4)
    np.testing.assert_array_equal(resumed.values.numpy(), straight.values.numpy())


def test_kernel_in_a_module_is_found():
    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.layers = [
                SparseKernel.from_dense(dense_kernel(), trainable=True)
                for _ in range(2)
            ]

    model = Model()
    assert len(model.trainable_variables) == 2
    assert sum(isinstance(m, SparseKernel) for m in model.submodules) == 2


def test_dies_with_its_last_reference(backend):
    kernel = SparseKernel.from_dense(dense_kernel((3, 3, 4, 6)))
    x = tf.ones((2, 6, 6, 4))
    with tf.GradientTape() as tape:
        tape.watch([x, kernel.values])
        y = ours.conv2d(x, kernel, 2, "SAME")
    tape.gradient(y, [x, kernel.values])
    references = [
        weakref.ref(object_) for object_ in (kernel, kernel.pattern, kernel.values)
    ]
    del kernel, x, y, tape
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_one_kernel_serves_every_geometry(backend):
    """What is derived from a pattern for one geometry is not taken for another."""
    dense = dense_kernel((3, 3, 2, 6), dtype="float64")
    kernel = SparseKernel.from_dense(dense)
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 9, 8, 4)))
    for _ in range(2):
        for strides in (1, 2, [1, 3]):
            for dilations in (1, 2):
                for padding in ("SAME", "VALID"):
                    options = (strides, padding, "NHWC", dilations)
                    results = []
                    for filters in (kernel, tf.constant(dense)):
                        with tf.GradientTape() as tape:
                            tape.watch(x)
                            y = ours.conv2d(x, filters, *options)
                        results.append((y, tape.gradient(y, x)))
                    for a, b in zip(*results, strict=True):
                        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-12)


def test_one_kernel_serves_inputs_of_any_groups(backend):
    dense = dense_kernel((3, 3, 2, 6), dtype="float64")
    kernel = SparseKernel.from_dense(dense)
    for channels in (2, 4, 6, 12):
        x = tf.constant(np.random.default_rng(0).standard_normal((2, 5, 5, channels)))
        results = []
        for filters in (kernel, tf.constant(dense)):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = ours.conv2d(x, filters, 1, "SAME")
            results.append((y, tape.gradient(y, x)))
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-12)
