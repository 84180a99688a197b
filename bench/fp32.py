"""TensorFlow's convolution with TF32 off, in a process of its own.

TensorFlow tunes a convolution once for each shape, and keeps what it found under a key
that does not hold the setting of TF32. In one process, the setting that comes second
would run with what was tuned for the first. So a second process, in which TF32 is off
from the beginning, measures the float32 column by the same method, while the first one
waits.

The two talk in lines of JSON: a request {"kind": ..., "case": ...}, an entry of a row.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from bench import BenchError, machine, measure
from bench.cases import Case
from bench.measure import Bench
from bench.timing import Effort

_ROOT = Path(__file__).resolve().parent.parent
SIDE = "dense_fp32"
# Of a GPU's memory, beside what the first process takes.
_MEMORY_SHARE = 0.3


class Fp32Process:
    """The other process; it starts with the first request."""

    def __init__(self, kind: str, effort: Effort):
        """Keeps what the process is to do.

        Args:
            kind: "GPU"; "CPU" in tests.
            effort: How long it samples.
        """
        self._words = json.dumps({"device": kind, "effort": asdict(effort)})
        self._process: subprocess.Popen | None = None
        self._entries: dict[tuple[str, Case], dict[str, Any]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="sparse_conv_bench_")
        self._log = Path(self._folder.name, "log")

    def entry(self, kind: str, case: Case) -> dict[str, Any]:
        """The entry of a row for TensorFlow with TF32 off.

        Zeros are nothing to a dense convolution: the entry of another density serves.

        Args:
            kind: "convolution" or "training".
            case: The convolution.

        Returns:
            What `measure.fill_row` puts into a row, and "of", the case it was
            measured on.

        Raises:
            BenchError: The process failed.
        """
        shape = (kind, replace(case, group="", position="", density=0.0))
        if shape not in self._entries:
            entry = self._ask({"kind": kind, "case": asdict(case)})
            self._entries[shape] = {**entry, "of": str(case)}
        return self._entries[shape]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            # A process that failed has not read its last request.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            log = self._log.read_text(errors="replace")
            raise BenchError(f"the float32 process failed:\n{log[-2000:]}")
        return json.loads(line)

    def _start(self) -> subprocess.Popen:
        with self._log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bench.fp32", self._words],
                cwd=_ROOT,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )


def _serve(words: dict[str, Any]) -> None:
    """Answers the requests that come in, until there are no more."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    kind = machine.choose_device(words["device"].lower(), None, _MEMORY_SHARE)
    target = machine.find_target(kind)
    bench = Bench(target, machine.gate_of(target), Effort(**words["effort"]), "dense")
    for line in sys.stdin:
        request = json.loads(line)
        with tf.device(target.place.device):
            entry = _entry(request["kind"], Case(**request["case"]), bench)
        print(json.dumps(entry, allow_nan=False), flush=True)


def _entry(kind: str, case: Case, bench: Bench) -> dict[str, Any]:
    if kind == "training":
        from bench import training

        return training.dense_entry(case, bench)
    return measure.dense_entry(case, bench)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
