"""The page of `compare`: heat maps, histograms and tables of what was found."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from twinformers.parity.comparing.speed import Speed
from twinformers.parity.page import (
    PAIRS,
    Submodules,
    by_submodule,
    failures,
    growth,
    is_judged,
    severity,
    write_page,
)
from twinformers.parity.results import CheckResult

if TYPE_CHECKING:
    from twinformers.parity.compare import CompareResult


def write_comparison(result: CompareResult, path: str | Path) -> None:
    """Write one self-contained HTML file; it appears whole or not at all, in place of an earlier page.

    Raises DestinationError for a path that cannot be written or holds something else.
    """
    alike = [
        CheckResult("tokens", t.dtype, "jax", "torch", "", None, None, None, t.ok, t.note)
        for t in result.tokens
    ]
    checks = [*result.report.checks, *alike]
    table = by_submodule([r for r in checks if r.check != "gradients"])
    named = set(result.parameters)
    gradients = [r for r in checks if r.check == "gradients" and r.path in named]
    write_page(
        path,
        "compare.html.jinja",
        report=replace(result.report, ok=result.ok, checks=checks),
        result=result,
        judged=sum(is_judged(r) for r in checks),
        failures=failures(checks),
        maps=heat_maps(table),
        shades=SHADES,
        plot=growth(table),
        gradients=[
            histogram(dtype, [r for r in gradients if r.dtype == dtype])
            for dtype in table.dtypes
            if any(r.dtype == dtype for r in gradients)
        ],
        chart=CHART,
        speed=speed_rows(result.speed),
        others=table.others,
    )


SHADES = 8  # of the heat map, from the smallest difference to the largest


class Cell(NamedTuple):
    """One submodule of one layer: the pair that differs most there, and its shade from 0 to SHADES - 1."""

    path: str
    result: CheckResult
    shade: int


class HeatMap(NamedTuple):
    """One dtype of one stack of layers: `rows` are layers, with a cell or None for each of `columns`.

    `edges` are the powers of ten between which the shades lie, the same in all maps of a dtype.
    """

    dtype: str
    stack: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    edges: list[float]


def heat_maps(table: Submodules) -> list[HeatMap]:
    """Layers by kinds of submodule; what is in no layer is a map of one row."""
    maps = []
    for dtype in table.dtypes:
        worst: dict[str, CheckResult] = {}
        for path in itertools.chain.from_iterable(members for _, members in table.blocks):
            found = [table.cells[path, dtype, pair] for pair in PAIRS if (path, dtype, pair) in table.cells]
            if found:
                worst[path] = max(found, key=severity)
        values = [r.max_rel for r in worst.values() if r.max_rel and math.isfinite(r.max_rel)]
        low = math.floor(math.log10(min(values))) if values else -1
        high = max(math.ceil(math.log10(max(values))) if values else 0, low + 1)

        stacks: dict[str, dict[str, dict[str, Cell]]] = {}
        for path, r in worst.items():
            stack, number, inside = _placed(path)
            row = stacks.setdefault(stack, {}).setdefault(number, {})
            row[inside] = Cell(path, r, _shade(r.max_rel, low, high))
        edges = [low + (high - low) * k / SHADES for k in range(SHADES + 1)]
        for stack, layers in stacks.items():
            columns = list(dict.fromkeys(name for row in layers.values() for name in row))
            rows = [(number, [row.get(c) for c in columns]) for number, row in layers.items()]
            maps.append(HeatMap(dtype, stack, columns, rows, edges))
    return maps


def _placed(path: str) -> tuple[str, str, str]:
    """Stack, layer and submodule in it: "layers.3.mlp.up_proj" -> "layers", "3", "mlp.up_proj"."""
    match = re.fullmatch(r"(.*?)\.(\d+)(?:\.(.*)|(#\d+))?", path)
    return (match[1], match[2], match[3] or f"the layer{match[4] or ''}") if match else ("", "", path)


def _shade(value: float | None, low: int, high: int) -> int:
    if value is None or not math.isfinite(value):
        return SHADES - 1
    if not value:
        return 0
    return min(max(int((math.log10(value) - low) / (high - low) * SHADES), 0), SHADES - 1)


WORST = 12  # parameters that the table of gradients names


class Bar(NamedTuple):
    """One column of the histogram: its place and height in the picture, what it holds and how many."""

    x: float
    y: float
    label: str
    number: int


class Histogram(NamedTuple):
    """Gradients of one dtype by parameter: the worst of them, and how many differ by how much.

    `width` is that of a column.
    """

    dtype: str
    worst: list[CheckResult]
    total: int
    bars: list[Bar]
    width: float


CHART = {"width": 960, "height": 240, "left": 48, "top": 24, "floor": 196}


def histogram(dtype: str, results: Sequence[CheckResult]) -> Histogram:
    """Count by quarters of a power of ten; what is bit-identical, or without a figure, has its own column."""
    counts: dict[float, int] = {}
    for r in results:
        value = r.max_rel
        if value is None:
            place = math.inf
        else:
            place = math.floor(4 * math.log10(value)) / 4 if value else -math.inf
        counts[place] = counts.get(place, 0) + 1
    finite = [p for p in counts if math.isfinite(p)]
    steps = int(4 * (max(finite) - min(finite))) + 1 if finite else 0
    places = [min(finite) + n / 4 for n in range(steps)] if finite else []
    places = [p for p in (-math.inf,) if p in counts] + places + [p for p in (math.inf,) if p in counts]
    step = min((CHART["width"] - CHART["left"]) / max(len(places), 1), 80)
    most = max(counts.values(), default=1)

    def label(place: float) -> str:
        if not math.isfinite(place):
            return "0" if place < 0 else "none"
        whole = place == int(place) or (place == min(finite) and place % 1 <= 0.5)  # not two side by side
        return f"{10**place:.0e}" if whole else ""

    bars = [
        Bar(
            round(CHART["left"] + n * step, 1),
            round(CHART["floor"] - counts.get(p, 0) / most * (CHART["floor"] - CHART["top"]), 1),
            label(p),
            counts.get(p, 0),
        )
        for n, p in enumerate(places)
    ]
    ranked = sorted(results, key=severity, reverse=True)
    return Histogram(dtype, ranked[:WORST], len(results), bars, round(step - 2, 1))


class SpeedRow(NamedTuple):
    """One quantity: for each framework its text, and its share of the largest in percent, or None."""

    label: str
    cells: list[tuple[str, float | None]]


#: What is measured: its name for people, and how a figure is written.
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill_tokens_per_second": ("prompt, tokens/s", lambda x: f"{x:,.0f}"),
    "decode_tokens_per_second": ("one by one, tokens/s", lambda x: f"{x:,.1f}"),
    "load_seconds": ("loading, s", lambda x: f"{x:.2f}"),
    "compile_seconds": ("compiling, s", lambda x: f"{x:.2f}"),
    "imported_bytes": ("memory once imported, MiB", lambda x: f"{x / 2**20:,.0f}"),
    "peak_bytes": ("memory at its peak, MiB", lambda x: f"{x / 2**20:,.0f}"),
    "device_bytes": ("accelerator at its peak, MiB", lambda x: f"{x / 2**20:,.0f}"),
}


def speed_rows(speed: Sequence[Speed]) -> list[SpeedRow]:
    """A row for each quantity that any framework has."""
    rows = []
    for name, (label, written) in MEASURES.items():
        values = [getattr(s, name) for s in speed]
        largest = max((v for v in values if v is not None), default=None)
        if largest is not None:
            cells = [
                ("–", None) if v is None else (written(v), 100 * v / largest if largest else 0.0)
                for v in values
            ]
            rows.append(SpeedRow(label, cells))
    return rows
