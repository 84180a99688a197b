"""The choice of an algorithm, the dense one, `explain` and `prepare`."""

from __future__ import annotations

import functools
import gc
import json
import types
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings

import sparse_conv
from sparse_conv import backends, costs, dense, explanation
from sparse_conv.backends import cpu_assembly, cpu_tiles
from sparse_conv.bridge import HOST, gpu_place, place_of
from sparse_conv.choice import MARGINS, PASSES, Question, choose, favoured
from sparse_conv.convolution import Convolution
from sparse_conv.costs import Estimate, Machine
from sparse_conv.costs.terms import sparse_terms
from sparse_conv.problem import make_problem, normalize_geometry
from sparse_conv.tf_internals import operation
from tests import ours
from tests.conftest import skip_unless_usable
from tests.strategies import Call, calls, make_data
from tests.test_conv2d import check, compute
from tests.test_gradients import assert_close, derivatives

conv2d_dense = functools.partial(sparse_conv.conv2d, algorithm="dense")


@pytest.fixture(scope="module")
def full_float32(backend):
    """TensorFlow without TF32, so that its float32 is as exact as ours."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield backend
    tf.config.experimental.enable_tensor_float_32_execution(before)


@pytest.fixture
def small(backend):
    """A small input, a dense kernel with zeros, and the SparseKernel of it."""
    data = make_data(Call((2, 6, 5, 4), (3, 3, 4, 6), density=0.4, integers=True))
    kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
    return tf.constant(data.x), tf.constant(data.kernel), kernel


def reasons_against_dense(call: Call, device: str) -> set[str]:
    """Why TensorFlow can't compute some pass of a call, without what has no extent."""
    problem, dtype = call.problem, tf.as_dtype(call.dtype)
    if 0 in (*problem.input_shape, *problem.output_shape, *problem.kernel_shape):
        return set()
    place = HOST if device == "/CPU:0" or call.dtype == "int32" else gpu_place(0)
    passes = PASSES if dtype.is_floating else ("fprop",)
    found = {dense.reason_against(name, problem, dtype, place) for name in passes}
    return found - {None}


# The dense algorithm


@given(call=calls(dtypes=("float32", "float64", "int32")))
def test_dense_agrees_with_the_reference_or_says_why_not(full_float32, call):
    data = make_data(call)
    reasons = reasons_against_dense(call, full_float32.device)
    if not reasons:
        check(call, data, compute(call, data, conv2d_dense))
        return
    with pytest.raises(NotImplementedError, match=r"Received: algorithm='dense'") as it:
        compute(call, data, conv2d_dense)
    assert any(reason in str(it.value) for reason in reasons)


@settings(max_examples=max(20, settings.default.max_examples // 3))
@given(call=calls(dtypes=("float32", "float64", "int32")))
def test_auto_agrees_with_the_reference(full_float32, call):
    data = make_data(call)
    check(call, data, compute(call, data, sparse_conv.conv2d))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_dense_is_what_tensorflow_computes(backend, dtype, activation):
    call = Call((2, 9, 8, 4), (3, 3, 4, 6), strides=2, dtype=dtype, bias=True)
    data = make_data(call)
    x, bias = tf.constant(data.x), tf.constant(data.bias)
    kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
    y = conv2d_dense(x, kernel, 2, "SAME", bias=bias, activation=activation)
    expected = tf.nn.bias_add(tf.nn.conv2d(x, data.kernel, 2, "SAME"), bias)
    if activation is not None:
        expected = getattr(tf.nn, activation)(expected)
    difference = np.abs(y.numpy().astype("f4") - expected.numpy().astype("f4"))
    assert difference.max() <= 0.05


def test_dense_multiplies_zeros_as_tensorflow_does(small):
    x, dense_kernel, kernel = small
    x = tf.where(tf.range(4) == 1, np.float32(np.inf), x)
    y = conv2d_dense(x, kernel, 1, "SAME")
    expected = tf.nn.conv2d(x, dense_kernel, 1, "SAME")
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_kernel_without_nonzeros(backend, traced):
    kernel = sparse_conv.SparseKernel.from_dense(np.zeros((3, 3, 4, 6), np.float32))
    x = tf.fill((1, 5, 5, 4), np.float32(np.inf))

    def step(x, algorithm):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel.values])
            y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm=algorithm)
        return [y, *tape.gradient(y, [x, kernel.values])]

    for algorithm, value in (("auto", 0), ("generic", 0), ("dense", np.nan)):
        function = functools.partial(step, algorithm=algorithm)
        y, dx, dw = (tf.function(function) if traced else function)(x)
        np.testing.assert_array_equal(y.numpy(), np.full((1, 5, 5, 6), value))
        np.testing.assert_array_equal(dx.numpy(), np.zeros((1, 5, 5, 4)))
        assert dw.shape == (0,)


def test_results_live_where_the_operands_live(small):
    x, dense_kernel, kernel = small
    for filters in (dense_kernel, kernel):
        assert place_of(conv2d_dense(x, filters, 1, "SAME")) == place_of(x)


def test_what_the_runtime_refuses_raises_the_public_error():
    attributes = {"strides": [1] * 4, "padding": "SAME"}
    conv2d = operation("Conv2D", attributes)
    x, kernel = tf.ones((1, 4, 4, 3)), tf.ones((1, 1, 5, 2))
    for call in (conv2d, functools.partial(tf.raw_ops.Conv2D, **attributes)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Conv2D"):
            call(input=x, filter=kernel)


def test_dense_kernel_is_made_once_for_each_tensor(small, monkeypatch):
    x, _, kernel = small
    counts = Counter()
    scatter = dense._scatter

    def counted(*arguments):
        counts["made"] += 1
        return scatter(*arguments)

    monkeypatch.setattr(dense, "_scatter", counted)
    for size in (1, 2):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = conv2d_dense(x, kernel, size, "SAME")
        tape.gradient(y, x)
    assert counts["made"] == 1


def test_dense_kernel_dies_with_the_values(backend):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 4, 6), np.float32))
    x = tf.ones((1, 5, 5, 4))
    conv2d_dense(x, kernel, 1, "SAME")
    kept = weakref.ref(dense.kernel_of(kernel.values, kernel.pattern, place_of(x)))
    assert kept() is not None
    del kernel
    gc.collect()
    assert kept() is None


def test_new_values_make_a_new_dense_kernel(small):
    x, _, kernel = small
    trained = sparse_conv.SparseKernel(tf.Variable(kernel.values), kernel.pattern)
    before = conv2d_dense(x, trained, 1, "SAME")
    trained.values.assign(3 * trained.values)
    after = conv2d_dense(x, trained, 1, "SAME")
    np.testing.assert_array_equal(after.numpy(), 3 * before.numpy())


# Gradients of every order, eagerly and in graphs


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("traced", ["eager", "static", "unknown"])
@pytest.mark.parametrize("padding", ["SAME", [[0, 0], [1, 2], [3, 0], [0, 0]]])
def test_derivatives_of_order_three(backend, sparse, traced, padding):
    call = Call((2, 6, 5, 4), (3, 2, 4, 6), strides=[2, 1], dtype="float64")
    data = make_data(call)
    kernel = sparse_conv.SparseKernel.from_dense(data.kernel)
    x, w = tf.constant(data.x), kernel.values if sparse else tf.constant(data.kernel)

    def function(conv2d, x, w):
        filters = sparse_conv.SparseKernel(w, kernel.pattern) if sparse else w
        return conv2d(x, filters, [2, 1], padding)

    expected = derivatives(functools.partial(function, ours.conv2d), x, w)
    subject = functools.partial(function, conv2d_dense)
    if traced == "eager":
        assert_close(derivatives(subject, x, w), expected)
        return
    signature = None
    if traced == "unknown":
        signature = [tf.TensorSpec([None] * 4, x.dtype), tf.TensorSpec(None, w.dtype)]
        signature[1] = tf.TensorSpec(w.shape, w.dtype)
    inside = tf.function(
        lambda x, w: derivatives(subject, x, w), input_signature=signature
    )
    assert_close(inside(x, w), expected)
    graph = tf.function(subject, input_signature=signature)
    assert_close(derivatives(graph, x, w), expected)


# Graphs


def operations(function, *arguments) -> set[str]:
    graph = function.get_concrete_function(*arguments).graph
    return {operation.type for operation in graph.get_operations()}


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
def test_static_graphs_hold_tensorflows_own_operation(small, trainable):
    x, dense_kernel, kernel = small
    if trainable:
        kernel = kernel.with_values(tf.Variable(kernel.values))
    weights = kernel.values

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch([x, weights])
            y = conv2d_dense(x, kernel, 1, "SAME", activation="relu")
        return [y, *tape.gradient(y, [x, weights])]

    found = operations(step, x)
    assert {"Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"} <= found
    assert not any("PyFunc" in name for name in found)
    # A kernel that never changes is made dense once, not whenever the graph runs.
    assert ("ScatterNd" in found) == trainable
    np.testing.assert_array_equal(
        step(x)[0].numpy(), tf.nn.relu(tf.nn.conv2d(x, dense_kernel, 1, "SAME")).numpy()
    )


def test_graphs_of_unknown_shapes_decide_when_they_run(small):
    x, dense_kernel, kernel = small
    spec = [tf.TensorSpec([None, None, None, 4])]
    function = tf.function(
        lambda x: conv2d_dense(x, kernel, 1, "SAME"), input_signature=spec
    )
    assert any("PyFunc" in name for name in operations(function))
    for batch in (x, x[:0]):
        y = function(batch)
        assert y.shape == (*batch.shape[:3], 6)
        expected = tf.nn.conv2d(x, dense_kernel, 1, "SAME")[: len(batch)]
        np.testing.assert_array_equal(y.numpy(), expected.numpy())


def test_constant_dense_filters_are_counted_while_tracing(small, monkeypatch):
    x, dense_kernel, _ = small
    if place_of(x).kind == "GPU":
        pytest.skip("the zeros of a dense kernel on a GPU are not counted")
    prefer(monkeypatch, "dense")
    x = tf.concat([x] * 3, axis=1)
    function = tf.function(lambda x: sparse_conv.conv2d(x, dense_kernel, 1, "SAME"))
    assert "Conv2D" in operations(function, x)


def test_xla_compiles_the_dense_algorithm(small):
    x, dense_kernel, kernel = small

    @tf.function(jit_compile=True)
    def compiled(x):
        return conv2d_dense(x, kernel, 1, "SAME")

    expected = tf.nn.conv2d(x, dense_kernel, 1, "SAME")
    np.testing.assert_array_equal(compiled(x).numpy(), expected.numpy())


@pytest.mark.parametrize("algorithm", ["auto", "dense", "generic"])
@pytest.mark.parametrize("size", [None, 2], ids=["any batch", "batch of 2"])
@pytest.mark.parametrize("called", [False, True], ids=["untraced", "called before"])
def test_saved_model_of_every_algorithm(tmp_path, small, algorithm, size, called):
    x, dense_kernel, kernel = small
    module = tf.Module()
    module.kernel = kernel
    module.call = tf.function(
        lambda x: sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm=algorithm),
        input_signature=[tf.TensorSpec([size, *x.shape[1:]])],
    )
    if called:
        module.call(x)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    expected = tf.nn.conv2d(x, dense_kernel, 1, "SAME")
    np.testing.assert_array_equal(loaded.call(x).numpy(), expected.numpy())


# The choice


class FakeBackend(types.SimpleNamespace):
    """A back end that has only estimates."""

    __hash__ = object.__hash__

    def __init__(self, generic: float, baked: float | None = None):
        super().__init__()
        self.times = (generic, baked)

    def machine(self, place):
        return Machine("cpu-avx2", 2, 8)

    def estimates(self, *_):
        return tuple(
            Estimate(name, time, "no reason")
            for name, time in zip(("generic", "baked"), self.times, strict=True)
        )


def question(**changes) -> Question:
    geometry = normalize_geometry(1, "SAME")
    problem = make_problem((1, 64, 64, 16), (3, 3, 16, 32), geometry)
    plain = Question("fprop", problem, tf.float32, HOST, 500, True, True, True)
    return plain._replace(**changes)


def prefer(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """Makes an algorithm the cheapest; shapes must be the test's own, as it is kept."""
    fast = 0.0 if algorithm == "dense" else 1e12
    real = dense.estimate

    def fake(*arguments, **options):
        one = real(*arguments, **options)
        return one if one.microseconds is None else replace(one, microseconds=fast)

    monkeypatch.setattr(dense, "estimate", fake)
    choose.cache_clear()


@pytest.fixture(autouse=True)
def forget_choices():
    """No choice of a test with false estimates is kept for others."""
    yield
    choose.cache_clear()


@pytest.mark.parametrize(
    ("generic", "baked", "expected"),
    [
        (1.0, None, "generic"),
        (1e9, None, "dense"),
        (1.0, 0.5, "baked"),
        (0.5, 0.5, "generic"),
        (1e9, 1e9, "dense"),
    ],
)
def test_the_cheapest_is_chosen(generic, baked, expected):
    assert choose(question(), FakeBackend(generic, baked)).algorithm == expected


def test_what_can_not_compute_is_not_chosen():
    nchw = replace(question().problem, data_format="NCHW")
    chosen = choose(question(problem=nchw), FakeBackend(1e9))
    assert chosen.algorithm == "generic"
    assert chosen.estimates[-1].microseconds is None
    assert "NHWC" in chosen.estimates[-1].reason


def test_where_nobody_counted_the_zeros_the_kernel_counts_as_sparse():
    chosen = choose(question(nnz=None, constant=False), FakeBackend(1e9))
    assert chosen.algorithm == "generic"
    assert "counted" in chosen.reason


def test_measured_times_replace_the_models():
    measured = (Estimate("generic", 5.0, ""), Estimate("dense", 4.0, ""))
    chosen = choose(question(), FakeBackend(1.0), "auto", measured)
    assert chosen.algorithm == "dense"
    assert "measured" in chosen.reason


def test_a_python_function_in_a_graph_costs():
    expected = choose(question(), FakeBackend(1.0)).estimates[-1].microseconds
    backend = FakeBackend(expected / MARGINS[HOST.kind] - 1)
    assert choose(question(), backend).algorithm == "generic"
    assert choose(question(traced=True), backend).algorithm == "dense"


def test_ours_must_be_faster_by_more_than_the_models_are_wrong():
    expected = choose(question(), FakeBackend(1.0)).estimates[-1].microseconds
    nearly = FakeBackend(expected / MARGINS[HOST.kind] + 1)
    assert choose(question(), nearly).algorithm == "dense"
    # What was measured needs no margin.
    measured = (Estimate("generic", 3.9, ""), Estimate("dense", 4.0, ""))
    assert choose(question(), nearly, "auto", measured).algorithm == "generic"


@pytest.mark.parametrize("kind", ["CPU", "GPU"])
def test_dense_is_favoured_by_a_margin(kind):
    assert favoured(50.0, kind) == 50.0 / MARGINS[kind] < 50.0


@pytest.mark.parametrize("algorithm", ["generic", "baked", "dense"])
def test_a_force_is_obeyed_whatever_it_costs(algorithm):
    backend = FakeBackend(1e9, 1e9)
    assert choose(question(), backend, algorithm).algorithm == algorithm


def test_forcing_what_can_not_compute_raises():
    with pytest.raises(NotImplementedError, match=r"no reason.*Received: .*'baked'"):
        choose(question(), FakeBackend(1.0), "baked")


def test_choices_follow_from_the_question_alone():
    questions = [
        question(nnz=nnz, pass_name=name, tf32=tf32)
        for nnz in (1, 100, 4608)
        for name in PASSES
        for tf32 in (False, True)
    ]
    backend = backends.select(HOST, tf.float32, None)
    first = [choose(one, backend) for one in questions]
    choose.cache_clear()
    again = [choose(one, backend) for one in reversed(questions)]
    assert first == again[::-1]


def test_tf32_is_part_of_what_a_call_remembers(monkeypatch):
    """The choice may change with TensorFlow's setting, between two equal calls."""
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 2, 2), np.float32))
    seen = []
    real = Convolution.choose

    def recorded(self, *arguments, **options):
        chosen = real(self, *arguments, **options)
        seen.append(tf.config.experimental.tensor_float_32_execution_enabled())
        return chosen

    monkeypatch.setattr(Convolution, "choose", recorded)
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    with tf.device("/CPU:0"):
        x = tf.ones((1, 7, 13, 2))
    try:
        for enabled in (True, False, True, False):
            tf.config.experimental.enable_tensor_float_32_execution(enabled)
            sparse_conv.conv2d(x, kernel, 1, "SAME")
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
    assert seen == [True, False]


def test_dense_tensors_of_one_shape_are_chosen_for_by_their_zeros(monkeypatch):
    counts = Counter()
    for module, name in ((dense, "dense"), (backends._backend("cpu"), "generic")):
        prepare = module.fprop

        def counted(*arguments, prepare=prepare, name=name, **options):
            run = prepare(*arguments, **options)

            def counting(*operands):
                counts[name] += 1
                return run(*operands)

            return counting

        monkeypatch.setattr(module, "fprop", counted)
    with tf.device("/CPU:0"):
        x = tf.random.normal((1, 56, 57, 128))
        full = tf.random.normal((3, 3, 128, 128))
        few = tf.where(tf.random.uniform(full.shape) < 0.01, full, 0.0)
    for filters, name in ((full, "dense"), (few, "generic"), (full, "dense")):
        counts.clear()
        y = sparse_conv.conv2d(x, filters, 1, "SAME")
        assert counts == {name: 1}
        exact = tf.nn.conv2d(x, filters, 1, "SAME")
        np.testing.assert_allclose(y.numpy(), exact.numpy(), atol=1e-3)


# Costs

FILES = sorted(costs.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_numbers_serves_every_question(path):
    place = HOST if path.stem.startswith("cpu") else gpu_place(0)
    machine = Machine(path.stem, 4, 16)
    numbers = json.loads(path.read_text(encoding="utf-8"))
    assert numbers["python_function"] >= 0
    for weights in numbers["models"].values():
        assert all(weight >= 0 for weight in weights.values())
    for name in PASSES:
        for dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64):
            for tf32 in (False, True):
                one = dense.estimate(
                    name, question().problem, dtype, place, machine, tf32=tf32
                )
                assert 0 < one.microseconds < 1e6


@pytest.mark.parametrize("sparse", [False, True])
def test_gpu_models_need_no_gpu(sparse):
    from sparse_conv.backends import cuda_costs
    from sparse_conv.tiling import DeviceLimits

    machine, limits = Machine("cuda-sm90", 132, 32), DeviceLimits(132, 227 * 1024)
    for name in PASSES:
        times = [
            cuda_costs.generic_cost(
                name, question().problem, "float32", nnz, limits, machine, sparse
            ).microseconds
            for nnz in (0, 100, 4608)
        ]
        assert 0 < times[0] <= times[1] <= times[2]


@pytest.mark.parametrize("name", PASSES)
def test_more_nonzeros_never_cost_less(name):
    backend = backends.select(HOST, tf.float32, None)
    times = [
        backend.estimates(name, question().problem, tf.float32, HOST, nnz, True, True)[
            0
        ].microseconds
        for nnz in (0, 1, 10, 1000, 4608)
    ]
    assert times == sorted(times)


def test_machines_that_nobody_measured_have_costs():
    assert costs.numbers("cpu-other") == costs.numbers("cpu-avx2")
    assert costs.numbers("cuda-sm999") == costs.numbers("cuda-sm90")


@pytest.mark.parametrize("core", cpu_tiles.CORES)
def test_every_kind_of_core_was_measured(core):
    machine = Machine(f"cpu-{core}", 2, 8)
    assert costs.is_measured(machine.kind)
    terms = sparse_terms("fprop", question().problem, 10, 4, machine)
    assert costs.microseconds(machine, "generic fprop", terms) > 0


def test_only_large_sums_are_deep():
    machine = Machine("cpu-avx2", 2, 8)
    geometry = normalize_geometry(1, "SAME")
    for channels in (64, 512):
        problem = make_problem((1, 9, 9, channels), (3, 3, channels, 8), geometry)
        terms = sparse_terms("fprop", problem, 100, 4, machine)
        assert terms["deep"] == (terms["products"] if channels == 512 else 0)


# explain and prepare


def test_explain_says_what_a_call_takes(small):
    x, dense_kernel, kernel = small
    by_tensor = sparse_conv.explain(x, kernel, 1, "SAME")
    by_shape = sparse_conv.explain(x.shape, kernel, 1, "SAME", device=x.device)
    assert by_tensor == by_shape
    assert [one.name for one in by_tensor.passes] == list(PASSES)
    assert by_tensor.nnz == kernel.nnz
    for one in by_tensor.passes:
        names = [alternative.algorithm for alternative in one.alternatives]
        assert names == ["generic", "baked", "dense"]
        assert one.algorithm in names
        assert all(a.measured_us is None for a in one.alternatives)
        assert all((a.predicted_us is None) <= bool(a.reason) for a in one.alternatives)
    text = str(by_tensor)
    for word in ("2x6x5x4", "3x3x4x6", f"{kernel.nnz} nonzeros", *PASSES, "dense"):
        assert word in text
    counted = sparse_conv.explain(x, dense_kernel, 1, "SAME").nnz
    assert counted == (kernel.nnz if place_of(x) == HOST else None)


def test_explain_measures_on_request_and_changes_nothing(small):
    x, _, kernel = small
    before = sparse_conv.explain(x, kernel, 1, "SAME")
    measured = sparse_conv.explain(x, kernel, 1, "SAME", measure=True)
    for one in measured.passes:
        for alternative in one.alternatives:
            possible = alternative.predicted_us is not None
            assert (alternative.measured_us is not None) == possible
    assert sparse_conv.explain(x, kernel, 1, "SAME") == before


def test_explain_of_a_forced_algorithm():
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 4, 6), np.float32))
    options = {"device": "/CPU:0"}
    for algorithm in ("generic", "dense"):
        said = sparse_conv.explain(
            (1, 8, 8, 4), kernel, 1, "SAME", algorithm=algorithm, **options
        )
        assert {one.algorithm for one in said.passes} == {algorithm}
    said = sparse_conv.explain(
        (1, 4, 8, 8), kernel, 1, "SAME", "NCHW", algorithm="dense", **options
    )
    assert said["fprop"].algorithm is None
    assert "NHWC" in said["fprop"].reason
    with pytest.raises(KeyError):
        said["fpro"]


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "`algorithm`", {"algorithm": "fastest"}),
        (ValueError, "`backend`", {"backend": "tpu"}),
        (ValueError, "`device`", {"device": "here"}),
        (ValueError, "something is computed", {"input_or_shape": (0, 8, 8, 4)}),
        (ValueError, "channels", {"input_or_shape": (1, 8, 8, 3)}),
        (ValueError, "4 dimensions", {"input_or_shape": (8, 8, 4)}),
        (TypeError, "dtypes", {"dtype": "int8"}),
    ],
)
def test_explain_refuses(error, message, changes):
    kernel = sparse_conv.SparseKernel.from_dense(np.ones((3, 3, 4, 6), np.float32))
    arguments = {
        "input_or_shape": (1, 8, 8, 4), "filters": kernel, "strides": 1,
        "padding": "SAME",
    }  # fmt: skip
    with pytest.raises(error, match=rf"(?s){message}.*Received: "):
        sparse_conv.explain(**{**arguments, **changes})


def pretend(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> None:
    """Lets measurements come out as given."""

    def fake(calls, ready):
        for call in calls.values():
            call()
        ready()
        return {name: times[name] for name in calls}

    monkeypatch.setattr(explanation, "median_microseconds", fake)


def decided(explanation: sparse_conv.Explanation) -> list[tuple[object, ...]]:
    """What is chosen and why, without the tiles, which kernels of a pattern share."""
    return [
        (
            one.name, one.algorithm, one.reason,
            *((a.algorithm, a.predicted_us, a.measured_us) for a in one.alternatives),
        )
        for one in explanation.passes
    ]  # fmt: skip


@pytest.mark.parametrize("fastest", ["generic", "dense"])
def test_what_prepare_measures_decides_calls_of_that_shape(small, monkeypatch, fastest):
    x, _, kernel = small
    pretend(monkeypatch, {"generic": 10.0, "baked": 10.0, "dense": 10.0, fastest: 1.0})
    other = kernel.with_values(kernel.values)
    before = sparse_conv.explain(x, other, 1, "SAME")
    y = sparse_conv.conv2d(x, kernel, 1, "SAME")
    prepared = kernel.prepare(x.shape, 1, "SAME", measure=True, passes=["fprop"])
    assert [one.name for one in prepared.passes] == ["fprop"]
    said = sparse_conv.explain(x, kernel, 1, "SAME")
    assert said["fprop"] == prepared["fprop"]
    assert said["fprop"].algorithm == fastest
    assert {a.algorithm: a.measured_us for a in said["fprop"].alternatives}[
        fastest
    ] == 1.0
    built = Counter()
    for module in (dense, backends.select(place_of(x), x.dtype, None)):
        prepare = module.fprop

        def counted(*arguments, prepare=prepare, name=module.__name__, **options):
            built[name.rpartition(".")[2]] += 1
            return prepare(*arguments, **options)

        monkeypatch.setattr(module, "fprop", counted)
    again = sparse_conv.conv2d(x, kernel, 1, "SAME")
    np.testing.assert_array_equal(again.numpy(), y.numpy())
    assert bool(built["dense"]) == (fastest == "dense")
    # Other kernels and other passes are not concerned.
    assert decided(sparse_conv.explain(x, other, 1, "SAME")) == decided(before)
    assert said["dgrad"] == before["dgrad"]


def test_prepare_compares_the_tiles_of_generated_code(small, monkeypatch):
    x, _, kernel = small
    backend = backends.select(place_of(x), x.dtype, None)
    compared: list[str] = []

    def estimates(*_):
        return Estimate("generic", 9.0, "loops"), Estimate("baked", 5.0, "the model's")

    def tune(name, problem, dtype, place, pattern, read, w):
        assert pattern is kernel.pattern
        assert w.shape == kernel.values.shape
        compared.append(name)

    monkeypatch.setattr(backend, "estimates", estimates)
    monkeypatch.setattr(backend, "tune", tune, raising=False)
    monkeypatch.setattr(
        backend, "tuned", lambda name, *_: "tuned" if name in compared else None,
        raising=False,
    )  # fmt: skip
    pretend(monkeypatch, {"generic": 3.0, "baked": 2.0, "dense": 1.0})
    kernel.prepare(
        x.shape, 1, "SAME", algorithm="generic", measure=True, passes=["fprop"]
    )
    assert not compared
    kernel.prepare(x.shape, 1, "SAME", measure=True, passes=["fprop"])
    assert compared == ["fprop"]
    said = sparse_conv.explain(x, kernel, 1, "SAME")
    for name, reason in (("fprop", "tuned"), ("dgrad", "the model's")):
        reasons = {a.algorithm: a.reason for a in said[name].alternatives}
        assert reasons["baked"] == reason


def test_prepare_without_measurement_pins_nothing(small):
    x, _, kernel = small
    expected = sparse_conv.explain(x, kernel, 2, "VALID")
    assert kernel.prepare(x.shape, 2, "VALID") == expected
    assert sparse_conv.explain(x, kernel, 2, "VALID") == expected


def test_prepare_really_measures(small):
    x, _, kernel = small
    prepared = kernel.prepare(x.shape, 1, "SAME", measure=True)
    for one in prepared.passes:
        times = {
            a.algorithm: a.measured_us
            for a in one.alternatives
            if a.measured_us is not None
        }
        # Code is generated for passes that multiply by the kernel.
        generates = "GPU" in x.device or cpu_assembly.unavailable() is None
        code = {"baked"} if generates and one.name != "wgrad" else set()
        assert set(times) == {"generic", "dense"} | code
        assert one.algorithm == min(times, key=times.get)
        assert "measured" in one.reason


def test_prepare_refuses_unknown_passes(small):
    x, _, kernel = small
    with pytest.raises(ValueError, match=r"`passes`.*Received: .*'forward'"):
        kernel.prepare(x.shape, 1, "SAME", passes=["forward"])


# Arguments


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_unknown_algorithms_are_refused(small, traced):
    x, _, kernel = small

    def call(x):
        return sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="fast")

    with pytest.raises(ValueError, match=r"`algorithm` must be .*Received: .*'fast'"):
        (tf.function(call) if traced else call)(x)


@pytest.mark.gpu
def test_dense_does_not_compute_where_no_back_end_was_asked_for():
    skip_unless_usable("cuda")
    with tf.device("/GPU:0"):
        x, kernel = tf.ones((1, 6, 6, 2)), tf.ones((3, 3, 2, 2))
    with pytest.raises(NotImplementedError, match="elsewhere"):
        sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="dense", backend="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("scope", [None, "/CPU:0", "/GPU:0"])
@pytest.mark.parametrize("device", ["/CPU:0", "/GPU:0"])
def test_dense_computes_where_the_tensors_live(device, scope):
    skip_unless_usable("cuda")
    with tf.device(device):
        x, dense = tf.random.normal((1, 6, 6, 2)), tf.random.normal((3, 3, 2, 2))
        kernel = sparse_conv.SparseKernel.from_dense(dense)
    with tf.device(scope):
        y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="dense")
    assert place_of(y) == place_of(x)
    np.testing.assert_allclose(y, tf.nn.conv2d(x, dense, 1, "SAME"), atol=1e-2)


def test_back_ends_keep_the_contract():
    for name in backends.NAMES:
        module = backends._backend(name)
        for function in (
            "unavailable", "reason_against", "fprop", "dgrad", "wgrad", "machine",
            "estimates", "nonzeros", "finish_compiling", "tune", "tuned", "caches",
        ):  # fmt: skip
            assert callable(getattr(module, function)), (name, function)
