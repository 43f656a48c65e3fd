"""Pictures of the result: every task against transformers, and how time and memory grow."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twinformers.benchmarks.results import BenchResult, Row, rate, seconds
from twinformers.errors import DestinationError, MissingDependency
from twinformers.parity.page import NAMES

COLOURS = {"jax": "#0550ae", "torch": "#9a4b00", "transformers": "#6e7781"}
AXES = {"length": "tokens", "batch": "sequences", "size": "layers"}


def check_plots(folder: str | Path) -> Path:
    """The folder, made if need be. Raises DestinationError where it cannot be, MissingDependency."""
    _matplotlib()
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(
            "the folder for the plots cannot be made", where=str(folder), found=error.strerror or str(error)
        ) from error
    return folder


def write_plots(result: BenchResult, folder: str | Path) -> list[Path]:
    """Write the pictures as speed.png, speed-length.png and so on; the paths. Errors as `check_plots`."""
    folder, written = check_plots(folder), []
    for name, figure in _figures(result):
        path = folder / f"{name}.png"
        try:
            figure.savefig(path, dpi=150, metadata={"Software": None})
        except OSError as error:
            raise DestinationError(
                "the plot cannot be written", where=str(path), found=error.strerror or str(error)
            ) from error
        written.append(path)
    return written


def drawings(result: BenchResult) -> list[str]:
    """The pictures as SVG elements; none where matplotlib is not installed."""
    found = []
    try:
        figures = list(_figures(result))
    except MissingDependency:
        return []
    for _, figure in figures:
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        found.append("<svg" + text.getvalue().partition("<svg")[2])
    return found


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise MissingDependency("plots need matplotlib", hint="pip install 'twinformers[report]'") from None
    return matplotlib


def _figures(result: BenchResult) -> Iterator[tuple[str, Any]]:
    measured = [r for r in result.rows if r.seconds]
    plain = [r for r in measured if not r.case.sweep]
    if plain:
        yield "speed", _bars(plain, result)
    for sweep in dict.fromkeys(r.case.sweep for r in measured if r.case.sweep):
        yield f"speed-{sweep}", _growth([r for r in measured if r.case.sweep == sweep], sweep, result)


def best(rows: Sequence[Row]) -> list[Row]:
    """The fastest row of each framework."""
    found: dict[str, Row] = {}
    for r in sorted(rows, key=lambda r: r.seconds or 0.0):
        found.setdefault(r.framework, r)
    return [found[name] for name in COLOURS if name in found]


def _bars(rows: Sequence[Row], result: BenchResult) -> Any:
    """How many times faster than transformers (or than the slowest, without it), with the figure itself."""
    tasks = list(dict.fromkeys(r.case for r in rows))
    figure = _matplotlib().figure.Figure(figsize=(9, 1 + 0.8 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    for place, case in enumerate(tasks):
        chosen = best([r for r in rows if r.case == case])
        slowest = max(r.seconds for r in chosen if r.seconds)
        for n, r in enumerate(chosen):
            assert r.seconds
            ratio = r.ratio or slowest / r.seconds
            y = place + (n - (len(chosen) - 1) / 2) * 0.27
            axes.barh(y, ratio, 0.24, color=COLOURS[r.framework], label=_once(axes, r.framework))
            speed = f"{rate(r.tokens_per_second)} tokens/s" if r.tokens_per_second else seconds(r.seconds)
            axes.text(ratio, y, f" {ratio:.2f}x, {speed}", va="center", fontsize=8)
    axes.set_yticks(range(len(tasks)), [case.label for case in tasks])
    axes.invert_yaxis()
    axes.axvline(1, color="#6e7781", linewidth=0.8)
    axes.set_xlim(right=1.35 * axes.get_xlim()[1])  # room for the figures
    axes.set_xlabel(
        "times as fast as the fastest of transformers" if any(r.ratio for r in rows) else "times as fast"
    )
    axes.set_title(f"{result.source}, {result.dtype}", fontsize=10, parse_math=False)
    axes.legend(fontsize=8)
    return figure


def _growth(rows: Sequence[Row], sweep: str, result: BenchResult) -> Any:
    """Time above memory, a column for each task, both on logarithmic scales."""
    tasks = list(dict.fromkeys(r.case.task for r in rows))
    library = _matplotlib()
    figure = library.figure.Figure(figsize=(4.5 * len(tasks), 6), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        above, below = grid[:, column]
        here = [r for r in rows if r.case.task == task]
        for name, colour in COLOURS.items():
            line = [
                r
                for case in dict.fromkeys(r.case for r in here)
                for r in best([x for x in here if x.case == case])
            ]
            line = [r for r in line if r.framework == name]
            if not line:
                continue
            x = [_along(r, sweep) for r in line]
            options = {"marker": "o", "markersize": 4, "color": colour, "label": NAMES.get(name, name)}
            above.plot(x, [r.seconds for r in line], **options)
            below.plot(x, [(r.device_bytes or r.peak_bytes or 0) / 1e9 for r in line], **options)
        above.set(title=task, ylabel="time", xscale="log", yscale="log")
        # Sizes stand where they were measured, times as the table has them.
        sizes = sorted({_along(r, sweep) for r in here})
        above.set_xticks(sizes, [str(size) for size in sizes])
        above.yaxis.set_major_locator(library.ticker.LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(lambda value, _: seconds(value))
        for axis in (above.xaxis, above.yaxis):
            axis.set_minor_locator(library.ticker.NullLocator())
        below.set(xlabel=AXES[sweep], ylabel="peak memory, GB")
        below.set_ylim(bottom=0)
        above.legend(fontsize=8)
        for axes in (above, below):
            axes.grid(alpha=0.3)
    figure.suptitle(f"{result.source}, {result.dtype}", fontsize=10, parse_math=False)
    return figure


def _along(row: Row, sweep: str) -> int:
    return {"length": row.case.tokens, "batch": row.case.batch, "size": row.case.layers or 0}[sweep]


def _once(axes: Any, framework: str) -> str | None:
    """The name for the legend, when it is not there yet."""
    name = NAMES.get(framework, framework)
    return None if name in axes.get_legend_handles_labels()[1] else name
