"""The checks of the GPU's functions notice small mistakes in their text.

Each mutation changes one place of the real text; then results differ from the
definition, or the emulator reports an error. A mutation that nothing notices fails
here, as does one whose place can't be found in the text any more.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from sparse_conv import jit
from sparse_conv.activations import get as get_activation
from sparse_conv.baked import BakedConfig
from sparse_conv.gather import Gather, dgrad_gather, fprop_gather
from sparse_conv.plan import Direct, TileConfig, WgradConfig
from sparse_conv.spmm import SpmmConfig, make_spmm_block, place_rows
from tests.baked_configs import fitted
from tests.baked_passes import (
    baked_dgrad_calls,
    baked_fprop_calls,
    run_baked,
    tight_gpu,
)
from tests.emulated_passes import (
    LITTLE_GPU,
    Call,
    assert_rows,
    compress_call,
    dgrad_call,
    fprop_call,
    run_calls,
    run_wgrads,
    wgrad_calls,
)
from tests.emulator import EmulationError
from tests.problems import make, make_data, make_pattern
from tests.reference import conv2d_reference, dgrad_reference, wgrad_reference
from tests.spmm_passes import (
    entries_of,
    place_call,
    spmm_call,
    spmm_dgrad_call,
    spmm_fprop_call,
)
from tests.tolerance import assert_exact


def function_of(check: str) -> str:
    """The function that a check is for."""
    return check.split()[0]


@dataclass(frozen=True)
class Mutation:
    """A mistake in one place.

    Attributes:
        check: The check that has to notice it. The text, with its includes, is that of
            the function that is checked.
        find: What stands there, a regular expression. Each match is one mutation.
        replace: What stands there afterwards.
    """

    check: str
    find: str
    replace: str

    def __str__(self) -> str:
        return f"{self.check}-{self.find}->{self.replace or 'nothing'}"

    @property
    def function(self) -> str:
        """The function that is checked."""
        return function_of(self.check)

    def places(self) -> int:
        """In how many places of the text the mistake can be made."""
        return len(re.findall(self.find, jit.source(self.function)))

    def apply(self, number: int) -> str:
        """The text with the mistake made in place `number`."""
        text = jit.source(self.function)
        matches = list(re.finditer(self.find, text))
        assert matches, (
            f"{self.find!r} must match in {self.function}: adapt the mutation to the "
            "new text"
        )
        begin, end = matches[number].span()
        return text[:begin] + self.replace + text[end:]


# Several images, tails along every dimension, groups, and more phases than one.
NHWC = make((3, 9, 11, 6), (3, 3, 3, 10), (2, 1), "SAME")
NCHW = make((2, 11, 10, 6), (3, 2, 3, 10), (1, 2), "VALID", (2, 3), "NCHW")
# Channels in fours, which are stored together.
FOURS = make((2, 5, 7, 6), (3, 3, 3, 24), 1, "VALID")
# Several warps each way, fewer rows in a warp than compiled, tails, several chunks.
WIDE_TILE = TileConfig(
    positions=1,
    rows=8,
    warp_rows=2,
    row_warps=2,
    position_warps=2,
    tile_h=4,
    tile_w=11,
    chunk=2,
)
# So small that some tiles need no padding.
SMALL_TILE = replace(WIDE_TILE, tile_h=3, tile_w=5)
# Whole fours of rows, and a tile that serves several of them in turn.
FOURS_TILE = replace(WIDE_TILE, positions=4, rows=4, warp_rows=4, passes=2)
# The gradient's tile ends behind its pixels, and several subtiles come in turn.
WGRAD_TILE = WgradConfig(
    positions=4, warps=2, warp_rows=2, tile_h=3, tile_w=5, chunk=2, splits=2
)


def for_gather(config: TileConfig | Direct, gather: Gather) -> TileConfig | Direct:
    """The configuration; one with several passes gets all channels into its tile."""
    if isinstance(config, Direct) or config.passes == 1:
        return config
    return replace(config, chunk=gather.in_channels // gather.groups)


def check_gather(*configs: TileConfig | Direct) -> Callable[[str], None]:
    def check(text: str) -> None:
        calls, expected = [], []
        for problem, config in itertools.product((NHWC, NCHW, FOURS), configs):
            data = make_data(problem, "float32", 0.8, whole=True)
            config = for_gather(config, fprop_gather(problem))
            calls.append(fprop_call(problem, data, "float32", config=config, bias=True))
            bias = data.bias if problem is not NCHW else data.bias[:, None, None]
            expected.append(conv2d_reference(data.x, data.dense, problem) + bias)
            config = for_gather(config, dgrad_gather(problem))
            calls.append(dgrad_call(problem, data, "float32", config=config))
            expected.append(dgrad_reference(data.dy, data.dense, problem))
        for result, exact in zip(run_calls(calls, text), expected, strict=True):
            assert_exact(result["write"], exact, "gather")

    return check


def check_wgrad(config: WgradConfig | Direct) -> Callable[[str], None]:
    def check(text: str) -> None:
        pairs, expected = [], []
        for problem, dense in ((NHWC, False), (NCHW, False), (NHWC, True)):
            data = make_data(problem, "float32", 0.8, whole=True)
            exact = wgrad_reference(data.x, data.dy, problem)
            places = data.pattern.positions()
            options = {"config": config, "dense": dense}
            pairs.append(wgrad_calls(problem, data, "float32", **options))
            expected.append(exact if dense else exact.reshape(-1)[places])
        for result, exact in zip(run_wgrads(pairs, text), expected, strict=True):
            assert_exact(result, exact, "wgrad")

    return check


def check_sum(text: str) -> None:
    for dense in (False, True):
        data = make_data(NHWC, "float32", 0.8, whole=True)
        first, second = wgrad_calls(NHWC, data, "float32", dense=dense)
        sums = run_calls([first])[0]["workspace"]
        whole = Call(second.launch, {**second.arrays, "workspace": sums}, ("write",))
        exact = wgrad_reference(data.x, data.dy, NHWC)
        exact = exact if dense else exact.reshape(-1)[data.pattern.positions()]
        assert_exact(run_calls([whole], text)[0]["write"], exact, "sum")


def check_compress(text: str) -> None:
    for problem in (NHWC, NCHW):
        data = make_data(problem, "float32", 0.4, whole=False)
        gather = dgrad_gather(problem)
        rows = data.pattern.dgrad_rows(gather)
        cases = (
            (False, data.pattern.fprop_rows(), data.values),
            (True, rows, data.values[rows.order]),
        )
        for transposed, expected, values in cases:
            call = compress_call(problem, data.dense, "float32", transposed=transposed)
            assert_rows(run_calls([call], text)[0], expected, values)


# Several warps and chunks, rows that warps lack, and tails.
SPMM_WIDE = SpmmConfig(7, 4, 2, 2, 1, 4, 11, 2)
# Slices of rows, and of quads of channels three to a thread.
SPMM_SLICED = SpmmConfig(1, 2, 1, 2, 4, 4, 5, 4)
# As many cells as threads that load them; more quads of channels than a warp loads.
BROAD = make((1, 16, 16, 8), (3, 3, 8, 3), 1, "VALID", data_format="NCHW")
SPMM_BROAD = SpmmConfig(7, 4, 3, 1, 2, 14, 14, 4)
DEEP = make((1, 3, 4, 40), (1, 1, 40, 12))
SPMM_DEEP = SpmmConfig(1, 2, 2, 2, 2, 3, 4, 40)
# Images in a tile, of which the last one lacks some; in both the rows share margins, in
# one the images do, too.
PADDED = make((5, 4, 7, 8), (3, 3, 8, 8))
HIGHER = make((5, 7, 7, 8), (3, 3, 8, 8))
SPMM_APART = SpmmConfig(7, 4, 4, 2, 1, 7, 8, 4, images=3)
SPMM_JOINED = SpmmConfig(7, 4, 2, 4, 1, 4, 8, 4, images=3)

# Channels that are copied in vectors, in two chunks of which the second is shorter;
# more outputs than are staged at once. Of 16 bits, eight at a time, or four.
VECTORS = make((2, 5, 9, 24), (3, 3, 24, 36))
VECTORS_CONFIG = BakedConfig(36, 2, 1, 4, 9, 16)
HALF_VECTORS = make((2, 5, 9, 12), (3, 3, 12, 36))
HALF_VECTORS_CONFIG = BakedConfig(36, 2, 1, 4, 9, 8, vectors=False)
# Several parts, groups and phases, and tails everywhere.
NUMBERS_CONFIG = BakedConfig(3, 2, 1, 3, 7, 2)
# The same, two at a time.
TEAMS_CONFIG = BakedConfig(3, 2, 1, 3, 7, 2, teams=2)
# The same with several pixels a thread, which neighbouring lanes store.
STRIPS_CONFIG = BakedConfig(4, 2, 1, 5, 7, 2, pixels=2)
# More columns than are loaded at once, a prime number of them, and no padding.
WIDE = make((3, 10, 37, 2), (3, 6, 2, 2), 1, "VALID")
WIDE_CONFIG = BakedConfig(2, 2, 1, 2, 32, 2)
# Columns of several channels that one thread loads after the other.
WIDE_VECTORS = make((1, 4, 70, 16), (20, 2, 16, 4), (1, 2))
WIDE_VECTORS_CONFIG = BakedConfig(4, 1, 1, 1, 32, 16)
# More channels than a block's share, and parts that are incomplete.
SHARED = make((2, 9, 9, 16), (3, 3, 16, 20))
SHARED_NCHW = make((1, 5, 9, 8), (3, 3, 8, 18), data_format="NCHW")
# A part of four has five multiprocessors, and one has none; fifteen, more than tiles.
SHARING_GPUS = [replace(LITTLE_GPU, multiprocessors=number) for number in (21, 61)]
SAMPLE = re.compile(r'#line 1 "baked_code\.cuh"\n.*?(?=#line)', re.DOTALL)


def check_baked(text: str) -> None:
    for problem, config in (
        (VECTORS, VECTORS_CONFIG), (NHWC, NUMBERS_CONFIG), (NCHW, NUMBERS_CONFIG),
        (NHWC, STRIPS_CONFIG), (WIDE, WIDE_CONFIG), (NHWC, TEAMS_CONFIG),
    ):  # fmt: skip
        data = make_data(problem, "float32", 0.3, whole=True)
        bias = data.bias if problem is not NCHW else data.bias[:, None, None]
        gather = fprop_gather(problem)
        tight = tight_gpu(gather, "float32", fitted(config, gather))
        exact = conv2d_reference(data.x, data.dense, problem) + bias
        for device in (LITTLE_GPU, tight, *SHARING_GPUS):
            (call,) = baked_fprop_calls(
                problem, data, "float32", config, device, bias=data.bias
            )
            assert_exact(run_own([call], text), exact, "fprop")
        calls = baked_dgrad_calls(problem, data, "float32", config, LITTLE_GPU)
        exact = dgrad_reference(data.dy, data.dense, problem)
        assert_exact(run_own(calls, text), exact, "dgrad")
    check_baked_conversions(text)
    check_baked_clusters(text)


def check_baked_conversions(text: str) -> None:
    """The same for numbers that are converted."""
    for problem, config, dtype in (
        (VECTORS, VECTORS_CONFIG, "float16"),
        (VECTORS, replace(VECTORS_CONFIG, vectors=False), "bfloat16"),
        (HALF_VECTORS, HALF_VECTORS_CONFIG, "float16"),
        (WIDE_VECTORS, WIDE_VECTORS_CONFIG, "float16"),
        (NHWC, NUMBERS_CONFIG, "float16"),
    ):
        data = make_data(problem, dtype, 0.3, whole=True)
        (call,) = baked_fprop_calls(problem, data, dtype, config, LITTLE_GPU)
        if "IN_FLIGHT" in dict(call.launch.defines):
            # Several turns, the last one of which isn't whole.
            defines = tuple(dict(call.launch.defines, IN_FLIGHT="2").items())
            call = replace(call, launch=replace(call.launch, defines=defines))
        exact = conv2d_reference(data.x, data.dense, problem)
        assert_exact(run_own([call], text), exact, "fprop")


def check_baked_clusters(text: str) -> None:
    """The same for blocks that share the channels."""
    gelu = get_activation("gelu")
    for problem, config in (
        (SHARED, BakedConfig(16, 2, 1, 5, 9, 2, splits=4)),
        (SHARED, BakedConfig(6, 4, 1, 5, 9, 4, teams=2, splits=2)),
        (SHARED_NCHW, BakedConfig(16, 2, 1, 5, 9, 4, splits=2)),
    ):
        data = make_data(problem, "float32", 0.3, whole=True)
        bias = data.bias if problem is SHARED else data.bias[:, None, None]
        exact = conv2d_reference(data.x, data.dense, problem) + bias
        (call,) = baked_fprop_calls(
            problem, data, "float32", config, LITTLE_GPU, bias=data.bias
        )
        assert_exact(run_own([call], text), exact, "fprop")
    (call,) = baked_fprop_calls(
        problem, data, "float32", config, LITTLE_GPU, activation=gelu.code
    )
    exact = gelu.function(conv2d_reference(data.x, data.dense, problem))
    np.testing.assert_allclose(run_own([call], text), exact, rtol=1e-5, atol=1e-5)


def run_own(calls: list[Call], text: str) -> np.ndarray:
    """Runs a call with its own code in `text`."""
    (call,) = calls
    return run_baked(calls, SAMPLE.sub(lambda _: call.launch.code + "\n", text))


def check_spmm(text: str) -> None:
    calls, expected = [], []
    for problem, config in (
        (NHWC, SPMM_WIDE), (NCHW, SPMM_WIDE), (FOURS, SPMM_WIDE),
        (NHWC, SPMM_SLICED), (VECTORS, SPMM_SLICED),
        (BROAD, SPMM_BROAD), (DEEP, SPMM_DEEP), (HIGHER, SPMM_APART),
        (PADDED, SPMM_JOINED),
    ):  # fmt: skip
        data = make_data(problem, "float32", 0.5, whole=True)
        calls.append(spmm_fprop_call(problem, data, "float32", config, bias=True))
        bias = data.bias if problem not in (NCHW, BROAD) else data.bias[:, None, None]
        expected.append(conv2d_reference(data.x, data.dense, problem) + bias)
        calls.append(spmm_dgrad_call(problem, data, "float32", config))
        expected.append(dgrad_reference(data.dy, data.dense, problem))
    calls.append(infinite_call())
    expected.append(0.0 * expected[0])
    for result, exact in zip(run_calls(calls, text), expected, strict=True):
        assert_exact(result["write"], exact, "spmm")


def infinite_call() -> Call:
    """A pass over an input that is infinite wherever the pattern reads nothing."""
    data = make_data(NHWC, "float32", 0.5, whole=True)
    read = np.zeros_like(data.x)
    # The padding of quads reads the first channel.
    read[..., 0] = np.inf
    mask = data.dense != 0
    mask[:, :, 0] = False
    pattern = make_pattern(mask)
    return spmm_call(
        fprop_gather(NHWC), pattern.fprop_rows(), np.ones(pattern.nnz, np.float32),
        read, NHWC.output_shape, "float32", SPMM_SLICED,
    )  # fmt: skip


def check_place(text: str) -> None:
    gather = dgrad_gather(NHWC)
    data = make_data(NHWC, "float32", 0.5, whole=True)
    block = make_spmm_block(gather, "float32", SPMM_WIDE)
    placed = place_rows(gather, data.pattern.dgrad_rows(gather), "float32", block)
    call = place_call(gather, placed, data.values, "float32", block)
    written = run_calls([call], text)[0]["write"]
    expected = entries_of(placed, data.values, "float32")
    np.testing.assert_array_equal(written, expected.ravel())


CLUSTERS = "conv2d_baked in clusters"
# Each begins with the name of the function that is checked.
CHECKS = {
    "conv2d_gather": check_gather(WIDE_TILE, SMALL_TILE, FOURS_TILE),
    "conv2d_gather_direct": check_gather(Direct()),
    "conv2d_wgrad": check_wgrad(WGRAD_TILE),
    "conv2d_wgrad_direct": check_wgrad(Direct()),
    "sum_partials": check_sum,
    "compress": check_compress,
    "conv2d_spmm": check_spmm,
    "place_entries": check_place,
    "conv2d_baked": check_baked,
    CLUSTERS: check_baked_clusters,
}

# Function -> (what stands there, what stands there afterwards).
MISTAKES = {
    "conv2d_gather": [
        # The end of a chunk, of a row, and what is shared between lanes.
        (r"index < limit;", "index <= limit;"),
        (r"exists = mine < end", "exists = mine <= end"),
        (r"mine = cursor \+ staged", "mine = cursor + 1 + staged"),
        (r"entries\[staged \+ lane\] =", "entries[staged + (lane ^ 1)] ="),
        (r"cursor \+= count", "cursor += count + 1"),
        (r"i < last; \+\+i", "i <= last; ++i"),
        (r"a\.order \? __ldg\(a\.order \+ mine\) : mine", "mine"),
        (r"shared\.entries \+ warp \* STAGED", "shared.entries"),
        # Which rows, which pixels.
        (r"row_group % group_blocks \* pass_rows", "row_group % group_blocks"),
        (r"loaded = (?!false)[^;]+;", "loaded = true;"),
        (r"set \* geometry\.out_channels \+ first_channel", "first_channel"),
        (r"group \* geometry\.group_in\)", "group)"),
        (
            r"y \* geometry\.h\.stride \* a\.lattice\.row_pitch",
            "y * a.lattice.row_pitch",
        ),
        (r"& \(channel < channels\)", "& (channel <= channels)"),
        (r"r < a\.warp_rows\) target", "r <= a.warp_rows) target"),
        (r"widening\(y\[u\], a\.steps\.write_row\)", "widening(y[u], 1)"),
        (r"widening\(x, a\.steps\.write_column\)", "widening(x, 1)"),
        (r"if \(channel >= channels\) return", "if (channel > channels) return"),
        (r"x\[u\] < window\.x_count", "x[u] <= window.x_count"),
        (r"a\.bias \+ first_channel \+ channel", "a.bias + channel"),
        # Tiles: bounds, pitches, origins.
        (r"& contains\(window, y\[u\], x\[u\]\)", ""),
        (
            r"<\s+static_cast<unsigned>\(window\.y_count\)",
            "<= static_cast<unsigned>(window.y_count)",
        ),
        (
            r"<\s+static_cast<unsigned>\(window\.x_count\)",
            "<= static_cast<unsigned>(window.x_count)",
        ),
        (r"widening\(y\[u\], row\)", "widening(y[u], column)"),
        (r"place < places && channel < channels", "place < places"),
        (
            r"first = threadIdx\.x; first < places",
            "first = threadIdx.x; first + 1 < places",
        ),
        (r"extent_w, window\.x_begin", "extent_w - 1, window.x_begin"),
        (r"divide\(size - 1 - origin,", "divide(size - origin,"),
        (r"by_step\.divisor - 1 - origin", "by_step.divisor - origin"),
        (
            r"\(channel - first_channel\) \* lattice\.plane_pitch",
            "channel * lattice.plane_pitch",
        ),
        (r"tap_h \* lattice\.row_pitch \+", "tap_h * lattice.columns +"),
        (r"number < a\.subtiles", "number <= a.subtiles"),
        (r"step \* geometry\.h\.stride \* subtile", "step * subtile"),
    ],
    "conv2d_spmm": [
        # Which cells, and of which channels, a thread loads.
        (r"next\.cell >= count", "next.cell > count"),
        (r"next\.channel \+= share\.at_once \* UNIT", "next.channel += UNIT"),
        (r"\(count - 1 - next\.cell\)", "(count - next.cell)"),
        (r"\(channels - 1 - next\.channel\)", "(channels - next.channel)"),
        (r"left % 2\)", "left % 2 == 0)"),
        (r"left % 4 >= 2\)", "left % 4 > 2)"),
        (r"left >= 4\)", "left > 4)"),
        (r"y - window\.y_begin\) \* window\.x_count", "y) * window.x_count"),
        (r"image \* window\.y_count \+", ""),
        (r"\* a\.steps\.read_channel;\n        batch", "* 1;\n        batch"),
        (r"k \* plane", "k * 4"),
        # Images of a tile, and places that they share.
        (r"& \(image < windows\.images\)", ""),
        (r"min\(a\.tile_images, a\.images - subtile\.image\)", "a.tile_images"),
        (r"subtile\.image \*= a\.tile_images", "subtile.image *= 1"),
        (r"if \(next_image \| next_row\)", "if (next_image | next_row | last)"),
        (r"!\(\(last \| apart\)", "!(last"),
        (r"= \(y >= a\.image_rows\) & !last", "= y >= a.image_rows"),
        (r"image \* a\.image_pitch \+", ""),
        (r"min\(x, a\.width - 1\)", "x * 1000"),
        # Which entries are copied.
        (r"i < a\.pieces", "i < a.pieces - 1"),
        (r"widening\(chunk, a\.pieces\)", "0"),
        (r"set \* a\.row_groups \+ row_group, a\.chunks", "row_group, a.chunks"),
        # What a warp adds.
        (r"quads \* \(slice \+ 1\)", "quads * slice"),
        (r"min\(spans\[r\]\.count, end \* QUAD\)", "end * QUAD"),
        (r"if \(k < count\)", "if (k <= count)"),
        (r"count > QUAD; count", "count >= QUAD; count"),
        (r"\*\+\+entries", "*entries++"),
        (r"chunk % 2 \* a\.buffer", "0"),
        (r"warp % a\.row_warps \* a\.warp_rows", "warp % a.row_warps"),
        # What is stored.
        (r"offset < 0", "offset < -1"),
        (r"row >= channels", "row > channels"),
        (r"slice < 1 << a\.slices_log2", "slice < 1"),
        (r"staged\[slice \* to_next\]", "staged[0]"),
    ],
    "conv2d_gather_direct": [
        (r"number < outputs; number", "number <= outputs; number"),
        (r"input_y < geometry\.h\.inputs", "input_y <= geometry.h.inputs"),
        (r"input_x < geometry\.w\.inputs", "input_x <= geometry.w.inputs"),
        (r"input_y >= 0", "input_y >= -1"),
        (r"input_x >= 0", "input_x >= -1"),
        (r"outputs_left\(geometry\.h, phase_h, i_h\) <= 0", "false"),
        (r"outputs_left\(geometry\.w, phase_w, i_w\) <= 0", "false"),
        (r"a\.order \? __ldg\(a\.order \+ i\) : i", "i"),
        (r"min\(end - batch, WARP\) \+ batch", "batch + WARP"),
        (r"input_y \* geometry\.read\.row", "input_y * geometry.read.column"),
        (r"out_y \* pitch\.row", "out_y * pitch.column"),
    ],
    "conv2d_wgrad": [
        (r"index < limit;", "index <= limit;"),
        (r"mine < end\)", "mine <= end)"),
        (r"y \* a\.outputs\.row_pitch", "y * a.lattice.row_pitch"),
        (r"y \* a\.geometry\.h\.stride \*", "y *"),
        (r"number == split, pixels", "true, pixels"),
        (r"fresh \? sum :", ""),
        (r"number \+= a\.splits", "number += 1"),
        (r"split \* a\.entries", "0"),
        (r"a\.indices \? 0 : dense", "0"),
        (r"shared\.offsets \+ warp \* WARP", "shared.offsets"),
        (r"a\.outputs, a\.steps\.write_row", "a.outputs, a.steps.write_column"),
        (r"&& entry < count", ""),
        (r"cursor \+= count", "cursor += count + 1"),
    ],
    "conv2d_wgrad_direct": [
        (r"&& entry < count", ""),
        (r"input_y < geometry\.h\.inputs", "input_y <= geometry.h.inputs"),
        (r"input_x < geometry\.w\.inputs", "input_x <= geometry.w.inputs"),
        (r"input_y >= 0", "input_y >= -1"),
        (r"pixel < a\.pixels", "pixel <= a.pixels"),
        (r"outputs_left\(geometry\.h, phase_h, i_h\) <= 0", "false"),
        (r"outputs_left\(geometry\.w, phase_w, i_w\) <= 0", "false"),
        (r"split \* a\.entries", "0"),
        (r"a\.indices \? 0 : dense", "0"),
    ],
    "sum_partials": [
        (r"entry < a\.entries", "entry <= a.entries"),
        (r"split < a\.splits", "split + 1 < a.splits"),
        (r"index % a\.taps \* a\.row_channels", "index % a.taps"),
    ],
    "compress": [
        (r"number >= a\.rows\) return", "number > a.rows) return"),
        (r"number < a\.rows \?", "true ?"),
        (r"other < part;", "other <= part;"),
        (r"r < 0 \|\| s < 0", "false"),
        (r"row\.set_h \* geometry\.h\.taps", "row.set_h"),
        (r"group \* geometry\.group_in \+ channel", "channel"),
        (r"= \(row_length - 1\) / parts \+ 1", "= row_length / parts"),
    ],
    "place_entries": [
        (r"number >= a\.count\) return", "number > a.count) return"),
        (r"source < 0 \?", "source <= 0 ?"),
        (r"part \* a\.quads \+ unit", "unit"),
        (r"part \* a\.span_pieces \+ piece", "piece"),
        (r"\* \(pieces_of_quads \+ a\.span_pieces\)", "* pieces_of_quads"),
    ],
    "conv2d_baked": [
        # Which outputs, which pixels.
        (r"by_group_parts\) \* OUTPUTS", "by_group_parts)"),
        (r"group \* geometry\.group_in;", "group;"),
        (r"group \* geometry\.group_out \+ first", "first"),
        (r"find_subtile\(tile,", "find_subtile(static_cast<int>(number),"),
        # Which multiprocessor.
        (r"divide_on\(item\.part, LAYOUT\.by_sharers\)", "item.part"),
        (r"tile \* LAYOUT\.by_sharers\.divisor \+ first", "tile + first"),
        (r"part \* TEAMS >= LAYOUT\.parts \|\| first", "first"),
        (r"\|\| first >= a\.by_tiles\.divisor", ""),
        (r"divisor - 1 - first, LAYOUT", "divisor - first, LAYOUT"),
        (r"turns \* LAYOUT\.by_multiprocessors\.divisor", "a.items"),
        (r"if \(find_first\(\) >= end\) return;", ""),
        (
            r"y \* LAYOUT\.geometry\.h\.stride \* LAYOUT\.row_pitch",
            "y * LAYOUT.row_pitch",
        ),
        (r"if \(!contains\(output, y, x\)\) return -1;", ""),
        (r"part \* LAYOUT\.chunks", "part"),
        # Whose part.
        (r"item\.part \*= TEAMS;", ""),
        (r"part = item\.part \+ find_team\(\)", "part = item.part"),
        (r"find_part\(item\.part \+ find_team\(\)\)", "find_part(item.part)"),
        (r"threadIdx\.x % TEAM_THREADS", "threadIdx.x"),
        (r"threadIdx\.x / TEAM_THREADS", "0"),
        (r"if \(k >= part\.outputs\) break;", ""),
        (r"strip \* PIXELS \+ pixel", "strip * PIXELS"),
        (r"const int y = strip \* PIXELS;", "const int y = strip;"),
        (r"pixel \* OUTPUTS \+ k\] = number", "k] = number"),
        (r"sums\.of \+ pixel \* OUTPUTS", "sums.of"),
        (r"sums\.of\[k\] \+= partial", "sums.of[k] = partial"),
        (r"Sums partial = \{\}", "Sums partial = sums"),
        (r"number < \(end\); number", "number + gridDim.x < (end); number"),
        (r"turn = turn == ITEMS - 1 \? 0 : turn \+ 1;", "turn = 0;"),
        # Tiles: bounds, pitches, chunks.
        (r"column\.exists &", ""),
        (
            r"column\.exists & \(static_cast<unsigned>\(y - window\.y_begin\) <",
            "column.exists & (static_cast<unsigned>(y - window.y_begin) <=",
        ),
        (r"channel_turn < LAYOUT", "channel_turn + 1 < LAYOUT"),
        (r"if \(channel >= channels\) break;", ""),
        (r"column\.row < LAYOUT\.rows_at_once\s+\?", "true ?"),
        (r"column_turn < LAYOUT", "column_turn + 1 < LAYOUT"),
        (r"if \(quotient >= LAYOUT\.columns\) break;", ""),
        (r"remainder < stride;", "remainder + 1 < stride;"),
        (r"turn < turns;", "turn + 1 < turns;"),
        (r"return \(turn \+ 1\) \* LAYOUT\.rows_at_once <=", "return true || 0 <="),
        (r"column\.target \+ turn", "column.target + 0"),
        (r"column\.source \+ turn", "column.source + 0"),
        (r"first < LAYOUT\.row_turns; first", "first + 1 < LAYOUT.row_turns; first"),
        (r"input_exists\(window, column, first \+ i\)", "true"),
        # Conversions.
        (r"i % 2 \? word >> 16 : word", "word"),
        (r"target \+ first\)", "target)"),
        (r"target\[first \+ i\] = numbers\[i\]", "target[i] = numbers[i]"),
        (r"landing \+ \(column\.turns_before \+ turn\)", "landing + turn"),
        (r"first < turns; first", "first + CONVERTED < turns; first"),
        (r"i < CONVERTED && first", "i + 1 < CONVERTED && first"),
        (r"stride \+\s+remainder\) \* LAYOUT\.row_turns", "stride) * LAYOUT.row_turns"),
        (r"goes_on \? item\.input : items\[turn\]\.input", "item.input"),
        (r"goes_on \? item\.input : items\[turn\]\.input", "items[turn].input"),
        (r"goes_on \? chunk \+ 1 : first_chunk", "first_chunk"),
        (r"goes_on \? chunk \+ 1 : first_chunk", "chunk + 1"),
        (r"LAYOUT\.buffer - buffer", "0"),
        (r"wait_for_copies<0>\(\);", ""),
        (r"wait_for_copies<0>", "wait_for_copies<1>"),
        # Stores.
        (r"lane < channels && place >= 0", "place >= 0"),
        (r"channel < channels && place >= 0", "place >= 0"),
        (r"if \(offset < 0\) return;", ""),
        (r"threadIdx\.x / WARP \* WARP \* STAGE_PITCH", "0"),
        (r"widening\(part\.first_output, LAYOUT\.steps\.write_channel\)", "0"),
        (r"widening\(first, LAYOUT\.steps\.write_channel\)", "0"),
    ],
    # What only clusters do is left to their own check, which takes less time.
    CLUSTERS: [
        (r"return blockIdx\.x / SPLITS;", "return blockIdx.x;"),
        (r"blockIdx\.x % SPLITS \* LAYOUT\.own_chunks", "0"),
        (r"\|\| blockIdx\.x % SPLITS\) return;", ") return;"),
        (r"block \* OWN_OUTPUTS \+ number \* PACKET", "number * PACKET"),
        (r"block \* PACKETS \* WARPS", "block * WARPS"),
        (r"\(own \+ turn\) % SPLITS", "own"),
        (r"turn \? sum \+ packet", "turn > 1 ? sum + packet"),
        (r"blockIdx\.x % SPLITS \* OWN_OUTPUTS", "0"),
        (r"if \(first \+ k >= part\.outputs\) break;", ""),
        (r"part\.first_output \+ first", "first"),
        (r"k / PACKET \* WARPS \* WARP\]", "k / PACKET]"),
    ],
}
MUTATIONS = [
    Mutation(check, find, replace)
    for check, mistakes in MISTAKES.items()
    for find, replace in mistakes
]

# Barriers that nothing would notice: (function, what follows).
HARMLESS = {
    # The windows were last read while the tiles were loaded; a barrier followed.
    ("conv2d_wgrad", "find_windows(a, shared, number"),
    # The shuffles that follow wait for all lanes, and read no memory.
    ("conv2d_wgrad_direct", "const Accumulator sum = sum_over_lanes"),
    # The hardware wants the whole warp at the next barrier, the emulator does not.
    ("conv2d_baked", "for (int chunk = 0; chunk < count_chunks()"),
}
BARRIER = re.compile(
    r"(__sync(threads|warp)|\bmeet(_cluster)?|\barrive_at_cluster|\bwait_for_cluster)"
    r"\(\);"
)


def barriers(check: str) -> list[tuple[str, int]]:
    """Each barrier that a check is for: its name for people, and its number."""
    found = []
    function = function_of(check)
    text = jit.source(function)
    for number, match in enumerate(BARRIER.finditer(text)):
        above, below = text[: match.start()], text[match.end() :].lstrip()
        if any(f == function and below.startswith(after) for f, after in HARMLESS):
            continue
        if ("cluster" in match[0]) != (check == CLUSTERS):
            continue
        file, first = re.findall(r'#line (\d+) "([\w.]+)"', above)[-1][::-1]
        line = int(first) + len(above[above.rindex("#line") :].splitlines()) - 2
        found.append((f"{function}-{file}:{line}-{match[0]}", number))
    return found


def without_barrier(function: str, number: int) -> str:
    """The text with one barrier taken out."""
    text = jit.source(function)
    match = list(BARRIER.finditer(text))[number]
    return text[: match.start()] + ";" + text[match.end() :]


BARRIERS = [
    pytest.param(check, number, id=name)
    for check in CHECKS
    for name, number in barriers(check)
]


def assert_noticed(check: str, text: str) -> None:
    """Fails if a check passes with this text."""
    try:
        CHECKS[check](text)
    except EmulationError as error:
        assert "can't be built" not in str(error)
    except AssertionError:
        pass
    else:
        pytest.fail("the check passes with the mistake in it")


@pytest.mark.parametrize("check", CHECKS)
def test_the_text_as_it_is_passes(check):
    CHECKS[check](jit.source(function_of(check)))


@pytest.mark.parametrize(("check", "number"), BARRIERS)
def test_a_missing_barrier_is_noticed(check, number):
    assert_noticed(check, without_barrier(function_of(check), number))


@pytest.mark.parametrize(
    ("mutation", "number"),
    [
        pytest.param(mutation, number, id=f"{mutation}-{number}")
        for mutation in MUTATIONS
        # One at least: it fails if there is none.
        for number in range(max(1, mutation.places()))
    ],
)
def test_a_mistake_is_noticed(mutation, number):
    assert_noticed(mutation.check, mutation.apply(number))


@pytest.mark.parametrize(("function", "after"), sorted(HARMLESS))
def test_harmless_barriers_are_still_there(function, after):
    assert re.search(
        BARRIER.pattern + r"\s*" + re.escape(after), jit.source(function)
    ), "the barrier has gone, or what follows it has changed: adapt HARMLESS"


def test_a_mutation_without_its_place_fails():
    with pytest.raises(AssertionError, match="adapt the mutation"):
        Mutation("conv2d_gather", "no such text", "").apply(0)
