"""Configurations of generated code, made to fit a problem.

Needs no TensorFlow, so that it serves on machines that have none.
"""

from __future__ import annotations

import dataclasses
import math

from sparse_conv.baked import BakedConfig
from sparse_conv.gather import Gather


def fitted(config: BakedConfig, gather: Gather) -> BakedConfig:
    """A configuration with no more outputs, teams and channels than there are.

    Nor has it more splits than can have equal shares of them.
    """
    group_in = gather.in_channels // gather.groups
    group_out = gather.out_channels // gather.groups
    outputs = min(config.outputs, group_out)
    chunk = min(config.chunk, group_in)
    if config.splits > 1:
        chunk = math.gcd(chunk, group_in)
    return dataclasses.replace(
        config,
        outputs=outputs,
        chunk=chunk,
        teams=math.gcd(config.teams, -(-group_out // outputs)),
        splits=math.gcd(config.splits, outputs, -(-group_in // chunk)),
    )
