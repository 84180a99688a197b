"""Results as tables: Markdown that reads well in a terminal, too.

Knows the rows of each command. Draws nothing itself and measures nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import compare, machine, plots
from bench.compare import floor_fraction, geometric_mean, ratio
from bench.results import Results

Row = dict[str, Any]
NAMES = {
    "ours": "ours",
    "dense": "TF",
    "dense_fp32": "TF FP32",
    "naive": "seed's method",
}


def publish(results: Results, *, draw: bool) -> None:
    """Writes the table and, to `draw`, plots beside the JSON file; prints the table."""
    text = document(results)
    table = results.path.with_suffix(".md")
    table.write_text(text, encoding="utf-8")
    print(text)
    for path in plots.draw(results) if draw else ():
        print(f"plot   {path}")
    print(f"table  {table}")
    print(f"data   {results.path}")


def document(results: Results) -> str:
    """The whole table with its captions, in Markdown."""
    command = results.document["command"]
    described = results.document["machine"]
    parts = [f"# bench {command}", machine.caption(described), *_settings(results)]
    parts += _TABLES[command](results) if results.rows else ["No row was measured."]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up; the first is flush left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]
        return f"| {' | '.join(padded)} |"

    first, *rest = widths
    rule = f"|{'-' * (first + 2)}|{'|'.join('-' * (w + 1) + ':' for w in rest)}|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def number(value: float | None) -> str:
    """Three digits that matter; a dash where there is nothing."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(times: dict[str, float] | None) -> str:
    """A median and half the distance of its quartiles, in per cent."""
    if times is None:
        return "-"
    half = (times["q3"] - times["q1"]) / 2 / times["median"]
    return f"{number(times['median'])} ±{100 * half:.0f}%"


def _settings(results: Results) -> list[str]:
    described = results.document["machine"]
    settings = results.document["settings"]
    lines = [
        f"bandwidth {described['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s "
        f"({described['bandwidth_source']}); "
        f"peak {described['peak_fmas_per_s'] * 2e-12:.2f} TFLOP/s "
        f"({described['peak_source']})",
        f"algorithm {settings['algorithm']}; "
        f"TF32 is {'on' if settings['tf32_default'] else 'off'} by default; medians, "
        "± half the distance between the quartiles",
    ]
    return ["\n".join(f"- {line}" for line in lines)]


def _sections(rows: Sequence[Row], title: Callable[[Row], str]) -> Iterable[Any]:
    return ((name, list(part)) for name, part in itertools.groupby(rows, title))


def _sides(rows: Sequence[Row]) -> list[str]:
    """The contenders beside ours, those that no row has left out."""
    return [s for s in NAMES if s != "ours" and any(s in r["sides"] for r in rows)]


def _convolutions(results: Results) -> list[str]:
    """The tables of `figures` and `layers`, one for each figure or network."""
    rows, parts = results.rows, []
    kind, sides = compare.kind_of(rows), _sides(rows)
    for title, part in _sections(rows, _title):
        parts += [f"## {title}", _times_table(part, kind, sides, results)]
    parts += ["## Summary", *_summary(rows, kind, sides), *_refusals(rows)]
    return parts


def _title(row: Row) -> str:
    case = row["case"]
    if isinstance(case["position"], str):
        return f"{case['group']}, batch {case['n']}, {case['dtype']}"
    return case["group"]


def _times_table(
    rows: Sequence[Row], kind: str, sides: Sequence[str], results: Results
) -> str:
    """Times of all contenders, our ratios, the floor and the error."""
    on_gpu = kind == "device_us"
    header = ["convolution", "density", "algorithm", "ours, us"]
    header += [f"{NAMES[side]}, us" for side in sides]
    header += [f"/ {NAMES[side]}" for side in sides] + ["of floor"]
    header += ["error", "error, TF"]
    if on_gpu:
        header += ["ours, call us", "TF, call us", "/ TF, call"]

    def cells(row: Row) -> list[str]:
        ours = row["sides"].get("ours", {})
        fraction = floor_fraction(row, kind, results.document["machine"])
        line = [row["shape"], f"{row['case']['density']:g}", _algorithm(ours)]
        line += [_time(row, side, kind) for side in ("ours", *sides)]
        line += [number(ratio(row, side, kind)) for side in sides]
        line += ["-" if fraction is None else f"{100 * fraction:.0f}%"]
        line += [_error(row, side) for side in ("ours", "dense")]
        if on_gpu:
            line += [_time(row, side, "call_us") for side in ("ours", "dense")]
            line += [number(ratio(row, "dense", "call_us"))]
        return line

    return table(header, map(cells, rows))


def _error(row: Row, side: str) -> str:
    error = row["sides"].get(side, {}).get("error")
    return "-" if error is None else f"{error:.1e}"


def _algorithm(ours: Row) -> str:
    return ours.get("algorithm", "none")


def _time(row: Row, side: str, kind: str) -> str:
    entry = row["sides"].get(side, {})
    if "refused" in entry:
        return "wrong" if "error_limit" in entry else "-"
    return spread(entry.get(kind))


def _summary(rows: Sequence[Row], kind: str, sides: Sequence[str]) -> list[str]:
    """Geometric means and the worst ratio for each density."""
    lines = []
    for density in sorted({row["case"]["density"] for row in rows}):
        part = [row for row in rows if row["case"]["density"] == density]
        for side in sides:
            ratios = [ratio(row, side, kind) for row in part]
            known = [one for one in ratios if one is not None]
            if known:
                lines.append(
                    f"- density {density:g}, times as fast as {NAMES[side]}: geometric "
                    f"mean {number(geometric_mean(known))}, least "
                    f"{number(min(known))}, {len(known)} of {len(part)} points"
                )
    errors = [row["sides"].get("ours", {}).get("error") for row in rows]
    worst = max((error for error in errors if error is not None), default=None)
    if worst is not None:
        lines.append(f"- largest error of ours: {worst:.1e}")
    return ["\n".join(lines)]


def _refusals(rows: Sequence[Row]) -> list[str]:
    """Why times are missing, each reason once."""
    reasons: dict[str, int] = {}
    for row in rows:
        for side, entry in row["sides"].items():
            for field in ("refused", "no_device_time"):
                if field in entry:
                    text = f"{NAMES[side]}: {entry[field]}"
                    reasons[text] = reasons.get(text, 0) + 1
    lines = [f"- {text} ({count} rows)" for text, count in reasons.items()]
    return ["## Not timed", "\n".join(lines)] if lines else []


def _training(results: Results) -> list[str]:
    rows = results.rows
    kind, sides = compare.kind_of(rows), _sides(rows)
    summary = _summary(rows, kind, sides)
    return [_times_table(rows, kind, sides, results), *summary, *_refusals(rows)]


def _crossover(results: Results) -> list[str]:
    """The density at which dense takes over, and which algorithm it overtakes."""
    sides = _sides(results.rows)
    header = ["convolution", *(f"{NAMES[s]}, us" for s in sides)]
    header += [f"{NAMES[side]} faster above" for side in sides]

    def cells(row: Row) -> list[str]:
        line = [row["shape"]]
        line += [_time(row, side, row["kind"]) for side in sides]
        return line + [crossing_text(row["crossings"], side) for side in sides]

    return [table(header, map(cells, results.rows)), *_refusals(results.rows)]


def crossing_text(crossings: dict[str, float | None], side: str) -> str:
    """A crossing's density in words."""
    if side not in crossings:
        return "-"
    density = crossings[side]
    if density is None:
        return "never"
    return "0.01 or less" if density == 0 else f"{density:.2g}"


def _overhead(results: Results) -> list[str]:
    callers = list(results.rows[0]["call_us"])
    header = ["microseconds a call", *(row["key"] for row in results.rows)]
    rows = [
        [caller, *(spread(row["call_us"][caller]) for row in results.rows)]
        for caller in callers
    ]
    return [table(header, rows)]


def _accuracy(results: Results) -> list[str]:
    rows = results.rows
    header = ["convolution", "density", "algorithm", "ours", "TF FP32", ""]
    lines = [
        [
            row["shape"],
            f"{row['case']['density']:g}",
            row["algorithm"],
            f"{row['ours']:.2e}",
            f"{row['dense']:.2e}",
            "" if row["ours"] <= row["dense"] else "worse",
        ]
        for row in rows
    ]
    count = sum(line[-1] == "worse" for line in lines)
    return [
        table(header, lines),
        f"Less exact than TensorFlow on {count} of {len(rows)} points.",
    ]


def _startup(results: Results) -> list[str]:
    header = ["convolution", "algorithm"]
    fields = (("dense_s", "TF"), ("first_s", "first"), ("prepared_s", "prepared"))
    places = [(t, field, n) for t in ("cold", "warm") for field, n in fields]
    header += [f"{name}, {temperature}, s" for temperature, _, name in places]

    def cells(row: Row) -> list[str]:
        times = [f"{row[temperature][field]:.2f}" for temperature, field, _ in places]
        return [row["shape"], row["warm"]["algorithm"], *times]

    return [table(header, map(cells, results.rows))]


_TABLES = {
    "figures": _convolutions,
    "layers": _convolutions,
    "crossover": _crossover,
    "overhead": _overhead,
    "accuracy": _accuracy,
    "training": _training,
    "startup": _startup,
}
