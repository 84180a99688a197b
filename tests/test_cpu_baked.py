"""Code that the CPU back end generates: its bytes, values, calls, and refusals."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings

import sparse_conv
from sparse_conv.backends import (
    cpu_assembly,
    cpu_baked,
    cpu_code,
    cpu_loops,
    cpu_plan,
    cpu_threads,
    cpu_tiles,
)
from sparse_conv.gather import dgrad_gather, fprop_gather
from tests.strategies import Call, calls, make_data
from tests.test_cpu_loops import (
    ACTIVATIONS,
    EXAMPLES,
    LARGE,
    STREAMED,
    check,
    check_bias_and_activation,
    check_skipped_zeros,
    references,
    run_all,
    run_fprop,
    sparse,
)
from tests.tolerance import assert_exact

x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the instructions are those of x86"
)
runs_code = pytest.mark.skipif(
    cpu_assembly.unavailable() is not None, reason=str(cpu_assembly.unavailable())
)
FLOATS = ("float32", "float64")
# The fixture is the same for all examples of a test.
FIXTURES = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def default_threads() -> Iterator[None]:
    yield
    cpu_threads.set_thread_limit(None)


@pytest.fixture(params=["as planned", "in small pieces", "streamed"])
def cut(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Code as large kernels have it, for small ones; outputs past the caches."""
    if request.param == "in small pieces":
        monkeypatch.setattr(cpu_tiles, "CODE_OUTPUTS", 3)
        monkeypatch.setattr(cpu_tiles, "CODE_BLOCK", 5)
        monkeypatch.setattr(cpu_tiles, "CHAIN_ENTRIES", 2)
        monkeypatch.setattr(cpu_baked, "FAR_CODE_BYTES", 0)
    if request.param == "streamed":
        monkeypatch.setattr(cpu_tiles, "STREAMED_BYTES", 1)
    cpu_plan.make_plan.cache_clear()
    yield
    cpu_plan.make_plan.cache_clear()


# Instructions


@x86
@pytest.mark.parametrize("dtype", FLOATS)
def test_instructions_are_those_of_the_assembler(dtype, monkeypatch):
    monkeypatch.setattr(cpu_code, "vector_bytes", lambda: 64)
    table = cpu_assembly.instructions.__wrapped__(dtype)
    suffix, lanes, size = {"float32": ("ps", 16, 4), "float64": ("pd", 8, 8)}[dtype]
    one = f"{{1to{lanes}}}"
    lines, numbers, values = [], [], []
    for name, text, value in (
        ("read", f"vmova{suffix} VALUE(%rdi), %zmm31", 0x12345),
        ("read", f"vmova{suffix} VALUE(%rdi), %zmm31", -0x54321),
        ("values", "leaq VALUE(%rsi), %rax", 0x7FFFFFF),
        ("more values", "addq $VALUE, %rax", 1024),
        ("next sums", "addq $VALUE, %rdx", 0x10000),
        ("fetch", "prefetcht1 VALUE(%rbx)", 0x54321),
        ("fetch on", "addq $VALUE, %rbx", 0x12300),
    ):
        lines.append(text.replace("VALUE", str(value)))
        numbers.append(table.numbers[name])
        values.append(value)
    product = f"VALUE(%rax){one}, %zmm31"
    for register in (0, 7, 8, 15, 16, 30):
        zmm = f"%zmm{register}"
        for name, text, value in (
            ("multiply", f"vmul{suffix} {product}, {zmm}", -128),
            ("multiply and add", f"vfmadd231{suffix} {product}, {zmm}", 127),
            ("zero", f"vpxord {zmm}, {zmm}, {zmm}", 0),
            ("add held", f"vadd{suffix} VALUE(%rdx), {zmm}, {zmm}", 0x11111),
            ("add bias", f"vadd{suffix} VALUE(%r8){one}, {zmm}, {zmm}", 0x23456),
            ("store", f"vmova{suffix} {zmm}, VALUE(%rdx)", 0x33333),
        ):
            # A displacement of one byte counts in elements.
            place = value * size if name.startswith("multiply") else value
            lines.append(text.replace("VALUE", str(place)))
            numbers.append(table.numbers[name] + register)
            values.append(value)
    expected = b"".join(cpu_assembly._assembled(f"expected_{dtype}", lines))
    encoded = table.encode(np.array(numbers), np.array(values, np.int64))
    assert encoded.tobytes() == expected


@x86
def test_memory_that_is_executed_can_not_be_written():
    # mov eax, edi; add eax, 1; ret
    code = np.frombuffer(b"\x89\xf8\x83\xc0\x01\xc3", np.uint8)
    executable = cpu_assembly.Executable(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(executable.address)
    assert function(41) == 42
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, protection, *_ = line.split()
        begin, end = (int(place, 16) for place in places.split("-"))
        if begin <= executable.address < end:
            assert protection == "r-xp"
            return
    pytest.fail("the code is nowhere")


def test_machines_that_run_no_code_say_why(monkeypatch):
    unavailable = cpu_assembly.unavailable.__wrapped__
    monkeypatch.setattr(cpu_assembly.platform, "machine", lambda: "aarch64")
    assert "AVX-512" in unavailable()
    monkeypatch.setattr(cpu_assembly.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_code, "vector_bytes", lambda: 32)
    assert "AVX-512" in unavailable()
    monkeypatch.setattr(cpu_code, "vector_bytes", lambda: 64)
    monkeypatch.setattr(cpu_assembly, "_protect", lambda: lambda *_: 1)
    assert "executes no memory" in unavailable()


# Values


@runs_code
@settings(max_examples=EXAMPLES // 2, suppress_health_check=FIXTURES)
@given(call=calls(FLOATS))
def test_every_pass_agrees_with_the_reference(cut, call):
    check(call, baked=True)


@runs_code
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "random"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("call", LARGE + STREAMED, ids=lambda call: str(call.problem))
def test_large_problems_agree_with_the_reference(cut, call, dtype, integers):
    check(replace(call, dtype=dtype, integers=integers), baked=True)


@runs_code
@settings(max_examples=EXAMPLES // 3, suppress_health_check=FIXTURES)
@given(call=calls(FLOATS))
def test_skipped_zeros_never_meet_inf_or_nan(cut, call):
    check_skipped_zeros(call, baked=True)


@runs_code
def test_an_output_without_nonzeros_is_plus_zero(cut):
    call = Call((2, 6, 5, 4), (3, 3, 4, 9), density=1.0)
    data = make_data(call)
    data.kernel[..., 2:7] = 0
    y = run_fprop(call, data, np.full_like(data.x, -np.inf), baked=True)[..., 2:7]
    np.testing.assert_array_equal(y, np.zeros_like(y))
    assert not np.signbit(y).any()


@runs_code
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_and_activation(cut, dtype, activation, data_format):
    check_bias_and_activation(dtype, activation, data_format, outputs=16, baked=True)


@runs_code
@pytest.mark.parametrize("call", LARGE + STREAMED, ids=lambda call: str(call.problem))
def test_results_do_not_depend_on_the_number_of_threads(cut, call):
    data = make_data(call)
    expected = run_all(call, data, baked=True)
    for limit in (1, 3, 7):
        cpu_threads.set_thread_limit(limit)
        for name, result in run_all(call, data, baked=True).items():
            np.testing.assert_array_equal(result, expected[name], err_msg=name)


@runs_code
def test_code_serves_other_values_of_its_pattern(cut):
    call = Call((2, 9, 11, 8), (3, 3, 8, 40), integers=True)
    data, problem = make_data(call), call.problem
    pattern, values = sparse(data.kernel)
    placement = cpu_loops.place(
        fprop_gather(problem), pattern.fprop_rows(), values.dtype, baked=True
    )
    for factor in (1, -3):
        entries = cpu_loops.fill(placement, factor * values)
        y = np.full(problem.output_shape, np.nan, np.float32)
        cpu_loops.run_gather(entries, data.x.ctypes.data, y.ctypes.data)
        assert_exact(y, factor * references(call, data)["fprop"], str(factor))


@runs_code
def test_an_input_is_read_once_for_all_outputs_that_need_it():
    call = Call((1, 8, 8, 4), (3, 3, 4, 28), density=1.0)
    pattern, values = sparse(make_data(call).kernel)
    stream = []
    real = cpu_baked._Stream.add

    def add(self, name, segment, *rest, **more):
        stream.extend([name] * np.size(segment))
        real(self, name, segment, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_baked._Stream, "add", add)
        cpu_loops.place(
            fprop_gather(call.problem), pattern.fprop_rows(), values.dtype, baked=True
        )
    products = stream.count("multiply") + stream.count("multiply and add")
    assert products == pattern.nnz == 36 * 28
    assert stream.count("read") == 36


# Calls


def operands(dtype: tf.DType = tf.float32) -> tuple[tf.Tensor, tf.Tensor]:
    generator = tf.random.Generator.from_seed(1)
    with tf.device("/CPU:0"):
        dense = generator.normal((3, 3, 6, 32))
        dense *= tf.cast(generator.uniform(dense.shape) < 0.2, tf.float32)
        return tf.cast(generator.normal((2, 9, 10, 6)), dtype), tf.cast(dense, dtype)


@runs_code
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.float16, tf.bfloat16])
def test_calls_and_gradients(dtype, traced):
    x, dense = operands(dtype)
    kernel = sparse_conv.SparseKernel.from_dense(dense)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="baked")
        return y, tape.gradient(y, x)

    def expected():
        with tf.GradientTape() as tape:
            wide = tf.cast(x, tf.float64)
            tape.watch(wide)
            y = tf.nn.conv2d(wide, tf.cast(dense, tf.float64), 1, "SAME")
        return y, tape.gradient(y, wide)

    tolerance = {2: 3e-2, 4: 1e-5, 8: 1e-13}[dtype.size]
    for actual, wanted in zip(
        (tf.function(step) if traced else step)(x), expected(), strict=True
    ):
        assert actual.dtype == dtype
        np.testing.assert_allclose(
            tf.cast(actual, tf.float64), wanted, rtol=tolerance, atol=tolerance
        )


@runs_code
def test_a_trained_kernel_keeps_its_code(monkeypatch):
    x, dense = operands()
    kernel = sparse_conv.SparseKernel.from_dense(dense, trainable=True)
    made = []
    real = cpu_baked.generate
    monkeypatch.setattr(
        cpu_baked, "generate", lambda *a: made.append(real(*a)) or made[-1]
    )
    for _ in range(3):
        y = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="baked")
        expected = tf.nn.conv2d(x, kernel.to_dense(), 1, "SAME")
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        kernel.values.assign(kernel.values * -1.5 + 1)
    assert len(made) == 1


@runs_code
def test_prepare_and_explain_name_the_code():
    x, dense = operands()
    kernel = sparse_conv.SparseKernel.from_dense(dense)
    prepared = kernel.prepare(x.shape, 1, "SAME", algorithm="baked", measure=True)
    assert prepared["fprop"].algorithm == prepared["dgrad"].algorithm == "baked"
    for name in ("fprop", "dgrad"):
        baked = prepared[name].alternatives[1]
        assert baked.predicted_us > 0
        assert baked.measured_us > 0
        assert "pattern" in baked.reason


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("kind", ["int32", "dense"])
def test_what_has_no_code_is_refused_with_a_reason(kind, traced):
    x, filters = operands()
    reason = "code is generated for the pattern of a SparseKernel"
    if kind == "int32":
        x = tf.cast(x, tf.int32)
        filters = sparse_conv.SparseKernel.from_dense(tf.cast(filters, tf.int32))
        reason = "floating-point"

    def call(x):
        return sparse_conv.conv2d(x, filters, 1, "SAME", algorithm="baked")

    with pytest.raises(
        (NotImplementedError, tf.errors.UnimplementedError), match=reason
    ):
        (tf.function(call) if traced else call)(x)


@runs_code
def test_planes_beyond_the_reach_of_code_are_refused(monkeypatch):
    call = Call((1, 4, 4, 3), (3, 3, 3, 8))
    gather = dgrad_gather(call.problem)
    pattern, values = sparse(make_data(call).kernel)
    real = cpu_plan._finish

    def huge(*arguments):
        return real(*arguments)._replace(channel_cells=2**25)

    monkeypatch.setattr(cpu_plan, "_finish", huge)
    cpu_plan.make_plan.cache_clear()
    with pytest.raises(NotImplementedError, match=r"2\^31 bytes.*Received: "):
        cpu_loops.place(gather, pattern.dgrad_rows(gather), values.dtype, baked=True)
    cpu_plan.make_plan.cache_clear()
