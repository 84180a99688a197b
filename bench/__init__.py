"""Measurements: each module is a command, `python -m bench.<name>`."""
