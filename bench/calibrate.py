"""Measures what passes cost on this machine, and fits the models that choose by it.

Run as `python -m bench.calibrate`; on the GPU if there is one, in about three minutes.
It writes `sparse_conv/costs/<kind>.json` and prints how far each model is from what was
measured, and what choosing by the models loses against knowing the times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tqdm

import sparse_conv
from sparse_conv import backends, costs, dense
from sparse_conv._cli import machine as machine_names
from sparse_conv.activations import LINEAR
from sparse_conv.backends import cpu_assembly
from sparse_conv.bridge import HOST, Place, gpu_place
from sparse_conv.choice import PASSES, favoured
from sparse_conv.costs.terms import code_terms, sparse_terms
from sparse_conv.explanation import median_microseconds
from sparse_conv.problem import Problem, make_problem, normalize_geometry
from sparse_conv.streams import wait_for_devices

DENSITIES = (0.02, 0.1, 0.2, 0.3, 0.5, 1.0)
DTYPES = ("float64", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution with SAME padding and NHWC data."""

    n: int
    size: tuple[int, int]
    taps: int
    channels: int
    outputs: int
    stride: int = 1

    @property
    def problem(self) -> Problem:
        """Its sizes."""
        geometry = normalize_geometry(self.stride, "SAME")
        shape = (self.n, *self.size, self.channels)
        kernel = (self.taps, self.taps, self.channels, self.outputs)
        return make_problem(shape, kernel, geometry)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured time, and the model that should predict it.

    Attributes:
        model: Name of the model in the file of numbers.
        terms: The amounts that it weighs.
        microseconds: The measured time.
        subject: What was computed: (layer, pass, density), density None for dense.
    """

    model: str
    terms: dict[str, float]
    microseconds: float
    subject: tuple[Layer, str, float | None]


def layers(on_gpu: bool) -> Iterator[Layer]:
    """Layers of common networks and of the seed's figures, small ones included."""
    if on_gpu:
        for channels in (64, 128):
            yield Layer(1, (256, 512), 11, 3, channels)
            yield Layer(1, (256, 512), 11, channels, 3)
        yield Layer(1, (256, 512), 11, 32, 64)
    for taps in (3, 7, 11):
        yield Layer(1, (256, 512), taps, 3, 64)
    yield Layer(1, (256, 512), 11, 32, 3)
    yield Layer(1, (256, 512), 11, 3, 3)
    yield Layer(1, (256, 512), 5, 3, 128)
    yield Layer(1, (128, 128), 11, 16, 32)
    for size in (32, 64, 128):
        yield Layer(1, (size, size), 11, 3, 64)
    for batch in (1, 32 if on_gpu else 8):
        for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
            yield Layer(batch, (size, size), 3, channels, channels)
            yield Layer(batch, (size, size), 1, 4 * channels, channels)
            yield Layer(batch, (size, size), 1, channels, 4 * channels)
    if not on_gpu:
        for batch in (1, 8):
            yield Layer(batch, (14, 14), 3, 512, 512)
    yield Layer(1, (56, 56), 3, 128, 128, stride=2)
    yield Layer(8, (56, 56), 1, 256, 512, stride=2)
    yield Layer(1, (224, 224), 7, 3, 64, stride=2)
    yield Layer(1, (112, 112), 1, 32, 64)
    yield Layer(1, (14, 14), 1, 512, 512)
    yield Layer(4, (8, 8), 3, 8, 16)


class Bench:
    """Measures passes at one place.

    Attributes:
        place: Where the operands live.
        backend: The back end that computes there.
        machine: What the costs depend on.
    """

    def __init__(self, place: Place):
        self.place = place
        self.backend = backends.select(place, tf.float32, None)
        self.machine = self.backend.machine(place)

    def times(self, calls: dict[Any, Callable[[], tf.Tensor]]) -> dict[Any, float]:
        """Microseconds of each call; on a GPU, those of the GPU alone."""
        if self.place.kind == "CPU":
            return median_microseconds(calls, self.backend.finish_compiling)
        for call in calls.values():
            call()
        self.backend.finish_compiling()
        return {name: gpu_microseconds(call) for name, call in calls.items()}

    def samples(self, layer: Layer, dtype: str, densities: Sequence[float]) -> list:
        """All passes of a layer, at each density and by TensorFlow."""
        problem = layer.problem
        with tf.device(self.place.device):
            operands = {
                "x": tf.random.normal(problem.input_shape),
                "dy": tf.random.normal(problem.output_shape),
                "w": tf.random.normal(problem.kernel_shape),
            }
            operands = {n: tf.cast(t, dtype) for n, t in operands.items()}
        kernels = {d: pruned(operands["w"], d) for d in densities}
        found = []
        for name in PASSES:
            calls: dict[Any, Callable[[], tf.Tensor]] = {
                (algorithm, d): self.sparse_call(
                    algorithm, name, layer, kernel, operands
                )
                for algorithm in self.algorithms(name)
                for d, kernel in kernels.items()
            }
            reason = dense.reason_against(name, problem, tf.as_dtype(dtype), self.place)
            if reason is None:
                calls["dense", None] = self.dense_call(name, layer, operands)
            for (algorithm, density), microseconds in self.times(calls).items():
                nnz = kernels[density].nnz if density else 0
                model, terms = self.model(algorithm, name, problem, dtype, nnz)
                found.append(Sample(model, terms, microseconds, (layer, name, density)))
        return found

    def algorithms(self, name: str) -> tuple[str, ...]:
        """Those of ours that are measured: a GPU's code takes long to compile."""
        code = self.place.kind == "CPU" and name != "wgrad"
        if code and cpu_assembly.unavailable() is None:
            return "generic", "baked"
        return ("generic",)

    def model(
        self, algorithm: str, name: str, problem: Problem, dtype: str, nnz: int
    ) -> tuple[str, dict[str, float]]:
        """The model of a pass by an algorithm, and its terms."""
        itemsize = tf.as_dtype(dtype).size
        if algorithm == "dense":
            precision = "" if self.place.kind == "CPU" else f" {precision_of(dtype)}"
            terms = dense.terms(name, problem, tf.as_dtype(dtype), self.machine)
            return f"dense {name}{precision}", terms
        if self.place.kind == "CPU":
            amounts = code_terms if algorithm == "baked" else sparse_terms
            terms = amounts(name, problem, nnz, itemsize, self.machine)
        else:
            from sparse_conv.backends import cuda, cuda_costs

            limits = cuda.limits(self.place)
            cost = cuda_costs.generic_cost(
                name, problem, dtype, nnz, limits, self.machine, True
            )
            return cost.model, dict(cost.terms)
        return f"{algorithm} {name}", terms

    def sparse_call(
        self,
        algorithm: str,
        name: str,
        layer: Layer,
        kernel: sparse_conv.SparseKernel,
        operands: dict[str, tf.Tensor],
    ) -> Callable[[], tf.Tensor]:
        """A call of our code."""
        problem, pattern = layer.problem, kernel.pattern
        arguments = (problem, kernel.dtype, self.place, pattern)
        x, dy, w = operands["x"], operands["dy"], kernel.values
        if name == "wgrad":
            run = self.backend.wgrad(*arguments, algorithm=algorithm)
            return lambda: run(x, dy)
        if name == "dgrad":
            run = self.backend.dgrad(
                *arguments,
                algorithm=algorithm,
                waits=True,
                constant=True,
                shape=problem.input_shape,
            )
            return lambda: run(dy, w)
        run = self.backend.fprop(
            *arguments, algorithm=algorithm, waits=True, constant=True,
            has_bias=False, activation=0,
            shape=problem.output_shape,
        )  # fmt: skip
        return lambda: run(x, w)

    def dense_call(
        self, name: str, layer: Layer, operands: dict[str, tf.Tensor]
    ) -> Callable[[], tf.Tensor]:
        """A call of TensorFlow's convolution."""
        problem = layer.problem
        x, dy, w = operands["x"], operands["dy"], operands["w"]
        arguments = (problem, x.dtype, self.place, None)
        if name == "wgrad":
            run = dense.wgrad(*arguments)
            return lambda: run(x, dy)
        if name == "dgrad":
            run = dense.dgrad(*arguments, shape=problem.input_shape)
            return lambda: run(dy, w)
        run = dense.fprop(*arguments, activation=LINEAR, shape=problem.output_shape)
        return lambda: run(x, w)


def pruned(w: tf.Tensor, density: float) -> sparse_conv.SparseKernel:
    """A kernel that keeps a random part of `w`."""
    with tf.device(w.device):
        mask = tf.random.uniform(w.shape) < density
        return sparse_conv.SparseKernel.from_dense(w, mask=mask)


def precision_of(dtype: str) -> str:
    """What TensorFlow computes a dtype in, on a GPU."""
    enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    return "tf32" if dtype == "float32" and enabled else dtype


def gpu_microseconds(call: Callable[[], tf.Tensor], calls: int = 40) -> float:
    """Median time that the GPU takes for a call, the host being ahead of it.

    The calls are enqueued while the GPU is busy with something else, so that what the
    host needs for them doesn't show.
    """
    busy = tf.random.normal((8192, 8192))

    def seconds(count: int) -> float:
        wait_for_devices()
        start = time.perf_counter()
        for _ in range(4):
            tf.matmul(busy, busy)
        for _ in range(count):
            call()
        wait_for_devices()
        return time.perf_counter() - start

    differences = [seconds(calls) - seconds(0) for _ in range(7)]
    return max(0.5, 1e6 * statistics.median(differences) / calls)


def python_function_microseconds(place: Place) -> float:
    """What our code costs more in a graph than eagerly, for each convolution."""
    with tf.device(place.device):
        x = tf.random.normal((1, 16, 16, 8))
        kernel = sparse_conv.SparseKernel.from_dense(tf.random.normal((3, 3, 8, 8)))

    def chain(x: tf.Tensor) -> tf.Tensor:
        for _ in range(8):
            x = sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm="generic")
        return x

    graph = tf.function(chain)
    empty = tf.function(lambda x: x + x)
    times = median_microseconds(
        {"eager": lambda: chain(x), "graph": lambda: graph(x), "no": lambda: empty(x)},
        lambda: None,
    )
    return max(0.0, (times["graph"] - times["no"] - times["eager"]) / 8)


def fit(samples: Sequence[Sample]) -> dict[str, float]:
    """The weights, none of them negative, with the least relative squared errors."""
    names = list(samples[0].terms)
    amounts = np.array([[one.terms[name] for name in names] for one in samples])
    amounts /= np.array([one.microseconds for one in samples])[:, np.newaxis]
    scale = np.maximum(np.linalg.norm(amounts, axis=0), 1e-30)
    gram = (amounts / scale).T @ (amounts / scale)
    target = (amounts / scale).sum(0)
    weights = np.zeros(len(names))
    # Coordinate descent: the problem is convex, and small.
    for _ in range(20_000):
        for i in range(len(names)):
            rest = target[i] - gram[i] @ weights + gram[i, i] * weights[i]
            weights[i] = max(0.0, rest / max(gram[i, i], 1e-30))
    return {
        name: float(f"{weight:.4g}")
        for name, weight in zip(names, weights / scale, strict=True)
    }


def predicted(one: Sample, models: dict[str, dict[str, float]]) -> float:
    """The time of a sample by its model."""
    weights = models[one.model]
    return sum(weights[name] * amount for name, amount in one.terms.items())


def print_errors(samples: Sequence[Sample], models: dict[str, dict]) -> None:
    """How far each model is from the times."""
    print(f"\n{'model':<24}{'samples':>8}{'median':>9}{'90 %':>8}{'worst':>8}  error")
    for model in sorted({one.model for one in samples}):
        own = [one for one in samples if one.model == model]
        ratios = [abs(np.log(predicted(one, models) / one.microseconds)) for one in own]
        cells = "".join(
            f"{100 * (np.exp(np.quantile(ratios, q)) - 1):>{width}.0f}%"
            for q, width in ((0.5, 8), (0.9, 7), (1.0, 7))
        )
        print(f"{model:<24}{len(own):>8}{cells}")


def print_losses(samples: Sequence[Sample], models: dict[str, dict], kind: str) -> None:
    """What the choice by the models loses against the faster algorithm."""
    dense_of = {one.subject[:2]: one for one in samples if one.subject[2] is None}
    sparse_of: dict[Any, list[Sample]] = {}
    for one in samples:
        if one.subject[2] is not None and one.subject[:2] in dense_of:
            sparse_of.setdefault(one.subject, []).append(one)
    losses = []
    for subject, several in sparse_of.items():
        theirs = dense_of[subject[:2]]
        ours = min(several, key=lambda one: predicted(one, models))
        takes_ours = predicted(ours, models) < favoured(predicted(theirs, models), kind)
        chosen = ours if takes_ours else theirs
        best = min(one.microseconds for one in (*several, theirs))
        losses.append((chosen.microseconds / best, ours, theirs))
    if not losses:
        return
    behind = [
        ours.microseconds / theirs.microseconds
        for loss, ours, theirs in losses
        if loss > 1.05 and ours.microseconds > theirs.microseconds
    ]
    mean = np.exp(np.mean([np.log(loss) for loss, *_ in losses]))
    wrong = sorted((one for one in losses if one[0] > 1.05), key=lambda one: -one[0])
    print(
        f"\nchosen by the models: {100 * (mean - 1):.1f} % slower than the fastest in "
        f"the mean; {len(wrong)} of {len(losses)} by more than 5 %, and in "
        f"{len(behind)} of them TensorFlow's is the faster, "
        f"{max(behind, default=1):.2f} times at most:"
    )
    for loss, ours, theirs in wrong[:12]:
        layer, name, density = ours.subject
        print(
            f"  {loss:.2f}  {name} {layer.problem}, density {density:g}: "
            f"ours {ours.microseconds:.0f} us (predicted {predicted(ours, models):.0f})"
            f", dense {theirs.microseconds:.0f} us ({predicted(theirs, models):.0f})"
        )


def dtype_factors(bench: Bench, models: dict[str, dict]) -> dict[str, dict[str, float]]:
    """How much slower than float32's model the other dtypes are, by algorithm."""
    few = [Layer(1, (56, 56), 3, 64, 64), Layer(1, (128, 128), 7, 3, 32)]
    algorithms = ("generic", "baked", "dense")
    factors: dict[str, dict[str, float]] = {name: {} for name in algorithms}
    for dtype in DTYPES:
        ratios: dict[str, list[float]] = {name: [] for name in algorithms}
        for layer in few:
            for one in bench.samples(layer, dtype, (0.1,)):
                if one.model in models:
                    ratio = one.microseconds / predicted(one, models)
                    ratios[one.model.split()[0]].append(np.log(ratio))
        for algorithm, logs in ratios.items():
            if logs:
                factors[algorithm][dtype] = float(f"{np.exp(np.mean(logs)):.3g}")
    return factors


def measure(bench: Bench, chosen: Sequence[Layer]) -> list[Sample]:
    """All samples of the layers, with a bar of progress."""
    on_gpu = bench.place.kind == "GPU"
    samples = []
    for layer in tqdm.tqdm(chosen, unit="layer"):
        samples += bench.samples(layer, "float32", DENSITIES)
        if not on_gpu:
            continue
        for dtype, tf32 in (("float32", False), *((d, True) for d in DTYPES)):
            tf.config.experimental.enable_tensor_float_32_execution(tf32)
            samples += [
                one for one in bench.samples(layer, dtype, ()) if one.subject[2] is None
            ]
        tf.config.experimental.enable_tensor_float_32_execution(True)
    return samples


def main() -> int:
    """Measures, fits, prints, and writes the file of numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="such as /CPU:0; the GPU if there is one")
    parser.add_argument("--output", type=Path, default=costs.FOLDER)
    arguments = parser.parse_args()
    on_gpu = bool(tf.config.list_logical_devices("GPU"))
    if arguments.device is not None:
        on_gpu = "GPU" in arguments.device
    bench = Bench(gpu_place(0) if on_gpu else HOST)
    samples = measure(bench, list(layers(on_gpu)))
    names = sorted({one.model for one in samples})
    models = {
        name: fit([one for one in samples if one.model == name]) for name in names
    }
    if on_gpu:
        # Generated code takes long to compile; its model, in clocks, is kept as it is.
        known = costs.numbers(bench.machine.kind)["models"]
        models |= {name: known[name] for name in known if name.startswith("baked ")}
    names_of = machine_names.gpu_names() if on_gpu else [machine_names.cpu_name()]
    result = {
        "measured": {
            "device": names_of[0],
            "units": bench.machine.units,
            "tensorflow": tf.__version__,
            "date": datetime.date.today().isoformat(),
        },
        "models": models,
        "dtypes": dtype_factors(bench, models),
        "python_function": round(python_function_microseconds(bench.place)),
    }
    print_errors(samples, models)
    print_losses(samples, models, bench.place.kind)
    path = arguments.output / f"{bench.machine.kind}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
