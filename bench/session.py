"""One run of a command: its device, its options, and the loop over what it measures.

Knows the progress bar, the budget and where results go. Does not know what a row is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tensorflow as tf
from tqdm import tqdm

from bench import machine
from bench.fp32 import Fp32Process
from bench.machine import Target
from bench.measure import Bench, Report, Row
from bench.results import Results
from bench.timing import Effort

RESULTS = Path(__file__).resolve().parent / "results"
# Seconds for each contender and each kind of time.
_SECONDS = {"GPU": 0.15, "CPU": 0.5}
_QUICK = 0.1
# How often times that are spread widely are taken; once where time is short.
_TRIES = 3

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line.

    Attributes:
        out: The folder of the results; None for one named after the machine.
        device: "cpu", "gpu", or None for the GPU if there is one.
        quick: Few samples of few points, to see that all works.
        only: Measures only what this regular expression finds something in.
        threads: Threads of both sides on a CPU.
        algorithm: The algorithm of ours.
        measured_choice: Whether ours is chosen by times that `prepare` measures.
        dtypes: Of the layers.
        budget: Seconds after which no new row is begun.
        resume: Whether to keep rows that are there.
        plots: Whether to draw; without, Matplotlib is not needed.
        commit: What the results call the checkout; None to ask git.
    """

    out: Path | None = None
    device: str | None = None
    quick: bool = False
    only: str | None = None
    threads: int | None = None
    algorithm: str = "auto"
    measured_choice: bool = False
    dtypes: tuple[str, ...] = ("float32",)
    budget: float | None = None
    resume: bool = False
    plots: bool = True
    commit: str | None = None


@dataclass(slots=True)
class Session:
    """What the commands of one process share.

    Attributes:
        options: The command line.
        target: The device.
        machine: Its description.
        bench: What rows share.
        out: The folder of the results.
        fp32: The process in which TF32 is off; None on a CPU.
        begun: When the budget began to run.
    """

    options: Options
    target: Target
    machine: dict[str, Any]
    bench: Bench
    out: Path
    fp32: Fp32Process | None
    begun: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, options: Options) -> Session:
        """Chooses the device and measures how fast it can be.

        Raises:
            BenchError: The device asked for can't be used.
            GateError: The GPU's driver can't tell device times.
        """
        begun = time.monotonic()
        kind = machine.choose_device(options.device, options.threads)
        target = machine.find_target(kind)
        described = machine.describe(target, options.commit)
        gate = machine.gate_of(target)
        seconds = _SECONDS[kind] * (_QUICK if options.quick else 1)
        hurried = options.quick or options.budget is not None
        fewest, tries = 2 if options.quick else 3, 1 if hurried else _TRIES
        effort = Effort(seconds, fewest, tries=tries)
        out = options.out or RESULTS / machine.slug(described)
        fp32 = Fp32Process(kind, effort) if target.on_gpu else None
        bench = Bench(
            target,
            gate,
            effort,
            options.algorithm,
            options.measured_choice,
            None if fp32 is None else fp32.entry,
        )
        return cls(options, target, described, bench, out, fp32, begun)

    def close(self) -> None:
        """Ends the other process, if there is one."""
        if self.fp32 is not None:
            self.fp32.close()

    def results(self, command: str, part: str = "") -> Results:
        """The results of a command, or of a part of it, begun or gone on with."""
        options = self.options
        settings = {
            "quick": options.quick,
            "algorithm": options.algorithm,
            "measured_choice": options.measured_choice,
            "seconds_per_contender": self.bench.effort.seconds,
            "tf32_default": self.machine["tf32_default"],
        }
        path = self.out / f"{command}{part}.json"
        return Results.begin(
            path, command, settings, self.machine, resume=options.resume
        )

    def wanted(self, items: Iterable[_Item]) -> list[_Item]:
        """Those items in whose names `--only` finds something."""
        only = self.options.only
        return [item for item in items if only is None or re.search(only, str(item))]

    def over_budget(self) -> bool:
        """Whether the budget is spent."""
        budget = self.options.budget
        return budget is not None and time.monotonic() - self.begun > budget

    def fill(
        self,
        results: Results,
        items: Iterable[_Item],
        measure: Callable[[_Item, Report], Row],
    ) -> None:
        """Measures the items that have no row yet, and adds their rows.

        Args:
            results: Where the rows go.
            items: What to measure; `str` of each is its key.
            measure: Makes the row of an item.
        """
        missing = [item for item in self.wanted(items) if not results.has(str(item))]
        results.write()
        with tqdm(missing, unit="row", dynamic_ncols=True) as bar:
            for number, item in enumerate(bar):
                if self.over_budget():
                    bar.write(
                        f"the budget of {self.options.budget:g} s is spent, "
                        f"{len(missing) - number} rows are missing; --resume goes on"
                    )
                    return
                bar.set_description(str(item))
                with tf.device(self.target.place.device):
                    row = measure(item, lambda step: bar.set_postfix_str(step))
                results.add(row)
