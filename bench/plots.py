"""Results as pictures: one PNG for each figure, and one that sums them up.

Knows Matplotlib, which is imported when something is drawn, and the rows of each
command. Draws from what a results file holds, on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import compare, machine
from bench.compare import KINDS, geometric_mean, median_us, ratio
from bench.results import Results

Row = dict[str, Any]

_DPI = 150
# Told apart by their lightness, too.
COLOURS = {
    "ours": "#0b6e4f",
    "dense": "#e07a1f",
    "dense_fp32": "#8c4a8c",
    "naive": "#8a8f98",
    "floor": "#1f2937",
}
MARKERS = {"ours": "o", "dense": "s", "dense_fp32": "D", "naive": "^"}
AXES = {
    "kernel size": "height and width of the kernel",
    "channels in": "channels in",
    "channels out": "channels out",
    "density": "density (nonzero weights)",
    "image size": "height and width of the image",
}
_DENSITY_COLOURS = ("#08306b", "#2171b5", "#6baed6", "#e6a23c", "#c0392b")
# Where a legend goes: on top of the figure, which is saved with all that it has.
_ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw(results: Results) -> list[Path]:
    """Draws all that there is to draw, beside the JSON file.

    Returns:
        The pictures' paths.
    """
    drawer = _DRAWERS.get(results.document["command"])
    if drawer is None or not results.rows:
        return []
    # Not at the top: it takes a second, and measuring needs none of it.
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(_STYLE):
        return drawer(results)


def names(results: Results) -> dict[str, str]:
    """What the contenders are called in legends."""
    on_gpu = results.document["machine"]["device"] == "GPU"
    tensorflow = "tf.nn.conv2d"
    return {
        "ours": "sparse_conv (hollow: it chose dense)",
        "dense": f"{tensorflow}, TF32 (its default)" if on_gpu else tensorflow,
        "dense_fp32": f"{tensorflow}, FP32",
        "naive": "the original operator's method",
        "floor": "floor: bytes or FP32 FMAs",
    }


def _save(figure: Any, results: Results, name: str) -> Path:
    """Writes a figure with the machine and the versions below it."""
    import matplotlib.pyplot as plt

    figure.supxlabel(
        machine.caption(results.document["machine"]), fontsize=7, color="#6b7280"
    )
    path = results.path.parent / f"{name}.png"
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
    return path


def _kind_text(kind: str) -> str:
    return "time on the device" if kind == KINDS[0] else "time of a call"


def _plain(axis: Any) -> None:
    """Labels of a logarithmic axis as people write numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.7g}"))
    axis.set_minor_formatter(NullFormatter())


def _figures(results: Results) -> list[Path]:
    kind = compare.kind_of(results.rows)
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(row["case"]["group"], []).append(row)
    paths = [_figure(name, rows, kind, results) for name, rows in groups.items()]
    return [*paths, _summary(groups, kind, results)]


def _figure(name: str, rows: list[Row], kind: str, results: Results) -> Path:
    """One of the seed's figures: times at the left, ratios at the right."""
    import matplotlib.pyplot as plt

    figure, (times, ratios) = plt.subplots(1, 2, figsize=(10, 4.4))
    rows = sorted(rows, key=lambda row: row["case"]["position"])
    _draw_times(times, rows, kind, results)
    _draw_ratios(ratios, rows, kind, results)
    for axes in (times, ratios):
        _position_axis(axes, name, rows)
    times.set_ylabel(f"{_kind_text(kind)}, µs")
    times.legend(fontsize=8)
    ratios.set_ylabel("sparse_conv: times as fast")
    ratios.legend(fontsize=8)
    dtype = rows[0]["case"]["dtype"]
    figure.suptitle(f"{name.capitalize()}: {_constant_part(name, rows)}, {dtype}")
    return _save(figure, results, f"figure{_part(results)}-{name.replace(' ', '-')}")


def _part(results: Results) -> str:
    """What tells the pictures of another dtype from those of float32."""
    return results.path.stem.removeprefix("figures")


def _draw_times(axes: Any, rows: list[Row], kind: str, results: Results) -> None:
    labels = names(results)
    for side in (*MARKERS, "floor"):
        colour, label = COLOURS[side], labels[side]
        if side == "floor":
            described = results.document["machine"]
            points = [
                (row["case"]["position"], compare.floor_us(row, described))
                for row in rows
            ]
            axes.plot(*zip(*points, strict=True), "--", color=colour, label=label, lw=1)
            continue
        known = [row for row in rows if median_us(row, side, kind) is not None]
        if not known:
            continue
        x = [row["case"]["position"] for row in known]
        entries = [row["sides"][side] for row in known]
        low, medians, high = (
            [entry[kind][name] for entry in entries] for name in ("q1", "median", "q3")
        )
        axes.plot(x, medians, MARKERS[side] + "-", color=colour, label=label, ms=5)
        _mark_dense(axes, x, entries, kind)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_yscale("log")
    _plain(axes.yaxis)


def _mark_dense(axes: Any, x: Sequence[float], entries: list[Row], kind: str) -> None:
    """Hollows the marks where ours has chosen TensorFlow's convolution."""
    chosen = [
        (position, entry[kind]["median"])
        for position, entry in zip(x, entries, strict=True)
        if entry.get("algorithm") == "dense"
    ]
    if chosen:
        axes.plot(*zip(*chosen, strict=True), "o", color="white", ms=2.5, zorder=4)


def _draw_ratios(axes: Any, rows: list[Row], kind: str, results: Results) -> None:
    labels = names(results)
    for side in ("dense", "dense_fp32", "naive"):
        known = [row for row in rows if ratio(row, side, kind) is not None]
        if not known:
            continue
        x = [row["case"]["position"] for row in known]
        y = [ratio(row, side, kind) for row in known]
        colour = COLOURS[side]
        axes.plot(
            x, y, MARKERS[side] + "-", color=colour, label=f"than {labels[side]}", ms=5
        )
        spreads = [compare.ratio_spread(row, side, kind) for row in known]
        axes.fill_between(x, *zip(*spreads, strict=True), color=colour, alpha=0.2, lw=0)
    axes.axhline(1, color=COLOURS["floor"], lw=1)
    axes.set_yscale("log")
    _plain(axes.yaxis)


def _position_axis(axes: Any, name: str, rows: list[Row]) -> None:
    positions = sorted({row["case"]["position"] for row in rows})
    axes.set_xlabel(AXES[name])
    if name != "kernel size":
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(positions, [f"{position:g}" for position in positions])
    if name == "density":
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)


def _constant_part(name: str, rows: list[Row]) -> str:
    """The sizes that a figure keeps, a question mark for what it varies."""
    case = rows[0]["case"]
    image = f"{case['h']}x{case['w']}"
    taps, c, k = case["taps"], case["c"], case["k"]
    density = f"density {case['density']:g}"
    if name == "kernel size":
        return f"{image}x{c} by ?x?x{c}x{k}, {density}"
    if name == "channels in":
        return f"{image}x? by {taps}x{taps}x?x{k}, {density}"
    if name == "channels out":
        return f"{image}x{c} by {taps}x{taps}x{c}x?, {density}"
    if name == "density":
        return f"{image}x{c} by {taps}x{taps}x{c}x{k}"
    return f"?x?x{c} by {taps}x{taps}x{c}x{k}, {density}"


def _summary(groups: dict[str, list[Row]], kind: str, results: Results) -> Path:
    """All ratios of all figures on one scale, with their geometric mean."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(groups), figsize=(2.6 * len(groups) + 0.6, 4), sharey=True, squeeze=False
    )
    labels = names(results)
    for axes, (name, rows) in zip(panels[0], groups.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["case"]["position"])
        places = range(len(rows))
        for side in ("dense", "dense_fp32", "naive"):
            y = [ratio(row, side, kind) for row in rows]
            known = [(x, one) for x, one in zip(places, y, strict=True) if one]
            if known:
                label = f"than {labels[side]}"
                style = MARKERS[side] + "-"
                axes.plot(
                    *zip(*known, strict=True), style, color=COLOURS[side], label=label
                )
        axes.axhline(1, color=COLOURS["floor"], lw=1)
        axes.set_yscale("log")
        ticks = [f"{row['case']['position']:g}" for row in rows]
        axes.set_xticks(places, ticks, rotation=60 if len(rows) > 5 else 0, fontsize=8)
        axes.set_title(name, fontsize=10)
        _plain(axes.yaxis)
    panels[0][0].set_ylabel(f"times as fast ({_kind_text(kind)})")
    handles, texts = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, ncols=3, fontsize=9, **_ABOVE)
    sparse = [row for rows in groups.values() for row in rows if _is_sparse(row)]
    mean = geometric_mean(ratio(row, "dense", kind) for row in sparse)
    if mean is not None:
        headline = (
            f"sparse_conv: {mean:.1f} times as fast as {labels['dense']}, "
            f"the geometric mean of {len(sparse)} points at density 0.1, "
            f"{sparse[0]['case']['dtype']}"
        )
        figure.text(0.5, 1.09, headline, ha="center", va="bottom", fontsize=12)
    return _save(figure, results, f"summary{_part(results)}")


def _is_sparse(row: Row) -> bool:
    return row["case"]["density"] == 0.1


def _layers(results: Results) -> list[Path]:
    """A panel for each batch size and dtype; a column for each layer."""
    import matplotlib.pyplot as plt

    kind = compare.kind_of(results.rows)
    panels: dict[tuple[str, int], list[Row]] = {}
    for row in results.rows:
        key = (row["case"]["dtype"], row["case"]["n"])
        panels.setdefault(key, []).append(row)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 3.2 * len(panels) + 1.6), squeeze=False
    )
    dense = names(results)["dense"]
    for place, ((dtype, batch), rows) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_layers(place, rows, kind)
        place.set_title(f"batch {batch}, {dtype}", fontsize=10, loc="left")
        place.set_ylabel("times as fast")
        place.legend(
            title="density", ncols=4, fontsize=8, loc="lower right",
            bbox_to_anchor=(1, 1),
        )  # fmt: skip
    figure.suptitle(f"Layers: sparse_conv against {dense}, {_kind_text(kind)}")
    return [_save(figure, results, "layers")]


def _draw_layers(axes: Any, rows: list[Row], kind: str) -> None:
    layers = list(dict.fromkeys(_layer_name(row) for row in rows))
    densities = sorted({row["case"]["density"] for row in rows})
    for density, colour in zip(densities, _DENSITY_COLOURS, strict=False):
        part = [row for row in rows if row["case"]["density"] == density]
        known = [row for row in part if ratio(row, "dense", kind) is not None]
        x = [layers.index(_layer_name(row)) for row in known]
        y = [ratio(row, "dense", kind) for row in known]
        axes.scatter(x, y, color=colour, label=f"{density:g}", s=28, zorder=3)
    axes.axhline(1, color=COLOURS["floor"], lw=1)
    axes.set_yscale("log")
    _plain(axes.yaxis)
    axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right", fontsize=8)


def _layer_name(row: Row) -> str:
    case = row["case"]
    return f"{case['group']} {case['position']}"


def _crossover(results: Results) -> list[Path]:
    """For each shape, the densities at which ours is faster."""
    import matplotlib.pyplot as plt

    rows, labels = results.rows[::-1], names(results)
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 2))
    sides = [s for s in ("dense", "dense_fp32") if any(s in r["sides"] for r in rows)]
    height = 0.8 / len(sides)
    for number, side in enumerate(reversed(sides)):
        known = [
            (place, row["crossings"][side])
            for place, row in enumerate(rows)
            if side in row["crossings"]
        ]
        places = [
            place + (number - (len(sides) - 1) / 2) * height for place, _ in known
        ]
        # A bar from a density of 1 per cent to the crossing.
        ends = [1.0 if density is None else max(density, 0.01) for _, density in known]
        axes.barh(
            places,
            [end - 0.01 for end in ends],
            height * 0.9,
            left=0.01,
            color=COLOURS[side],
            label=f"faster than {labels[side]}",
        )
    axes.set_xscale("log")
    axes.set_xlim(0.01, 1)
    _plain(axes.xaxis)
    axes.set_xlabel("density up to which sparse_conv is faster")
    axes.set_yticks(range(len(rows)), [row["shape"] for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    figure.legend(ncols=2, fontsize=9, **_ABOVE)
    return [_save(figure, results, "crossover")]


def _training(results: Results) -> list[Path]:
    """For each step, how many times as fast ours is."""
    kind = compare.kind_of(results.rows)
    labels = names(results)
    rows = [
        f"{row['shape']}, density {row['case']['density']:g}" for row in results.rows
    ]
    bars = {
        side: [ratio(row, side, kind) or 0.0 for row in results.rows]
        for side in ("dense", "dense_fp32")
        if any(side in row["sides"] for row in results.rows)
    }
    label = f"a training step with sparse_conv: times as fast ({_kind_text(kind)})"
    legend = {side: f"than {labels[side]}" for side in bars}
    return [_bars(results, "training", rows, bars, legend, label)]


def _overhead(results: Results) -> list[Path]:
    """What each way of calling costs."""
    rows = [row["key"] for row in results.rows]
    callers = list(results.rows[0]["call_us"])
    bars = {
        side: [row["call_us"][caller]["median"] for row in results.rows]
        for side, caller in zip(("ours", "naive", "dense"), callers, strict=True)
    }
    legend = dict(zip(bars, callers, strict=True))
    return [_bars(results, "overhead", rows, bars, legend, "µs a call")]


def _bars(
    results: Results,
    name: str,
    rows: Sequence[str],
    bars: dict[str, list[float]],
    labels: dict[str, str],
    axis: str,
) -> Path:
    """Horizontal bars, in groups: one group for each row."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 2))
    height = 0.8 / len(bars)
    for number, (side, lengths) in enumerate(bars.items()):
        places = [place + number * height for place in range(len(rows))]
        axes.barh(
            places, lengths, height * 0.9, color=COLOURS[side], label=labels[side]
        )
    axes.set_xlabel(axis)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], rows)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    if name == "training":
        axes.axvline(1, color=COLOURS["floor"], lw=1)
    figure.legend(ncols=3, fontsize=9, **_ABOVE)
    return _save(figure, results, name)


_DRAWERS = {
    "figures": _figures,
    "layers": _layers,
    "crossover": _crossover,
    "training": _training,
    "overhead": _overhead,
}
