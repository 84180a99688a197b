"""`python -m bench`: reads the command line and runs one command, or all.

Knows the options. What a command does is in its module.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.session import Session

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from bench import BenchError

COMMANDS = {
    "figures": "the original operator's five figures",
    "layers": "layers of ResNet-50, MobileNet and VGG-16",
    "crossover": "the density at which dense takes over, for each shape",
    "overhead": "what a call costs the host",
    "accuracy": "errors relative to float64 on the figures",
    "training": "a step, forward and both gradients",
    "startup": "time to the first result in a new process",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after the program's name; None means `sys.argv`'s.

    Returns:
        The exit status: 0, 1 where the job could not be done, or where `accuracy` finds
        a point on which ours is less exact than TensorFlow.
    """
    options = _parser().parse_args(arguments)
    needed = ("tqdm", "matplotlib") if options.plots else ("tqdm",)
    missing = [module for module in needed if not importlib.util.find_spec(module)]
    if missing:
        print(
            f"error: {' and '.join(missing)} must be installed: pip install '.[bench]'",
            file=sys.stderr,
        )
        return 1
    try:
        return options.run(options)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures sparse_conv beside tf.nn.conv2d and the original "
        "operator's method. Writes JSON, a table and plots.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in {**COMMANDS, "all": "all of them, one after the other"}.items():
        command = commands.add_parser(name, help=text, description=text)
        _add_options(command)
        names = tuple(COMMANDS) if name == "all" else (name,)
        command.set_defaults(run=lambda options, names=names: _measure(options, names))
    command = commands.add_parser(
        "plot", help="draw the table and the plots of results again"
    )
    command.add_argument("results", type=Path, nargs="+", help="JSON files of results")
    command.set_defaults(run=_plot, plots=True)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", type=Path, help="folder (default: bench/results/<machine>)")
    add("--device", choices=("cpu", "gpu"), help="default: a GPU if there is one")
    add("--quick", action="store_true", help="few samples of few points")
    add("--only", type=_regex, metavar="REGEX", help="only rows in whose names it is")
    add("--threads", type=_positive, metavar="N", help="threads of both sides on a CPU")
    add(
        "--algorithm",
        choices=("auto", "generic", "baked", "dense"),
        default="auto",
        help="of ours (default: %(default)s)",
    )
    add(
        "--measured-choice",
        action="store_true",
        help="let prepare measure which algorithm is the fastest",
    )
    add(
        "--dtype",
        action="append",
        choices=("float32", "float16", "bfloat16"),
        help="of figures, or of layers, where it may be given again (default: float32)",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no row after so long; --resume goes on",
    )
    add("--resume", action="store_true", help="keep the rows that were measured before")
    add(
        "--no-plots",
        dest="plots",
        action="store_false",
        help="draw nothing; `plot` does it later, on any machine",
    )
    add("--commit", help="what to call the checkout where there is no git")


def _measure(options: argparse.Namespace, names: Sequence[str]) -> int:
    from bench.session import Options, Session

    session = Session.begin(
        Options(
            out=options.out,
            device=options.device,
            quick=options.quick,
            only=options.only,
            threads=options.threads,
            algorithm=options.algorithm,
            measured_choice=options.measured_choice,
            dtypes=tuple(dict.fromkeys(options.dtype or ["float32"])),
            budget=options.budget,
            resume=options.resume,
            plots=options.plots,
            commit=options.commit,
        )
    )
    try:
        return _run(session, names)
    finally:
        session.close()


def _run(session: Session, names: Sequence[str]) -> int:
    from bench import report

    status = 0
    for name in names:
        results = importlib.import_module(f"bench.{name}").run(session)
        report.publish(results, draw=session.options.plots)
        if name == "accuracy":
            status = int(any(row["ours"] > row["dense"] for row in results.rows))
    return status


def _plot(options: argparse.Namespace) -> int:
    from bench import report, results

    for path in options.results:
        report.publish(results.load(path), draw=True)
    return 0


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"--only must be a regular expression: {error}. Received: {text}"
        ) from error
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"--threads must be a number of at least 1. Received: {text}"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
