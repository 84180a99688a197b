"""What a pass costs on a kind of machine: Estimate, and the numbers behind it.

A cost is a sum of a few terms, each a quantity that follows from the problem (so many
products, so many bytes) times a number that was measured. The numbers of one kind of
machine are in `<kind>.json` beside this file, where `python -m bench.calibrate` writes
them. Knows neither TensorFlow nor any back end.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is expected of one algorithm for one pass.

    Attributes:
        algorithm: "generic", "baked" or "dense".
        microseconds: The predicted time; None where the algorithm can't compute it.
        reason: Why it can't, or what the prediction is made of.
    """

    algorithm: str
    microseconds: float | None
    reason: str


class Machine(NamedTuple):
    """What a cost depends on besides the problem.

    Attributes:
        kind: Name of the file of numbers, such as "cpu-avx512" or "cuda-sm90".
        units: What the work is divided among: threads, or multiprocessors.
        lanes: float32 numbers that a unit takes at a time.
    """

    kind: str
    units: int
    lanes: int


@functools.cache
def numbers(kind: str) -> Mapping[str, Any]:
    """The measured numbers of a kind of machine, or of the most similar one measured.

    Args:
        kind: As in `Machine`; what stands before its dash is never another's.

    Returns:
        The contents of the file, see `bench/calibrate.py`.
    """
    path = FOLDER / f"{kind}.json"
    if not path.is_file():
        path = FOLDER / f"{_DEFAULTS[kind.partition('-')[0]]}.json"
    return json.loads(path.read_text(encoding="utf-8"))


# For machines that nobody measured.
_DEFAULTS = {"cpu": "cpu-avx2", "cuda": "cuda-sm90"}


def is_measured(kind: str) -> bool:
    """Whether there are numbers of this very kind of machine."""
    return (FOLDER / f"{kind}.json").is_file()


def has_model(machine: Machine, model: str) -> bool:
    """Whether a model was fitted for that kind of machine."""
    return model in numbers(machine.kind)["models"]


def microseconds(machine: Machine, model: str, terms: Mapping[str, float]) -> float:
    """The cost of `terms` by one model of the machine's numbers."""
    weights = numbers(machine.kind)["models"][model]
    return sum(weights[name] * amount for name, amount in terms.items())


def dtype_factor(machine: Machine, algorithm: str, dtype: str) -> float:
    """By how much an algorithm is slower in `dtype` than in float32."""
    return numbers(machine.kind)["dtypes"][algorithm].get(dtype, 1.0)


def traced_microseconds(machine: Machine) -> float:
    """What a Python function in a graph costs, beyond one of TensorFlow's operations.

    Only an algorithm that is no operation of TensorFlow's pays it.
    """
    return numbers(machine.kind)["python_function"]
