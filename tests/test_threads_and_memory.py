"""Many threads, short lives of tensors, full memory, and more than one GPU."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import resource
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf

import sparse_conv
from sparse_conv import bridge
from sparse_conv.bridge import place_of
from tests import ours
from tests.conftest import Backend, skip_unless_usable
from tests.reference import conv2d_reference, dgrad_reference, wgrad_reference
from tests.strategies import Call, make_data

THREADS = 8

CALLS = [
    Call((2, 9, 11, 4), (3, 3, 4, 6), integers=True),
    Call((1, 30, 17, 3), (7, 7, 3, 9), integers=True, strides=2),
    Call((3, 5, 5, 8), (1, 1, 8, 40), integers=True, dtype="float64"),
    Call((2, 6, 12, 13), (3, 3, 6, 4), integers=True, data_format="NCHW"),
    Call((1, 40, 40, 2), (5, 3, 2, 3), integers=True, dilations=[2, 3]),
    Call((2, 8, 8, 4), (3, 3, 4, 4), integers=True, dtype="float16"),
    Call((2, 8, 8, 5), (3, 3, 5, 4), integers=True, dtype="int32"),
    Call((1, 64, 48, 16), (3, 3, 16, 16), integers=True, sparse=False),
]


class Case:
    """A call, its kernel, and what it must give."""

    def __init__(self, call: Call):
        self.call = call
        self.data = data = make_data(call)
        problem = call.problem
        dense = data.kernel.astype(np.float64)
        x, dy = data.x.astype(np.float64), data.dy.astype(np.float64)
        self.kernel = (
            sparse_conv.SparseKernel.from_dense(data.kernel)
            if call.sparse
            else tf.constant(data.kernel)
        )
        dkernel = wgrad_reference(x, dy, problem)
        if call.sparse:
            order = (3, 2, 0, 1)
            dkernel = dkernel.transpose(order)[dense.transpose(order) != 0]
        self.expected = (
            conv2d_reference(x, dense, problem),
            dgrad_reference(dy, dense, problem),
            dkernel,
        )

    def forward(self) -> tf.Tensor:
        x = tf.constant(self.data.x)
        return ours.conv2d(x, self.kernel, **self.call.options)

    def check(self) -> None:
        """Runs the call with its gradients; fails unless all is exact."""
        x, dy = tf.constant(self.data.x), tf.constant(self.data.dy)
        if self.call.dtype == "int32":
            np.testing.assert_array_equal(self.forward().numpy(), self.expected[0])
            return
        weights = self.kernel.values if self.call.sparse else self.kernel
        with tf.GradientTape() as tape:
            tape.watch([x, weights])
            y = ours.conv2d(x, self.kernel, **self.call.options)
        gradients = tape.gradient(y, [x, weights], output_gradients=dy)
        for actual, expected in zip((y, *gradients), self.expected, strict=True):
            np.testing.assert_array_equal(
                actual.numpy(), expected.astype(actual.dtype.as_numpy_dtype)
            )


@pytest.fixture(scope="module")
def cases(backend: Backend) -> list[Case]:
    """Calls of different shapes and dtypes, with what they must give."""
    return [Case(call) for call in CALLS]


def in_threads(work, count: int = THREADS) -> None:
    """Runs `work(number)` in threads at once; raises what any of them raised."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, number) for number in range(count)]:
            future.result()


def test_threads_with_different_shapes(backend, cases):
    def work(number: int) -> None:
        # The device is set for each thread on its own.
        with tf.device(backend.device):
            for i in range(12):
                cases[(number + i) % len(cases)].check()

    in_threads(work)


def test_threads_with_the_same_kernel_for_the_first_time(backend):
    for seed in range(5):
        # Nothing is prepared for this kernel, so all threads try to.
        call = Call((2, 9, 11, 4), (3, 3, 4, 6), integers=True, seed=seed, strides=2)
        case = Case(call)

        def work(_: int, case: Case = case) -> None:
            with tf.device(backend.device):
                case.check()

        in_threads(work)


def test_threads_within_one_graph(backend, cases):
    case = cases[0]
    traced = tf.function(lambda x: ours.conv2d(x, case.kernel, **case.call.options))

    def work(_: int) -> None:
        with tf.device(backend.device):
            for _ in range(10):
                y = traced(tf.constant(case.data.x))
                np.testing.assert_array_equal(y.numpy(), case.expected[0])

    in_threads(work)


def test_many_operators_of_one_graph_run_at_once(backend, cases):
    """TensorFlow runs independent nodes in parallel threads of its own."""
    case = cases[0]

    @tf.function
    def traced(x):
        return [
            ours.conv2d(x * factor, case.kernel, **case.call.options)
            for factor in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
        ]

    for _ in range(5):
        for factor, y in enumerate(traced(tf.constant(case.data.x)), 1):
            np.testing.assert_array_equal(y.numpy(), factor * case.expected[0])


def test_work_of_tensorflow_before_and_after_is_ordered(backend, cases):
    """The input is still being computed at the call; its output is used at once."""
    case = cases[7]
    x = tf.constant(case.data.x)
    for _ in range(20):
        late = x
        for _ in range(20):
            late = -late
        y = ours.conv2d(late, case.kernel, **case.call.options)
        np.testing.assert_array_equal(
            tf.reduce_sum(tf.abs(y - case.expected[0])).numpy(), 0
        )


@pytest.mark.gpu
def test_launches_can_be_waited_for():
    skip_unless_usable("cuda")
    from sparse_conv import streams

    with tf.device("/GPU:0"):
        x = tf.random.normal([8, 512, 512, 16])
        kernel = sparse_conv.SparseKernel.from_dense(np.ones((5, 5, 16, 16), "f"))
        for _ in range(20):
            ours.conv2d(x, kernel, 1, "SAME")
    streams.wait_for_devices()
    assert all(lane.stream.done for lane in streams._lanes.__dict__.values())


def test_inputs_may_die_right_after_the_call(backend, cases):
    for case in cases:
        if case.call.dtype == "int32":
            continue
        results = []
        for _ in range(10):
            x = tf.constant(case.data.x)
            y = ours.conv2d(x, case.kernel, **case.call.options)
            del x
            # Who gets the memory of the input writes NaN into it.
            for _ in range(4):
                tf.fill(case.data.x.shape, tf.constant(np.nan, y.dtype))
            results.append(y)
        gc.collect()
        for y in results:
            np.testing.assert_array_equal(
                y.numpy(), case.expected[0].astype(y.dtype.as_numpy_dtype)
            )


def test_new_tensors_are_not_taken_for_dead_ones(backend):
    """Python gives the identity of a dead tensor to the next one."""
    x = tf.ones((1, 5, 5, 2))
    rng = np.random.default_rng(0)
    for _ in range(100):
        dense = rng.integers(-3, 3, (1, 1, 2, 3)).astype(np.float32)
        y = ours.conv2d(x, tf.constant(dense), 1, "SAME")
        np.testing.assert_array_equal(y.numpy()[0, 2, 2], dense.sum(axis=(0, 1, 2)))


def test_nothing_keeps_tensors_alive(backend):
    x = tf.ones((2, 8, 8, 4))
    kernel = tf.ones((3, 3, 4, 6))
    bias = tf.zeros(6)
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = ours.conv2d(x, kernel, 1, "SAME", bias=bias, activation="relu")
    gradients = tape.gradient(y, [x, kernel])
    references = [weakref.ref(t) for t in (x, kernel, bias, y, *gradients)]
    del x, kernel, bias, y, gradients, tape
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.fixture
def shelf(monkeypatch) -> bridge.Shelf:
    """A shelf of 100 bytes in host memory, whose loans are called loans."""

    class Device:
        mem_info = (0, 6400)
        __enter__ = __exit__ = lambda self, *_: self

    cuda = types.SimpleNamespace(
        Device=lambda _: Device(),
        UnownedMemory=lambda address, size, owner, device: owner,
        MemoryPointer=lambda memory, offset: memory,
    )
    monkeypatch.setattr(bridge, "_cupy", lambda: types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(bridge, "ordinal_of", lambda place: 0)
    monkeypatch.setattr(
        bridge, "memory_of", lambda tensor: bridge.Memory(id(tensor), tensor)
    )
    return bridge.Shelf(bridge.HOST)


def test_a_shelf_gives_memory_of_the_same_size_again(shelf):
    def address(loan) -> int:
        return loan._memory.address

    first, second = shelf.take(40), shelf.take(40)
    used = address(first)
    assert used != address(second)
    del first
    other = shelf.take(50)
    assert address(other) != used
    third = shelf.take(40)
    assert address(third) == used
    # 40 + 40 + 50 bytes are too much for it: the first ones go.
    del second, third
    assert sum(map(len, shelf._idle.values())) == 2
    assert shelf.idle_bytes() == 80
    del other
    assert {size: len(idle) for size, idle in shelf._idle.items()} == {50: 1}
    # What it couldn't hold at all drives nothing out.
    large = shelf.take(101)
    del large
    assert {size: len(idle) for size, idle in shelf._idle.items()} == {50: 1}


def test_a_shelf_gives_way_where_memory_is_short(shelf, monkeypatch):
    held = shelf.take(40)
    del held
    failures = [tf.errors.ResourceExhaustedError(None, None, "full")]
    real = bridge.empty

    def empty(*arguments):
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(bridge, "empty", empty)
    loan = shelf.take(50)
    assert loan is not None
    assert not shelf._idle


def test_large_memory_is_not_asked_for_in_low_bits(shelf, monkeypatch):
    asked = []
    monkeypatch.setattr(bridge, "empty", lambda shape, *_: asked.append(shape))
    shelf.take(2**32 + 17)
    ((rows, row_bytes),) = asked
    assert 0 <= rows * row_bytes - (2**32 + 17) < row_bytes
    with pytest.raises(ValueError, match=r"below 2\^31\. Received: \(2, 2147483648\)"):
        bridge.shape_tensor((2, 2**31))


def test_results_do_not_share_memory():
    x = np.ones((1, 6, 6, 4), np.float32)
    identity = np.eye(4, dtype=np.float32).reshape(1, 1, 4, 4)
    with tf.device("/CPU:0"):
        tensor = tf.constant(x)
        first = ours.conv2d(tensor, identity, 1, "SAME")
        second = ours.conv2d(tensor, identity, 1, "SAME")
        views = [np.asarray(memoryview(t)) for t in (tensor, first, second)]
    for i, a in enumerate(views):
        assert not any(np.shares_memory(a, b) for b in views[i + 1 :])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_results_are_aligned_as_tensorflow_needs(dtype):
    with tf.device("/CPU:0"):
        for size in range(1, 12):
            call = Call((1, size, size + 1, 1), (3, 3, 1, 3), dtype=dtype, bias=True)
            data = make_data(call)
            x = tf.constant(data.x)
            kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
            results = []
            if dtype == "int32":
                results.append(ours.conv2d(x, kernel, **call.options))
            else:
                with tf.GradientTape() as tape:
                    tape.watch([x, kernel.values])
                    y = ours.conv2d(x, kernel, **call.options)
                results += [y, *tape.gradient(y, [x, kernel.values])]
            for result in results:
                assert np.asarray(memoryview(result)).ctypes.data % 64 == 0


def test_results_serve_all_kinds_of_operations(backend):
    """TensorFlow's own kernels abort the process on memory that is not aligned."""
    for size in range(1, 20):
        x = tf.ones((1, size, 3, 2))
        y = ours.conv2d(x, tf.ones((1, 1, 2, 5)), 1, "SAME")
        flat = tf.reshape(y, (size, 15))
        for result in (
            flat + flat,
            tf.matmul(flat, flat, transpose_b=True),
            tf.nn.softmax(flat),
            tf.reduce_sum(flat, 0),
            tf.nn.relu(y),
            tf.nn.max_pool2d(y, 1, 1, "VALID"),
            tf.nn.conv2d(y, tf.ones((1, 1, 5, 5)), 1, "SAME"),
            tf.transpose(y, (0, 3, 1, 2)),
            ours.conv2d(y, tf.ones((3, 3, 5, 5)), 1, "SAME"),
        ):
            assert np.isfinite(result.numpy()).all()


def test_memory_does_not_grow():
    x = tf.ones((4, 128, 128, 8))
    kernel = tf.ones((3, 3, 8, 8))
    sparse = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 8, 8), np.float32))

    def run(times: int) -> int:
        with tf.device("/CPU:0"):
            for i in range(times):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = ours.conv2d(x, sparse if i % 2 else kernel, 1, "SAME")
                tape.gradient(y, x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(6)
    # Two results of 2 MiB a call: 160 MiB if they were kept.
    grown_kib = run(40) - before
    assert grown_kib < 60 * 1024


def test_sizes_do_not_pile_up():
    """What is prepared for one size is not kept for all the sizes of a long run."""
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 1, 1), np.float32))
    with tf.device("/CPU:0"):
        for size in range(1, 400):
            y = ours.conv2d(tf.ones((1, 3, size, 1)), kernel, 1, "SAME")
            assert y.shape == (1, 3, size, 1)


FORK = """
import os, sys
import numpy as np
import tensorflow as tf
import sparse_conv
x, kernel = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 4, 6), np.float32)
# Both processes import; only the child computes, as with a pool of workers.
pid = os.fork()
if pid == 0:
    y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="generic")
    os._exit(0 if y.numpy().max() == 36 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_child_computes():
    run_python(FORK)


IMPORT = """
import sys
import sparse_conv
for name in ("cupy", "numba"):
    assert name not in sys.modules, name
import tensorflow as tf
for gpu in tf.config.list_physical_devices("GPU"):
    # Importing changes nothing of TensorFlow's settings, and starts no GPU.
    assert not tf.config.experimental.get_memory_growth(gpu)
    tf.config.experimental.set_memory_growth(gpu, False)
"""


def test_import_is_light_and_leaves_settings_alone():
    run_python(IMPORT)


def run_python(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def gpu() -> Iterator[str]:
    """The first GPU."""
    skip_unless_usable("cuda")
    with tf.device("/GPU:0"):
        yield "/GPU:0"


@pytest.mark.gpu
def test_gpu_results_stay_on_the_gpu(gpu):
    x, kernel = tf.ones((2, 8, 8, 4)), tf.ones((3, 3, 4, 6))
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = ours.conv2d(x, kernel, 1, "SAME")
    for tensor in (y, *tape.gradient(y, [x, kernel])):
        assert "GPU:0" in tensor.backing_device


@pytest.mark.gpu
def test_gpu_memory_under_tensorflows_own_settings(gpu):
    """TensorFlow holds nearly all of the memory, and yet a large call fits."""
    x = tf.ones((8, 1024, 1024, 16))
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 16, 32), np.float32))
    with tf.GradientTape() as tape:
        tape.watch([x, kernel.values])
        y = ours.conv2d(x, kernel, 1, "VALID")
    gradients = tape.gradient(y, [x, kernel.values])
    assert tf.reduce_min(y).numpy() == tf.reduce_max(y).numpy() == 144
    assert tf.reduce_max(gradients[0]).numpy() == 9 * 32
    assert tf.reduce_min(gradients[1]).numpy() == 8 * 1022 * 1022


@pytest.mark.gpu
def test_gpu_memory_pressure(gpu):
    """Memory goes from hand to hand while launches that use it are still under way."""
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 32, 32), np.float32))
    shelf = bridge.shelf(bridge.gpu_place(0))

    def in_use() -> int:
        """Bytes of TensorFlow's memory, without what lies idle on the shelf."""
        info = tf.config.experimental.get_memory_info("GPU:0")
        return info["current"] - shelf.idle_bytes()

    before = in_use()
    for i in range(200):
        x = tf.fill((4, 512, 512, 32), float(i % 7))
        y = ours.conv2d(x, kernel, 1, "VALID")
        del x
        # These take over what the input left.
        noise = [tf.fill((4, 512, 512, 32), np.float32(np.nan)) for _ in range(2)]
        low, high = tf.reduce_min(y), tf.reduce_max(y)
        del noise, y
        assert low.numpy() == high.numpy() == 9 * 32 * float(i % 7)
    gc.collect()
    assert in_use() - before < 2**26
    assert shelf.idle_bytes() <= shelf.most_bytes


@pytest.mark.gpu
def test_gpu_memory_of_large_results_is_used_again(gpu, monkeypatch):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((1, 1, 4, 8), np.float32))
    x = tf.ones((1, 256, 256, 4))

    def address(y: tf.Tensor) -> int:
        return bridge.memory_of(y).address

    first = ours.conv2d(x, kernel, 1, "SAME")
    second = ours.conv2d(2 * x, kernel, 1, "SAME")
    used = address(first)
    assert address(second) != used
    del first
    third = ours.conv2d(3 * x, kernel, 1, "SAME")
    assert address(third) == used
    assert tf.reduce_min(second).numpy() == tf.reduce_max(second).numpy() == 8
    assert tf.reduce_min(third).numpy() == tf.reduce_max(third).numpy() == 12
    # What would be too much isn't kept.
    monkeypatch.setattr(bridge.shelf(place_of(x)), "most_bytes", 2**20)
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    del second, third
    assert tf.config.experimental.get_memory_info("GPU:0")["current"] < before


@pytest.mark.gpu
def test_gpu_and_host_results_agree(gpu):
    for call in CALLS:
        data = make_data(call)
        results = []
        for device in ("/GPU:0", "/CPU:0"):
            with tf.device(device):
                kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
                y = ours.conv2d(tf.constant(data.x), kernel, **call.options)
                results.append(y.numpy())
        np.testing.assert_array_equal(*results)


@pytest.mark.gpu
def test_gpu_input_with_operands_in_host_memory(gpu):
    x = tf.ones((2, 8, 8, 4))
    with tf.device("/CPU:0"):
        kernel, bias = tf.ones((3, 3, 4, 6)), tf.ones(6)
    y = ours.conv2d(x, kernel, 1, "VALID", bias=bias)
    assert "GPU:0" in y.backing_device
    assert tf.reduce_max(y).numpy() == tf.reduce_min(y).numpy() == 37


@pytest.mark.gpu
def test_gpu_threads_each_with_its_own_work(gpu):
    """Kernels long enough that the threads' launches overlap."""
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 16, 16), np.float32))

    def work(number: int) -> None:
        with tf.device(gpu):
            for i in range(20):
                value = float(number * 20 + i)
                x = tf.fill((2, 256, 256, 16), value)
                y = ours.conv2d(x, kernel, 1, "VALID")
                assert tf.reduce_max(y).numpy() == value * 144
                assert tf.reduce_min(y).numpy() == value * 144

    in_threads(work)


@pytest.fixture
def second_gpu() -> str:
    """The second GPU; skips where there is none."""
    skip_unless_usable("cuda")
    if len(tf.config.list_logical_devices("GPU")) < 2:
        pytest.skip("needs two GPUs")
    return "/GPU:1"


@pytest.mark.gpu
def test_second_gpu_computes_what_it_holds(second_gpu):
    for call in CALLS[:6]:
        with tf.device(second_gpu):
            case = Case(call)
            case.check()
            assert "GPU:1" in case.forward().backing_device


@pytest.mark.gpu
def test_two_gpus_at_once(second_gpu):
    cases = {}
    for device in ("/GPU:0", second_gpu):
        with tf.device(device):
            cases[device] = [Case(call) for call in CALLS[:6]]

    def work(number: int) -> None:
        device = ("/GPU:0", second_gpu)[number % 2]
        with tf.device(device):
            for _ in range(5):
                for case in cases[device]:
                    case.check()

    in_threads(work)


@pytest.mark.gpu
def test_one_call_on_two_gpus_is_refused(second_gpu):
    with tf.device("/GPU:0"):
        x = tf.ones((2, 8, 8, 4))
    with tf.device(second_gpu):
        kernel = tf.ones((3, 3, 4, 6))
    with pytest.raises(ValueError, match=r"same GPU.*Received: "):
        ours.conv2d(x, kernel, 1, "SAME")
