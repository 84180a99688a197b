"""The results of a command as a JSON file that grows with each row.

    {"schema": 1, "command": "figures", "settings": {...}, "machine": {...},
     "rows": [{"key": ..., ...}, ...]}

The file is complete after each row, so that a run that is cut off keeps what it has.
Knows nothing of what a row holds beside its key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import BenchError

SCHEMA = 1
# Of the machine's description, what has to be the same for a run to go on.
_SAME = ("name", "gpu", "threads", "versions", "commit")
# What it can do at best, of which a disturbed measurement sees less.
_BEST = ("bandwidth_bytes_per_s", "peak_fmas_per_s")


class Results:
    """What a command has measured so far, in memory and on disk."""

    def __init__(self, path: Path, document: dict[str, Any]):
        """Joins a file and its contents; made by `begin` and `load`."""
        self.path = path
        self.document = document

    @classmethod
    def begin(
        cls,
        path: Path,
        command: str,
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
        *,
        resume: bool,
    ) -> Results:
        """New results, or those of a run that goes on.

        Args:
            path: The JSON file.
            command: Name of the command.
            settings: The options that decide what a row says.
            machine: `machine.describe`.
            resume: Whether to keep the rows that the file has.

        Returns:
            The results.

        Raises:
            BenchError: The file's rows were measured otherwise.
        """
        document = {
            "schema": SCHEMA,
            "command": command,
            "settings": dict(settings),
            "machine": dict(machine),
            "rows": [],
        }
        if resume and path.exists():
            before = load(path).document
            _check_same(path, before, document)
            document["rows"] = before["rows"]
            for name in _BEST:
                best = max(before["machine"][name], machine[name])
                document["machine"][name] = best
        return cls(path, document)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        return self.document["rows"]

    def has(self, key: str) -> bool:
        """Whether there is a row of that key."""
        return any(row["key"] == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Writes the file anew; a reader sees the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        text = json.dumps(self.document, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def load(path: Path) -> Results:
    """The results in a file.

    Raises:
        BenchError: It can't be read, or is not a file of results.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"results can't be read: {error}. Received: {path}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise BenchError(f"results must have the schema {SCHEMA}. Received: {path}")
    return Results(path, document)


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = [
        name for name in ("command", "settings") if before[name] != now[name]
    ]
    differences += [
        name for name in _SAME if before["machine"].get(name) != now["machine"][name]
    ]
    if differences:
        raise BenchError(
            f"--resume goes on with rows that were measured alike; these differ in "
            f"{', '.join(differences)}. Received: {path}"
        )
