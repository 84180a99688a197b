"""Runs a Launch on the CPU: CUDA's execution model for machines without a GPU.

Knows how CUDA runs blocks, threads, barriers and warps, and checks every access. Knows
nothing of convolutions.
"""

from tests.emulator.build import EmulationError, build_functions
from tests.emulator.driver import ORDERS, Task, run, run_tasks

__all__ = [
    "ORDERS",
    "EmulationError",
    "Task",
    "build_functions",
    "run",
    "run_tasks",
]
