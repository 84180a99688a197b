"""The device that is measured: chosen, named, and how fast it can be at all.

Bandwidth and peak are measured, not read from a data sheet, on the device itself:
- bandwidth: large arrays are negated, which reads and writes them once; on a CPU by
  NumPy in all threads, into memory that is there already;
- peak: on a GPU, chains of FMAs in registers (`gpu.cu`); on a CPU, TensorFlow's product
  of two large float32 matrices, the fastest arithmetic that is at hand there.

Knows where names and versions are found. Knows nothing of convolutions.
"""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import sparse_conv
from bench import BenchError
from bench.gate import Gate, clocked_us
from bench.gpu_code import Step
from sparse_conv import backends, bridge
from sparse_conv._cli.machine import cpu_name, gpu_names, installed_version
from sparse_conv.backends import cpu_threads
from sparse_conv.bridge import Place
from sparse_conv.launch import Launch, pack_words
from sparse_conv.streams import wait_for_devices

_ROOT = Path(__file__).resolve().parent.parent
_BANDWIDTH_BYTES = 1 << 28
_MATRIX = 2048
_CHAINS = 8
_PEAK_ROUNDS = 20_000
_PACKAGES = {
    "tensorflow": ("tensorflow",),
    "numpy": ("numpy",),
    "numba": ("numba",),
    "cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """The device that computes.

    Attributes:
        kind: "GPU" or "CPU".
        place: The device, as the package knows it.
        cache_bytes: Size of its last cache: L2 of a GPU, L3 of a CPU.
    """

    kind: str
    place: Place
    cache_bytes: int

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "GPU"


def choose_device(
    device: str | None, threads: int | None, memory_share: float = 0.5
) -> str:
    """Applies the options before TensorFlow has started.

    Args:
        device: "cpu", "gpu", or None for the GPU if there is a usable one.
        threads: Threads of both sides on a CPU; None means their defaults.
        memory_share: The part of a GPU's memory that TensorFlow takes; `startup` and
            `fp32` run other processes on the same GPU.

    Returns:
        "CPU" or "GPU".

    Raises:
        BenchError: A GPU is asked for, and there is no usable one.
    """
    reason = dict(backends.statuses())["cuda"]
    if device == "gpu" and reason is not None:
        raise BenchError(f"--device gpu needs a GPU: {reason}")
    if threads is not None:
        set_threads(threads)
    if device == "cpu" or reason is not None:
        tf.config.set_visible_devices([], "GPU")
        return "CPU"
    for ordinal, gpu in enumerate(tf.config.list_physical_devices("GPU")):
        # All of it at the start, as TensorFlow does by default. Memory that grows is
        # given back and asked for again around every large convolution, which costs
        # TensorFlow's calls milliseconds.
        mebibytes = _gpu_memory(ordinal) * memory_share // 2**20
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=mebibytes)
        tf.config.set_logical_device_configuration(gpu, [limit])
    return "GPU"


def set_threads(threads: int) -> None:
    """Limits both sides to so many threads; before TensorFlow has started."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    cpu_threads.set_thread_limit(threads)


def find_target(kind: str) -> Target:
    """The first device of that kind."""
    with tf.device(f"/{kind}:0"):
        place = bridge.place_of(tf.constant(0.0))
    if kind == "GPU":
        cache_bytes = _gpu_attributes(bridge.ordinal_of(place))["L2CacheSize"]
    else:
        cache_bytes = _last_cache_bytes()
    return Target(kind, place, cache_bytes)


def gate_of(target: Target) -> Gate | None:
    """The device's gate; None on a CPU."""
    return Gate(target.place, target.cache_bytes) if target.on_gpu else None


def describe(target: Target, commit: str | None) -> dict[str, Any]:
    """Everything about the machine that the results keep, with what it measures.

    Args:
        target: The device.
        commit: The checkout's commit; None to ask git.

    Returns:
        The description, ready for JSON.
    """
    with tf.device(target.place.device):
        if target.on_gpu:
            bandwidth = _gpu_bandwidth()
            peak = _gpu_peak(bridge.ordinal_of(target.place))
        else:
            bandwidth, peak = _cpu_bandwidth(), _matrix_rate()
    return {
        "device": target.kind,
        "name": gpu_names()[0] if target.on_gpu else _cpu_name(),
        "cpu": _cpu_name(),
        "gpu": _gpu_details(target.place) if target.on_gpu else None,
        "cache_bytes": target.cache_bytes,
        "bandwidth_bytes_per_s": bandwidth,
        "bandwidth_source": "measured: 256 MiB of float32 are negated",
        "peak_fmas_per_s": peak,
        "peak_source": (
            "measured: chains of FMAs in registers"
            if target.on_gpu
            else "measured: TensorFlow's product of two float32 matrices"
        ),
        "threads": cpu_threads.thread_count(),
        "tf32_default": tf.config.experimental.tensor_float_32_execution_enabled(),
        "versions": _versions(),
        "commit": commit or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine's name as the name of a folder."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    return re.sub(r"-(processor|with|cpu)(?=-|$)", "", name)


def caption(machine: dict[str, Any]) -> str:
    """Hardware and versions on one line, for tables and plots."""
    versions = machine["versions"]
    parts = [machine["name"]]
    if machine["gpu"] is not None:
        parts.append(f"driver {machine['gpu']['driver']}")
    else:
        parts.append(f"{machine['threads']} threads")
    parts += [
        f"TensorFlow {versions['tensorflow']}",
        f"CuPy {versions['cupy']}" if machine["gpu"] else f"Numba {versions['numba']}",
        f"NumPy {versions['numpy']}",
        f"sparse_conv {versions['sparse_conv']} {machine['commit'] or ''}".strip(),
        machine["date"][:10],
    ]
    return ", ".join(parts)


def _cpu_name() -> str:
    """The processor's name with what tells two of one name apart."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if flags.is_file() else ""
    for feature, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")):
        if re.search(rf"\b{feature}\b", text):
            return f"{cpu_name()}, {name}"
    return cpu_name()


def _versions() -> dict[str, str | None]:
    versions = {name: installed_version(*names) for name, names in _PACKAGES.items()}
    return {
        "sparse_conv": sparse_conv.__version__,
        "python": platform.python_version(),
        **versions,
    }


def _commit() -> str | None:
    """The commit of the checkout, "+" behind it if files differ; None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _gpu_memory(ordinal: int) -> int:
    import cupy

    return cupy.cuda.Device(ordinal).mem_info[1]


def _gpu_attributes(ordinal: int) -> dict[str, int]:
    import cupy

    return cupy.cuda.Device(ordinal).attributes


def _gpu_details(place: Place) -> dict[str, Any]:
    import cupy

    ordinal = bridge.ordinal_of(place)
    attributes = _gpu_attributes(ordinal)
    return {
        "compute_capability": cupy.cuda.Device(ordinal).compute_capability,
        "multiprocessors": attributes["MultiProcessorCount"],
        "clock_khz": attributes["ClockRate"],
        "driver": _driver_release(),
        "driver_cuda": cupy.cuda.runtime.driverGetVersion(),
        "runtime_cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "tensorflow_cuda": tf.sysconfig.get_build_info().get("cuda_version"),
    }


def _driver_release() -> str:
    """The driver's number, such as 580.95.05."""
    file = Path("/proc/driver/nvidia/version")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "unknown"


def _last_cache_bytes() -> int:
    """Size of the largest cache of the first core."""
    sizes = [1 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes)


def _gpu_bandwidth() -> float:
    x = tf.zeros((_BANDWIDTH_BYTES // tf.float32.size,))
    # Several at once, so that the host's part hides behind the device's.
    calls = 5
    seconds = _shortest_s(lambda: [tf.negative(x) for _ in range(calls)])
    return 2 * _BANDWIDTH_BYTES * calls / seconds


def _cpu_bandwidth() -> float:
    threads = cpu_threads.thread_count()
    read = np.ones((threads, _BANDWIDTH_BYTES // 4 // threads), np.float32)
    write = np.ones_like(read)

    def negate(number: int) -> None:
        np.negative(read[number], out=write[number])

    with ThreadPoolExecutor(threads) as pool:
        shortest_s = _shortest_s(lambda: list(pool.map(negate, range(threads))))
    return 2 * read.nbytes / shortest_s


def _matrix_rate() -> float:
    a = tf.random.normal((_MATRIX, _MATRIX))
    return _MATRIX**3 / _shortest_s(lambda: tf.matmul(a, a))


def _shortest_s(call: Callable[[], object]) -> float:
    """The shortest time of a call, in a second's worth of them and at least five."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1:
        wait_for_devices()
        begin = time.perf_counter()
        result = call()
        wait_for_devices()
        times.append(time.perf_counter() - begin)
        del result
    return min(times)


def _gpu_peak(ordinal: int) -> float:
    blocks = 8 * _gpu_attributes(ordinal)["MultiProcessorCount"]
    threads = 256
    constants = pack_words([_PEAK_ROUNDS], [])
    grid, block = (blocks, 1, 1), (threads, 1, 1)
    launch = Launch("bench_peak", (), grid, block, 0, ("out",), constants)
    step = Step("gpu", launch, ordinal)
    out = bridge.memory_of(tf.zeros((blocks * threads,)))
    shortest_us = clocked_us(lambda s: step.run({"out": out}, s), ordinal, 5)
    return blocks * threads * _CHAINS * _PEAK_ROUNDS / (shortest_us * 1e-6)
