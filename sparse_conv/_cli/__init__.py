"""The subcommands of `python -m sparse_conv`, one module each, and what they share."""

from __future__ import annotations


class CommandError(Exception):
    """What the user is told when a command can't do its job; no traceback is shown."""
