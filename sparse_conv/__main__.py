"""`python -m sparse_conv`: reads the command line and runs one subcommand.

Knows the options. What a subcommand does is in its module of `sparse_conv._cli`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import sparse_conv
from sparse_conv._cli import CommandError, cache, demo, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after the program's name; None means `sys.argv`'s.

    Returns:
        The exit status: 0, or 1 where the job could not be done.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_conv",
        description="Convolution with sparse kernels for TensorFlow.",
    )
    parser.add_argument(
        "--version", action="version", version=f"sparse_conv {sparse_conv.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    command = commands.add_parser(
        "info", help="print versions, devices, back ends and caches"
    )
    command.set_defaults(run=lambda options: info.run())
    command = commands.add_parser(
        "clear-cache", help="remove the code that this package compiled"
    )
    command.set_defaults(run=lambda options: cache.run())
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "demo",
        help="filter a photograph, sparse and dense, and draw the feature maps",
        description="Convolves a photograph with 64 pruned filters, by this package "
        "and by tf.nn.conv2d, compares results and times, draws the feature maps.",
    )
    command.add_argument(
        "--image", type=Path, help="a JPEG, PNG, GIF or BMP (default: a cat)"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("sparse_conv_demo.png"),
        help="where the PNG goes (default: %(default)s)",
    )
    command.add_argument(
        "--density",
        type=_density,
        default=0.1,
        help="the part of the weights that is kept (default: %(default)s)",
    )
    command.set_defaults(
        run=lambda options: demo.run(options.image, options.output, options.density)
    )


def _density(text: str) -> float:
    try:
        density = float(text)
    except ValueError:
        density = float("nan")
    if not 0 < density <= 1:
        raise argparse.ArgumentTypeError(
            f"the density must be above 0 and at most 1. Received: {text}"
        )
    return density


if __name__ == "__main__":
    sys.exit(main())
