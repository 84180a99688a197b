"""`startup`: from a new process to the first result, and to the prepared kernel.

Each point of the figures at density 0.1 is computed by two new processes with caches of
their own (CUPY_CACHE_DIR, SPARSE_CONV_CACHE_DIR): the first finds them empty, the
second what the first compiled. Importing TensorFlow and starting the device are not
counted; TensorFlow's own first convolution is timed beside.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tensorflow as tf

import sparse_conv
from bench import BenchError, cases, machine, ours
from bench.cases import Case
from bench.measure import Report, Row
from bench.results import Results
from bench.session import Session
from sparse_conv.streams import wait_for_devices

TEMPERATURES = ("cold", "warm")
_ROOT = Path(__file__).resolve().parent.parent


def run(session: Session) -> Results:
    """Measures the starts."""
    points = [
        case
        for case in cases.figure_cases(on_gpu=session.target.on_gpu)
        if case.density == 0.1
    ]
    if session.options.quick:
        points = [point for point in points if point.h <= 32]
    results = session.results("startup")
    session.fill(results, points, lambda case, tell: _row(case, session, tell))
    return results


def _row(case: Case, session: Session, tell: Report) -> Row:
    row = {"key": str(case), "case": asdict(case), "shape": case.shape_text}
    with tempfile.TemporaryDirectory(prefix="sparse_conv_bench_") as folder:
        for temperature in TEMPERATURES:
            tell(temperature)
            row[temperature] = _probe_in_new_process(case, session, folder)
    return row


def _probe_in_new_process(case: Case, session: Session, folder: str) -> dict[str, Any]:
    request = {
        "case": asdict(case),
        "device": session.target.kind,
        "threads": session.options.threads,
        "algorithm": session.options.algorithm,
    }
    environment = {
        **os.environ,
        "CUPY_CACHE_DIR": str(Path(folder, "cupy")),
        "SPARSE_CONV_CACHE_DIR": str(Path(folder, "sparse_conv")),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # TensorFlow would take the whole GPU, which the parent is using, too.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.startup", json.dumps(request)],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BenchError(f"a new process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def probe(request: dict[str, Any]) -> dict[str, float | str]:
    """Computes one case in this process, which has computed nothing before.

    Args:
        request: What `_probe_in_new_process` asks for.

    Returns:
        Seconds of TensorFlow's first convolution; seconds from the dense kernel to our
        first result, and to the first one behind `prepare`; and the algorithm it takes.
    """
    case = Case(**request["case"])
    if request["threads"] is not None:
        machine.set_threads(request["threads"])
    with tf.device(f"/{request['device']}:0"):
        x, dense = tf.constant(case.input()), tf.constant(case.kernel())
        _clocked(lambda: tf.square(x))
        theirs, _ = _clocked(lambda: tf.nn.conv2d(x, dense, 1, "SAME"))
        begin = time.perf_counter()
        kernel = sparse_conv.SparseKernel.from_dense(dense)
        asked = request["algorithm"]
        _clocked(lambda: sparse_conv.conv2d(x, kernel, 1, "SAME", algorithm=asked))
        first = time.perf_counter() - begin
        prepared = ours.prepare_kernel(kernel, x, asked)
        _clocked(lambda: prepared(x))
        ready = time.perf_counter() - begin
    return {
        "dense_s": theirs,
        "first_s": first,
        "prepared_s": ready,
        "algorithm": prepared.chosen,
    }


def _clocked(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    begin = time.perf_counter()
    result = call()
    wait_for_devices()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    print(json.dumps(probe(json.loads(sys.argv[1]))))
