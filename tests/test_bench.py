"""The measurements measure what they say, refuse wrong results and keep what they have.

No time is asserted anywhere.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from bench import (
    BenchError,
    cases,
    check,
    compare,
    crossover,
    fp32,
    gate,
    gpu_code,
    machine,
    measure,
    naive,
    plots,
    report,
    results,
    sides,
    timing,
    training,
)
from bench.__main__ import COMMANDS, main
from bench.cases import Case
from sparse_conv.problem import make_problem, normalize_geometry
from tests.emulator import run
from tests.reference import conv2d_reference
from tests.test_kernels_compile import architectures, compile_text

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    Case("small", 0, 1, 7, 9, 3, 4, 3, 0.4),
    Case("small", 1, 2, 11, 23, 5, 13, 5, 0.2),
    Case("small", 2, 1, 4, 4, 2, 3, 11, 0.3),
    Case("small", 3, 3, 5, 6, 4, 11, 1, 0.5),
    Case("small", 4, 1, 12, 10, 3, 2, 2, 0.6),
)
QUICK = timing.Effort(0.0, fewest=1, most=1)


@pytest.fixture(scope="module")
def target():
    with tf.device("/CPU:0"):
        place = machine.bridge.place_of(tf.constant(0.0))
    return machine.Target("CPU", place, 1 << 20)


def exact(case: Case) -> np.ndarray:
    problem = make_problem(
        case.input_shape, case.kernel_shape, normalize_geometry(1, "SAME", "NHWC", 1)
    )
    return conv2d_reference(case.input(), case.kernel(), problem)


def error_of(y: np.ndarray, case: Case) -> float:
    expected = exact(case)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


# What is measured.


def test_the_points_are_the_seeds():
    points = list(cases.figure_cases(on_gpu=True))
    assert all(p.n == 1 and p.dtype == "float32" for p in points)
    figures = {name: [p for p in points if p.group == name] for name in cases.FIGURES}
    assert [p.taps for p in figures["kernel size"]] == [3, 5, 7, 9, 11]
    assert [p.c for p in figures["channels in"]] == [3, 32, 64, 128, 256]
    assert [p.k for p in figures["channels out"]] == [3, 32, 64, 128, 256]
    assert [p.w for p in figures["image size"]] == [32, 64, 128, 256, 512]
    assert {0.1, 0.2, 0.5, 0.8, 1.0} <= {p.density for p in figures["density"]}
    constants = {
        "kernel size": "1x256x512x3 ?x?x3x64",
        "channels in": "1x256x512x? 11x11x?x3",
        "channels out": "1x256x512x3 11x11x3x?",
        "density": "1x256x512x32 11x11x32x64",
        "image size": "1x?x?x3 11x11x3x64",
    }
    for name, shape in constants.items():
        varied = {
            shape.replace("?", f"{p.position:g}") if name != "density" else shape
            for p in figures[name]
        }
        assert varied == {p.shape_text for p in figures[name]}
        if name != "density":
            assert {p.density for p in figures[name]} == {0.1}
    assert sum(p.density == 0.1 for p in points) == 21


def test_a_cpu_gets_no_larger_image_than_256x512():
    on_gpu = list(cases.figure_cases(on_gpu=True))
    on_cpu = list(cases.figure_cases(on_gpu=False))
    assert max(p.h * p.w for p in on_cpu) == 256 * 512
    changed = [(a, b) for a, b in zip(on_gpu, on_cpu, strict=True) if a != b]
    assert [(a.h, b.h, b.w) for a, b in changed] == [(512, 256, 512)]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_layers_are_measured_at_all_batches_and_densities(on_gpu):
    layers = list(cases.layer_cases(on_gpu=on_gpu, dtypes=("float32", "bfloat16")))
    networks = {layer.group for layer in layers}
    assert networks == {"ResNet-50 3x3", "ResNet-50 1x1", "MobileNet 1x1", "VGG-16"}
    assert {layer.n for layer in layers} == {1, 32 if on_gpu else 8}
    more = set() if on_gpu else {0.5, 1.0}
    assert {layer.density for layer in layers} == {0.02, 0.05, 0.1, 0.2} | more
    assert {layer.dtype for layer in layers} == {"float32", "bfloat16"}


def test_every_case_of_a_command_has_a_name_of_its_own():
    for listed in (
        cases.figure_cases(on_gpu=True),
        cases.figure_cases(on_gpu=False),
        cases.layer_cases(on_gpu=True, dtypes=tuple(cases.DTYPES)),
        cases.crossover_shapes(on_gpu=True),
        cases.training_cases(on_gpu=True),
    ):
        names = [str(case) for case in listed]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_have_their_density_and_useful_fmas_leave_out_the_padding(case):
    kernel = case.kernel()
    assert kernel.shape == case.kernel_shape
    ones = (kernel != 0).astype(np.float64)
    problem = make_problem(
        case.input_shape, case.kernel_shape, normalize_geometry(1, "SAME", "NHWC", 1)
    )
    products = conv2d_reference(np.ones(case.input_shape), ones, problem).sum()
    assert cases.useful_fmas(case, kernel) == products


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_operands_have_their_dtype(dtype):
    case = Case("small", 0, 1, 3, 3, 2, 2, 3, 0.5, dtype)
    assert case.input().dtype == case.kernel().dtype == cases.DTYPES[dtype]
    assert case.io_bytes == case.input().nbytes * 2


# The original's method.


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_naive_loops_agree_with_the_definition(case):
    y = naive.naive_cpu(case.input(), case.kernel())
    assert error_of(y, case) < 1e-6


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_naive_gpu_functions_agree_with_the_definition(case):
    text = gpu_code.text_of("naive")
    weights = case.taps**2 * case.c
    lists = {
        "values": np.empty(case.k * weights, np.float32),
        **{
            name: np.empty(case.k * weights, np.int32)
            for name in ("rows", "columns", "channels")
        },
        "counts": np.empty(case.k, np.int32),
    }
    kernel = case.kernel()
    coo = run(
        naive.conversion_launch(case),
        {"kernel": kernel, **lists},
        outputs=tuple(lists),
        text=text,
    )
    assert coo["counts"].tolist() == np.count_nonzero(kernel, (0, 1, 2)).tolist()
    y = run(
        naive.convolution_launch(case),
        {"x": case.input(), "y": np.empty(case.output_shape, np.float32), **coo},
        outputs=("y",),
        text=text,
    )["y"]
    assert error_of(y, case) < 1e-6


@pytest.mark.parametrize("file", ["naive", "gpu"])
def test_the_gpu_text_compiles_for_every_architecture(file):
    text = gpu_code.text_of(file)
    for architecture in architectures():
        options = [*gpu_code.OPTIONS, f"-arch=sm_{architecture}"]
        status, log = compile_text(text, f"{file}.cu", options)
        assert status == 0, log


# The gate, on a GPU that is only simulated.


class SimulatedGpu:
    """A host and a device, each with a clock in microseconds."""

    def __init__(self):
        self.host = 0.0
        self.device = 0.0

    def work(self, device_us: float, host_us: float = 1.0):
        self.host += host_us
        self.device = max(self.device, self.host) + device_us

    def wait(self):
        self.host = max(self.host, self.device)

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def record(self, stream):
                gpu.work(0.0)
                self.time = gpu.device

            @property
            def done(self):
                return gpu.host >= self.time

            def synchronize(self):
                gpu.host = max(gpu.host, self.time)

        class Step:
            def __init__(self, file, launch, ordinal):
                assert (file, launch.function) == ("gpu", "bench_gate")
                self.hold_us = int.from_bytes(launch.constants, "little") / 1e3

            def run(self, operands, stream):
                gpu.work(self.hold_us)

        cuda = SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda start, end: (end.time - start.time) / 1e3,
            runtime=SimpleNamespace(memsetAsync=lambda *words: gpu.work(20.0)),
        )
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
        lane = SimpleNamespace(stream=SimpleNamespace(ptr=0))
        ordered = contextlib.nullcontext(lane)
        monkeypatch.setattr(gate.streams, "ordered", lambda ordinal: ordered)
        monkeypatch.setattr(gate.streams, "has_context_events", lambda: True)
        monkeypatch.setattr(gate.bridge, "ordinal_of", lambda place: 0)
        monkeypatch.setattr(gate, "Step", Step)


@pytest.fixture
def gpu(monkeypatch):
    simulated = SimulatedGpu()
    simulated.install(monkeypatch)
    return simulated


def test_the_gate_times_the_device_though_the_host_is_slower(gpu, target):
    shut = gate.Gate(target.place, 1 << 20)

    def enqueue(count):
        for _ in range(count):
            gpu.work(device_us=10.0, host_us=60.0)

    sampler = shut.sampler(enqueue)
    assert sampler.sample() == pytest.approx(10.0, rel=1e-6)
    assert sampler.calls > 1


def test_the_gate_refuses_calls_that_wait_for_the_device(gpu, target):
    shut = gate.Gate(target.place, 1 << 20)

    def enqueue(count):
        for _ in range(count):
            gpu.work(10.0)
            gpu.wait()

    with pytest.raises(gate.GateError, match="gate is shut"):
        shut.sampler(enqueue)


def test_launches_are_enqueued_again_in_turns(gpu, target):
    made = []

    class Launched:
        def run(self, operands, stream):
            made.append(operands)

    calls = [[(Launched(), "a"), (Launched(), "b")], [(Launched(), "c")]]
    enqueue = gate.Gate(target.place, 1 << 20).replay(calls)
    enqueue(1)
    enqueue(2)
    assert made == ["a", "b", "c", "a", "b"]


def test_the_packages_launches_are_recorded(monkeypatch):
    ran = []
    monkeypatch.setattr(gate.streams.Step, "run", lambda *words: ran.append(words))
    step = object.__new__(gate.streams.Step)
    with gate.recorded_launches() as launches:
        step.run({"x": 1}, "stream")
    step.run({"x": 2}, "stream")
    assert launches == [(step, {"x": 1})]
    assert ran == [(step, {"x": 1}, "stream"), (step, {"x": 2}, "stream")]


@pytest.mark.parametrize("written", [5, 6])
def test_recorded_launches_must_compute_the_whole_result(
    written, gpu, target, monkeypatch
):
    """A launch that leaves out the last of 6 numbers is found out by the poison."""
    y = machine.bridge.empty((2, 3), tf.float32, target.place)
    numbers = machine.bridge.host_view(y)
    numbers[:] = 1

    def run(step, operands, stream):
        numbers.reshape(-1)[:written] = 1

    def call(number):
        object.__new__(gate.streams.Step).run({}, None)
        return y

    def poison(memory, size, byte):
        ctypes.memset(memory.address, byte, size)

    monkeypatch.setattr(gate.streams.Step, "run", run)
    shut = gate.Gate(target.place, 1 << 20)
    monkeypatch.setattr(shut, "fill", poison)
    exact = tf.ones((2, 3), tf.float64)
    side = sides.Side("ours", call, lambda y: check.relative_error(y, exact), True, 0.1)
    assert sides.replays(side, shut) == (written == 6)


def test_both_kinds_of_time_are_taken_on_a_gpu(target, gpu, monkeypatch):
    """The whole way of a row, with the CPU's tensors behind a simulated gate."""
    monkeypatch.setattr(measure, "why_not_naive", lambda *words: "needs a GPU")
    as_gpu = replace(target, kind="GPU")
    shut = gate.Gate(target.place, 1 << 20)
    asked = []

    def in_fp32(kind, case):
        asked.append((kind, case))
        return {"error": 1e-7, "error_limit": 1e-6, "device_us": quartiles(9.0)}

    run = measure.Bench(as_gpu, shut, QUICK, "generic", fp32=in_fp32)
    monkeypatch.setattr(shut, "_try_time_us", lambda enqueue, n: enqueue(n) or 7.0 * n)
    row = measure.measure(SMALL[0], run, lambda step: None)
    assert asked == [("convolution", SMALL[0])]
    for name in ("ours", "dense"):
        entry = row["sides"][name]
        assert entry["device_us"]["median"] == pytest.approx(7.0)
        assert entry["enqueued"] == "calls"
        assert "call_us" in entry
    assert set(row["sides"]) == {"ours", "dense", "dense_fp32", "naive"}
    json.dumps(row, allow_nan=False)


# What is refused.


def test_limits_of_errors_pass_rounding_and_refuse_mistakes():
    with tf.device("/CPU:0"):
        x = tf.random.stateless_normal((1, 20, 20, 8), (1, 2))
        kernel = tf.random.stateless_normal((5, 5, 8, 4), (3, 4))
        reference = check.reference(x, kernel)
        y = tf.nn.conv2d(x, kernel, 1, "SAME")
        limit = check.limit("float32", 200, transformed=True)
        assert check.verdict(check.relative_error(y, reference), limit) is None
        one_wrong = tf.tensor_scatter_nd_add(y, [[0, 3, 4, 1]], [0.1])
        assert "wrong" in check.verdict(
            check.relative_error(one_wrong, reference), limit
        )
        nan = tf.tensor_scatter_nd_add(y, [[0, 3, 4, 1]], [math.nan])
        assert "wrong" in check.verdict(check.relative_error(nan, reference), limit)
        shifted = tf.roll(y, 1, 1)
        assert "wrong" in check.verdict(check.relative_error(shifted, reference), limit)
        assert check.relative_error(y[:, 1:], reference) == math.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_contenders_are_right_on_a_cpu(dtype, target):
    case = Case("small", 0, 2, 9, 10, 8, 6, 3, 0.3, dtype)
    row = measure.measure(case, bench(target), lambda step: None)
    json.dumps(row, allow_nan=False)
    for name in ("ours", "dense", "naive"):
        entry = row["sides"][name]
        if name == "naive" and dtype != "float32":
            assert "no " + dtype in entry["refused"]
            continue
        assert "refused" not in entry
        assert entry["error"] <= entry["error_limit"]
        assert entry["call_us"]["median"] > 0
    assert row["sides"]["ours"]["algorithm"] in ("generic", "baked", "dense")
    assert "dense_fp32" not in row["sides"]


@pytest.mark.parametrize("algorithm", ["generic", "dense"])
def test_the_algorithm_asked_for_is_measured(algorithm, target):
    row = measure.measure(SMALL[0], bench(target, algorithm), lambda step: None)
    ours = row["sides"]["ours"]
    assert ours["algorithm_asked"] == ours["algorithm"] == algorithm


@pytest.mark.parametrize("fault", [0.0, 0.01, math.nan])
def test_a_wrong_result_gets_no_time(target, fault, monkeypatch):
    """Fails if the fault is not seen, and if a right result (0.0) is refused."""
    convolve = measure.ours.Prepared.__call__

    def faulty(prepared, x):
        return convolve(prepared, x) * (1 + fault)

    monkeypatch.setattr(measure.ours.Prepared, "__call__", faulty)
    row = measure.measure(SMALL[0], bench(target), lambda step: None)
    ours = row["sides"]["ours"]
    assert ("call_us" in ours) == (fault == 0)
    assert ("refused" in ours) == (fault != 0)
    text = report.document(document_of([row]))
    assert ("wrong result" in text) == (fault != 0)
    assert ("| wrong" in " ".join(text.split())) == (fault != 0)
    assert (compare.ratio(row, "dense", "call_us") is None) == (fault != 0)


def bench(target, algorithm="auto"):
    return measure.Bench(target, None, QUICK, algorithm)


@pytest.mark.parametrize("kind", ["convolution", "training"])
def test_the_float32_process_answers_with_an_entry(kind):
    process = fp32.Fp32Process("CPU", QUICK)
    try:
        for case in SMALL[:2]:
            entry = process.entry(kind, case)
            assert entry["error"] <= entry["error_limit"]
            assert entry["tf32"] is False
            assert entry["call_us"]["median"] > 0
        with pytest.raises(BenchError, match="process failed"):
            process.entry(kind, Case("broken", 0, 1, 3, 3, 2, 2, 3, 0.5, "complex"))
    finally:
        process.close()


def test_a_training_step_is_right_on_a_cpu(target):
    row = training.measure_step(SMALL[1], bench(target, "generic"), lambda step: None)
    for name in ("ours", "dense"):
        entry = row["sides"][name]
        assert entry["error"] <= entry["error_limit"]
        assert entry["call_us"]["median"] > 0


# Arithmetic.


def test_quartiles_and_turns():
    quartiles = timing.Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0], calls=7)
    assert asdict(quartiles) == {
        "q1": 2.0, "median": 3.0, "q3": 4.0, "samples": 5, "calls": 7,
    }  # fmt: skip
    order = []
    samplers = {
        name: timing.Sampler(lambda name=name: order.append(name) or 1.0, 1)
        for name in "ab"
    }
    timing.in_turns(samplers, timing.Effort(0.0, fewest=3))
    assert order == list("abbaab")


@pytest.mark.parametrize(
    ("times", "tries", "kept"),
    [([1, 3, 9, 5, 5, 5, 1, 1, 1], 3, 5.0), ([1, 3, 9, 1, 2, 3], 2, 2.0),
     ([1, 3, 9, 1, 2, 3], 1, 3.0)],
)  # fmt: skip
def test_widely_spread_times_are_taken_anew(times, tries, kept):
    source = iter(times)
    samplers = {"a": timing.Sampler(lambda: float(next(source)), 1)}
    found = timing.in_turns(samplers, timing.Effort(0.0, fewest=3, tries=tries))
    assert found["a"].median == kept


def test_a_ring_keeps_the_last_outputs():
    ring = timing.Ring(2)
    for number in range(5):
        ring.keep(number)
    assert list(ring._outputs) == [3, 4]


@pytest.mark.parametrize("io_bytes", [10, 10**4, 10**6, 10**9])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_rotation_takes_several_inputs_and_bounds_memory(io_bytes, on_gpu):
    count = sides.rotation(io_bytes, 5 * 10**7, on_gpu=on_gpu)
    assert 2 <= count <= 160
    assert count == 2 or count * io_bytes <= 2**29


@pytest.mark.parametrize("density", [0.011, 0.1, 0.37, 0.99])
def test_bisection_finds_a_crossing(density):
    def time_at(d: float) -> float:
        return 3.0 + 40 * d

    found = crossover.crossing(time_at, time_at(density))
    assert found == pytest.approx(density, rel=0.01)


def test_crossings_beyond_the_ends():
    assert crossover.crossing(lambda d: 5 + d, 4.0) == 0
    assert crossover.crossing(lambda d: d, 4.0) == math.inf
    assert report.crossing_text({"dense": None}, "dense") == "never"
    assert report.crossing_text({"dense": 0.0}, "dense") == "0.01 or less"
    assert report.crossing_text({}, "dense") == "-"


def test_ratios_are_of_times_of_one_kind():
    row = gpu_row(SMALL[0])
    assert compare.kind_of([row]) == "device_us"
    assert compare.ratio(row, "dense", "device_us") == pytest.approx(4.0)
    assert compare.ratio(row, "dense", "call_us") == pytest.approx(2.0)
    low, high = compare.ratio_spread(row, "dense", "device_us")
    assert low < 4.0 < high
    del row["sides"]["ours"]["device_us"]
    assert compare.ratio(row, "dense", "device_us") is None
    assert compare.geometric_mean([1.0, None, 4.0]) == pytest.approx(2.0)
    assert compare.geometric_mean([None]) is None


def test_the_floor_is_none_where_dense_was_chosen():
    row = gpu_row(SMALL[0])
    assert compare.floor_us(row, MACHINE) == pytest.approx(5.0)
    assert compare.floor_fraction(row, "device_us", MACHINE) == pytest.approx(0.5)
    row["sides"]["ours"]["algorithm"] = "fprop generic, dgrad dense"
    assert compare.floor_fraction(row, "device_us", MACHINE) is None


# Files.


def quartiles(median: float) -> dict[str, float]:
    return timing.Quartiles(median * 0.95, median, median * 1.1, 9, 3).as_dict()


def gpu_row(case: Case) -> dict:
    """A row as a GPU gives it: ours 10 us on the device, dense 40."""
    entries = {}
    for name, device, call in (
        ("ours", 10.0, 30.0),
        ("dense", 40.0, 60.0),
        ("dense_fp32", 80.0, 90.0),
        ("naive", 200.0, 500.0),
    ):
        entries[name] = {
            "error": 1e-7,
            "error_limit": 1e-6,
            "device_us": quartiles(device),
            "call_us": quartiles(call),
        }
    entries["ours"]["algorithm"] = "generic"
    return {
        "key": str(case),
        "case": asdict(case),
        "shape": case.shape_text,
        "useful_fmas": 150_000_000,
        "io_bytes": 1000,
        "sides": entries,
    }


MACHINE = {
    "device": "GPU",
    "name": "NVIDIA H200",
    "gpu": {"driver": "580.95.05"},
    "threads": 16,
    "bandwidth_bytes_per_s": 4.3e12,
    "bandwidth_source": "measured",
    "peak_fmas_per_s": 3e13,
    "peak_source": "measured",
    "tf32_default": True,
    "versions": {
        "sparse_conv": "0.1.0", "tensorflow": "2.21.0", "numpy": "2.4", "cupy": "14.2",
        "numba": "0.68",
    },
    "commit": "0123456",
    "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
SETTINGS = {"algorithm": "auto", "tf32_default": True}


def document_of(rows, command="figures", path=None):
    document = {
        "schema": results.SCHEMA,
        "command": command,
        "settings": SETTINGS,
        "machine": MACHINE,
        "rows": rows,
    }
    return results.Results(path, document)


def begin(path, *, resume, settings=SETTINGS, described=MACHINE):
    return results.Results.begin(path, "figures", settings, described, resume=resume)


def test_results_survive_being_cut_off_and_go_on(tmp_path):
    path = tmp_path / "new" / "figures.json"
    first = begin(path, resume=False)
    for case in SMALL[:2]:
        first.add(gpu_row(case))
        assert results.load(path).document == first.document
    slower = {**MACHINE, "peak_fmas_per_s": 1e12, "bandwidth_bytes_per_s": 9e12}
    again = begin(path, resume=True, described=slower)
    assert again.rows == first.rows
    assert again.document["machine"]["peak_fmas_per_s"] == 3e13
    assert again.document["machine"]["bandwidth_bytes_per_s"] == 9e12
    assert again.has(str(SMALL[1]))
    assert not again.has(str(SMALL[2]))
    assert not begin(path, resume=False).rows


def test_rows_that_were_measured_otherwise_are_not_gone_on_with(tmp_path):
    path = tmp_path / "figures.json"
    begin(path, resume=False).add(gpu_row(SMALL[0]))
    with pytest.raises(BenchError, match="settings"):
        begin(path, resume=True, settings={**SETTINGS, "algorithm": "generic"})
    other = copy.deepcopy(MACHINE)
    other["versions"]["cupy"] = "15"
    with pytest.raises(BenchError, match="versions"):
        begin(path, resume=True, described=other)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 0}'])
def test_other_files_are_no_results(tmp_path, text):
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(BenchError, match="Received"):
        results.load(path)
    with pytest.raises(BenchError):
        results.load(tmp_path / "missing.json")


def test_a_machine_is_a_folder_and_a_caption():
    assert machine.slug(MACHINE) == "nvidia-h200"
    for word in ("NVIDIA H200", "580.95.05", "2.21.0", "14.2", "0123456", "2026-01-02"):
        assert word in machine.caption(MACHINE)


def rows_of(command: str) -> list[dict]:
    """A few rows as each command makes them."""
    if command in ("figures", "layers"):
        listed = (
            cases.figure_cases(on_gpu=True)
            if command == "figures"
            else [c for c in cases.layer_cases(on_gpu=True) if c.h < 30]
        )
        return [gpu_row(case) for case in listed]
    named = [gpu_row(case) for case in SMALL]
    if command == "training":
        return named
    for row, density in zip(named, (0.2, 0.0, None, 0.9, 0.5), strict=True):
        row["crossings"] = {"dense": density, "dense_fp32": None}
        row["kind"] = "device_us"
    start = {"dense_s": 0.5, "first_s": 0.2, "prepared_s": 1.0, "algorithm": "baked"}
    other = {
        "crossover": named,
        "overhead": [
            {"key": way, "call_us": {c: quartiles(9.0) for c in "abc"}}
            for way in ("eager", "recording")
        ],
        "accuracy": [
            {**row, "ours": 1e-7, "dense": 2e-7, "algorithm": "generic"}
            for row in named
        ],
        "startup": [{**row, "cold": start, "warm": start} for row in named],
    }
    return other[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_and_plots_are_drawn_from_a_file(command, tmp_path, capsys):
    path = tmp_path / f"{command}.json"
    document_of(rows_of(command), command, path).write()
    assert main(["plot", str(path)]) == 0
    printed = capsys.readouterr().out
    text = path.with_suffix(".md").read_text()
    assert text in printed
    assert "NVIDIA H200" in text
    pictures = {picture.stem for picture in tmp_path.glob("*.png")}
    expected = {
        "figures": {
            "summary",
            *(f"figure-{name.replace(' ', '-')}" for name in cases.FIGURES),
        },
        "accuracy": set(),
        "startup": set(),
    }
    assert pictures == expected.get(command, {command})


def test_figures_of_another_dtype_lie_beside_those_of_float32(tmp_path):
    rows = rows_of("figures")
    for row in rows:
        row["case"]["dtype"] = "bfloat16"
    written = document_of(rows, path=tmp_path / "figures-bfloat16.json")
    pictures = {path.stem for path in plots.draw(written)}
    names = {f"figure-bfloat16-{name.replace(' ', '-')}" for name in cases.FIGURES}
    assert pictures == {"summary-bfloat16", *names}
    wanted = cases.figure_cases(on_gpu=True, dtype="bfloat16")
    assert {case.dtype for case in wanted} == {"bfloat16"}


def test_plots_leave_out_what_has_no_time(tmp_path):
    rows = rows_of("figures")
    for row in rows[::2]:
        row["sides"]["ours"] = {"refused": "wrong result", "error_limit": 1e-6}
    rows[1]["sides"]["naive"] = {"refused": "takes a CPU seconds"}
    path = tmp_path / "figures.json"
    written = document_of(rows, path=path)
    assert len(plots.draw(written)) == 6
    text = report.document(written)
    assert "wrong result" in text
    assert "takes a CPU seconds" in text


# The command line. In a process of its own: it decides about TensorFlow's devices.


def run_bench(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_quick_run_on_a_cpu_writes_all_and_goes_on(tmp_path):
    words = ["--device", "cpu", "--quick", "--threads", "1", "--out", str(tmp_path)]
    words += ["--commit", "0123456"]
    first = ("--only", "^image", "--no-plots")
    done = run_bench("figures", *words, *first)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.png"))
    before = results.load(tmp_path / "figures.json").document
    assert [row["case"]["group"] for row in before["rows"]] == ["image size"]
    assert {"versions", "date", "commit", "tf32_default"} <= set(before["machine"])
    assert before["machine"]["threads"] == 1
    assert before["settings"]["algorithm"] == "auto"
    assert before["machine"]["commit"] == "0123456"
    done = run_bench("figures", *words, "--only", "^(image|kernel)", "--resume")
    assert done.returncode == 0, done.stderr
    after = results.load(tmp_path / "figures.json").document
    assert after["rows"][0] == before["rows"][0]
    assert len(after["rows"]) == 2
    assert (tmp_path / "summary.png").exists()


def test_a_spent_budget_stops_before_the_next_row(tmp_path):
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--budget", "0"]
    done = run_bench("figures", *words)
    assert done.returncode == 0, done.stderr
    assert results.load(tmp_path / "figures.json").rows == []
    assert "--resume goes on" in done.stdout + done.stderr


def test_a_gpu_that_is_not_there_is_an_error():
    from sparse_conv import backends

    if dict(backends.statuses())["cuda"] is None:
        pytest.skip("this machine has a usable GPU")
    done = run_bench("figures", "--device", "gpu")
    assert done.returncode == 1
    assert "needs a GPU" in done.stderr


@pytest.mark.parametrize(
    "words", [["--only", "("], ["--threads", "0"], ["--algorithm", "magic"]]
)
def test_bad_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["figures", *words])
    assert stop.value.code == 2
