"""When code is generated for a kernel, for which values, and what serves meanwhile.

The rules are tested without a GPU; on one, the whole way of a call.
"""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from sparse_conv import jit
from sparse_conv.backends import cuda_baked
from sparse_conv.backends.cuda_baked import BakedCode, Loaded
from sparse_conv.bridge import HOST, Memory
from tests.conftest import skip_unless_usable
from tests.problems import make, make_data
from tests.reference import conv2d_reference, dgrad_reference


@pytest.fixture
def compiled() -> list[float]:
    """The values for which code was generated."""
    return []


@pytest.fixture
def code(monkeypatch, compiled) -> BakedCode:
    """Code whose compiler is replaced by one that names the values it compiled."""

    def compile_values(code_reference, state_reference):
        state = state_reference()
        if state is None:
            return None
        compiled.append(float(state.values[0]))
        if compiled[-1] < 0:
            raise ValueError("negative values don't compile")
        return [compiled[-1]]

    def memory(tensor):
        # The same numbers are the same memory, as for a tensor that a graph hands over.
        return Memory(int(tensor[0]) + 1000, tensor)

    monkeypatch.setattr(cuda_baked, "_compile", compile_values)
    monkeypatch.setattr(cuda_baked, "known_memory", memory)
    return BakedCode("shape", lambda: None, tf.float32, None, HOST, set())


def values_of(number: float) -> tf.Tensor:
    return tf.constant([number])


@pytest.fixture
def seconds(monkeypatch) -> dict[str, float]:
    """The times of the configurations that compile."""
    times: dict[str, float] = {}

    def compiled(code, block, rows, values):
        if block not in times:
            raise jit.CompileError(block)
        return Loaded(block, [times[block]])

    monkeypatch.setattr(cuda_baked, "_compiled", compiled)
    monkeypatch.setattr(
        BakedCode, "_seconds", lambda code, loaded, *_: loaded.functions[0]
    )
    return times


def test_the_fastest_configuration_is_taken(code, seconds):
    seconds.update(expected=3.0, faster=2.0, slower=4.0)
    values, others = values_of(1.0), values_of(2.0)
    code.block = "expected"
    assert code.loaded(others, waits=True) == [2.0]
    blocks = ["expected", "slower", "does not compile", "faster"]
    code.tune(blocks, {}, {}, values)
    assert code.loaded(values, waits=False) == Loaded("faster", [2.0])
    assert (code.block, code.compared) == ("faster", 3)
    # What computes with other values is not disturbed.
    assert code.loaded(others, waits=False) == [2.0]


def test_the_expected_configuration_stays_unless_another_is_clearly_faster(
    code, seconds
):
    seconds.update(expected=1.0, equal=0.99)
    code.tune(["expected", "equal"], {}, {}, values_of(1.0))
    assert code.block == "expected"


def test_where_no_configuration_compiles_nothing_changes(code, seconds):
    code.block = "expected"
    code.tune(["none", "of these"], {}, {}, values_of(1.0))
    assert (code.block, code.compared) == ("expected", 0)
    assert code.loaded(values_of(1.0), waits=False) is None


def test_other_faults_of_a_comparison_are_not_hidden(code, seconds, monkeypatch):
    def broken(*_):
        raise ValueError("a mistake")

    monkeypatch.setattr(cuda_baked, "_compiled", broken)
    with pytest.raises(ValueError, match="a mistake"):
        code.tune(["expected"], {}, {}, values_of(1.0))


def test_compared_configurations_count_as_generated(code, seconds, monkeypatch):
    monkeypatch.setattr(cuda_baked, "_started", 0)
    seconds.update(expected=3.0, faster=2.0)
    code.tune(["expected", "faster"], {}, {}, values_of(1.0))
    assert cuda_baked._started == 2


def test_code_is_generated_for_values_that_are_used_again(code):
    values = values_of(7.0)
    assert code.loaded(values, waits=False) is None
    assert code.loaded(values, waits=False) is None
    code.loaded(values, waits=False)
    cuda_baked.finish_compiling()
    assert code.loaded(values, waits=False) == [7.0]


def test_a_forced_algorithm_waits_for_the_compiler(code):
    assert code.loaded(values_of(7.0), waits=True) == [7.0]


def test_the_same_memory_in_another_tensor_is_the_same_kernel(code, compiled):
    for _ in range(5):
        assert code.loaded(values_of(7.0), waits=True) == [7.0]
    assert compiled == [7.0]


def test_other_values_never_meet_old_code(code):
    code.loaded(values_of(7.0), waits=True)
    for number in range(10, 20):
        assert code.loaded(values_of(float(number)), waits=False) is None
    assert code.loaded(values_of(3.0), waits=True) == [3.0]


def test_values_that_take_turns_keep_their_code(code, compiled):
    for _ in range(5):
        for number in (1.0, 2.0, 3.0):
            assert code.loaded(values_of(number), waits=True) == [number]
    assert compiled == [1.0, 2.0, 3.0]


def test_values_that_were_replaced_are_not_compiled(code, compiled):
    blocked = threading.Event()
    for _ in range(4):
        # All threads are busy while other values come and go.
        cuda_baked._kernel_workers.submit(blocked.wait)
    for number in range(20):
        for _ in range(cuda_baked._USES):
            code.loaded(values_of(float(number)), waits=False)
    blocked.set()
    cuda_baked.finish_compiling()
    assert sorted(compiled) == [16.0, 17.0, 18.0, 19.0]


def test_what_does_not_compile_raises_in_the_calls_that_want_it(code):
    for _ in range(2):
        with pytest.raises(ValueError, match="don't compile"):
            code.loaded(values_of(-1.0), waits=True)
    cuda_baked.finish_compiling()


def test_what_does_not_compile_is_not_used_where_nobody_waits(code):
    values = values_of(-1.0)
    for _ in range(cuda_baked._USES):
        assert code.loaded(values, waits=False) is None
    cuda_baked.finish_compiling()
    with pytest.warns(RuntimeWarning, match="must compile.*don't compile"):
        assert code.loaded(values, waits=False) is None
    # Once is enough.
    assert code.loaded(values, waits=False) is None


def test_threads_with_different_values(code):
    def use(number: float, wrong: list) -> None:
        values = values_of(number)
        for _ in range(200):
            if code.loaded(values, waits=True) != [number]:
                wrong.append(number)

    wrong: list[float] = []
    threads = [threading.Thread(target=use, args=(float(n), wrong)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_many_shapes_are_not_compiled_unasked(code):
    code._shapes.update(f"shape {number}" for number in range(cuda_baked._SHAPES))
    values = values_of(7.0)
    for _ in range(5):
        assert code.loaded(values, waits=False) is None
    assert code.loaded(values, waits=True) == [7.0]


def test_many_kernels_are_not_compiled_unasked(code, monkeypatch):
    monkeypatch.setattr(cuda_baked, "_started", cuda_baked._KERNELS)
    values = values_of(7.0)
    for _ in range(5):
        assert code.loaded(values, waits=False) is None
    assert code.loaded(values, waits=True) == [7.0]


def test_a_kernel_that_no_longer_exists_is_not_compiled():
    assert cuda_baked._compile(lambda: None, lambda: None) is None


SHORT_PROGRAM = """
import time
from sparse_conv.background import Workers

workers = Workers(2, "test")
assert workers.submit(lambda: 7).result() == 7
for _ in range(10):
    workers.submit(lambda: time.sleep(60))
"""


def test_the_end_of_a_process_waits_for_no_compiler():
    subprocess.run([sys.executable, "-c", SHORT_PROGRAM], check=True, timeout=50)


@pytest.fixture(scope="module")
def gpu():
    skip_unless_usable("cuda")
    with tf.device("/GPU:0"):
        yield


PROBLEM = make((2, 17, 19, 8), (3, 3, 8, 16))


def exact_data(dtype: str = "float32"):
    return make_data(PROBLEM, dtype, 0.3, whole=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_forced_code_computes_the_convolution(gpu, dtype):
    data = exact_data(dtype)
    kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    y = sparse_conv.conv2d(
        tf.constant(data.x), kernel, 1, "SAME", bias=data.bias, activation="relu",
        algorithm="baked",
    )  # fmt: skip
    exact = conv2d_reference(data.x, data.dense, PROBLEM) + data.bias.astype(float)
    expected = np.maximum(exact, 0).astype(data.x.dtype)
    np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.gpu
def test_first_calls_and_later_ones_agree(gpu):
    data = exact_data()
    kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    x = tf.constant(data.x)
    expected = conv2d_reference(data.x, data.dense, PROBLEM)
    run = tf.function(lambda x: sparse_conv.conv2d(x, kernel, 1, "SAME"))
    for _ in range(5):
        np.testing.assert_array_equal(
            sparse_conv.conv2d(x, kernel, 1, "SAME").numpy(), expected
        )
        np.testing.assert_array_equal(run(x).numpy(), expected)
        cuda_baked.finish_compiling()


@pytest.mark.gpu
def test_gradient_to_the_input(gpu):
    data = exact_data()
    kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    x = tf.constant(data.x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="auto")
    dx = tape.gradient(y, x, output_gradients=tf.constant(data.dy))
    np.testing.assert_array_equal(
        dx.numpy(), dgrad_reference(data.dy, data.dense, PROBLEM)
    )


@pytest.mark.gpu
def test_a_trainable_kernel_is_refused_with_the_reason(gpu):
    data = exact_data()
    kernel = sparse_conv.SparseKernel.from_dense(data.dense, trainable=True)
    with pytest.raises(NotImplementedError, match="values stay the same"):
        sparse_conv.conv2d(tf.constant(data.x), kernel, 1, "SAME", algorithm="baked")


@pytest.mark.gpu
def test_restored_values_get_code_of_their_own(gpu):
    data = exact_data()
    kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    x = tf.constant(data.x)
    before = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="baked")
    kernel.restore_values(2 * kernel.values)
    after = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="baked")
    np.testing.assert_array_equal(after.numpy(), 2 * before.numpy())


@pytest.mark.gpu
def test_prepare_compiles_ahead(gpu):
    data = exact_data()
    kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    explanation = kernel.prepare(
        data.x.shape, 1, "SAME", algorithm="baked", passes=("fprop",)
    )
    assert explanation.passes[0].algorithm == "baked"
    started = cuda_baked._started
    for _ in range(5):
        sparse_conv.conv2d(tf.constant(data.x), kernel, 1, "SAME", algorithm="baked")
    assert cuda_baked._started == started


@pytest.mark.gpu
def test_prepare_may_choose_the_tiles_by_their_times(gpu):
    data = exact_data()
    kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    x = tf.constant(data.x)
    explanation = kernel.prepare(
        data.x.shape, 1, "SAME", algorithm="baked", measure=True,
        passes=("fprop", "dgrad"),
    )  # fmt: skip
    for one in explanation.passes:
        reasons = {a.algorithm: a.reason for a in one.alternatives}
        assert "the fastest of" in reasons["baked"]
    started = cuda_baked._started
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="baked")
    dx = tape.gradient(y, x, output_gradients=tf.constant(data.dy))
    assert cuda_baked._started == started
    exact = conv2d_reference(data.x, data.dense, PROBLEM)
    np.testing.assert_array_equal(y.numpy(), exact)
    exact = dgrad_reference(data.dy, data.dense, PROBLEM)
    np.testing.assert_array_equal(dx.numpy(), exact)


@pytest.mark.gpu
def test_a_kernel_in_host_memory_is_compiled_once(gpu):
    data = exact_data()
    with tf.device("/CPU:0"):
        kernel = sparse_conv.SparseKernel.from_dense(data.dense)
    x = tf.constant(data.x)
    started = cuda_baked._started
    for _ in range(4):
        y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="baked")
    exact = conv2d_reference(data.x, data.dense, PROBLEM)
    np.testing.assert_array_equal(y.numpy(), exact)
    assert cuda_baked._started == started + 1
