"""Measurements: `python -m bench <command>`; the commands are in `__main__`.

Not installed with the package.
"""

from __future__ import annotations


class BenchError(Exception):
    """What the user is told when a command can't do its job; no traceback is shown."""
