"""The result for people: one table, as Markdown or as an HTML page, with plots and what ran where."""

from __future__ import annotations

import os
from pathlib import Path

from twinformers.benchmarks import plots
from twinformers.benchmarks.results import BenchResult, Row, rate, seconds
from twinformers.cli.output import size
from twinformers.errors import UsageError
from twinformers.parity.page import NAMES, check_destination, write_page, write_text

HEAD = (
    "task",
    "implementation",
    "median",
    "spread",
    "tokens/s",
    "ratio",
    "of limit",
    "compiling",
    "memory",
)
TITLE = "# Speed of "
#: What `of the limit` is a part of.
LIMITS = {"bandwidth": ("read bandwidth", "GB/s"), "matrix": ("matrix products", "GFLOP/s")}
EXPLAINED = """\
Each framework runs in a process of its own, on the same weights, and measures in turn with the others; times
are medians, and the spread is half of what lies between the slowest and the fastest. The ratio says how many
times faster an implementation is than the fastest of transformers’ own. “Of limit” is the part of the read
bandwidth (decoding: weights and cache, read once a step) or of the matrix products (prefill, training) that
the work amounts to at the least; both are measured before each round, and their median counts, by the
framework that is fastest at it. Compiling is what the first run took beyond later ones. Memory is the peak of
the process, or of the accelerator; what a process frees, it keeps for what comes next where the C library can
(glibc)."""


def cells(row: Row) -> list[str]:
    """The row of the table, under `HEAD`."""
    name = f"{NAMES.get(row.framework, row.framework)} {row.variant}".rstrip()
    if row.error or row.seconds is None:
        return [row.case.label, name, "not measured", *[""] * (len(HEAD) - 3)]
    spread = (max(row.runs) - min(row.runs)) / 2 / row.seconds
    memory = row.device_bytes or row.peak_bytes
    return [
        row.case.label,
        name,
        seconds(row.seconds),
        f"±{spread:.0%}",
        "" if row.tokens_per_second is None else rate(row.tokens_per_second),
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.fraction is None else f"{row.fraction:.0%}",
        "" if row.compile_seconds is None else seconds(row.compile_seconds),
        "" if memory is None else size(memory),
    ]


def notes(result: BenchResult) -> list[str]:
    """Why rows are empty, each reason once."""
    found = (f"{r.name} was not measured: {r.case.label}: {r.error}" for r in result.rows if r.error)
    return list(dict.fromkeys(found))


def limits(result: BenchResult) -> list[str]:
    """The limits of each platform, the best of all rounds, the fastest first."""
    found = []
    for platform, kinds in result.peaks.items():
        for what, values in kinds.items():
            name, unit = LIMITS[what]
            ranked = sorted(values.items(), key=lambda item: -item[1])
            each = ", ".join(f"{value / 1e9:.3g} {unit} in {by}" for by, value in ranked)
            found.append(f"{name} on {platform}, at its best: {each or 'not measured'}")
    return found


def heading(result: BenchResult) -> str:
    return f"{result.source}, {result.parameters:,} parameters, {result.dtype}, medians of {result.repeats}"


def markdown(result: BenchResult, pictures: list[str]) -> str:
    """The page as Markdown; `pictures` are the paths of the plots as the page is to name them."""
    lines = [f"{TITLE}{result.source}", "", f"{heading(result)}.", "", EXPLAINED, ""]
    lines += [_line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(cells(row)) for row in result.rows]
    for name in pictures:
        lines += ["", f"![{Path(name).stem}]({name})"]
    lines += ["", *(f"- {note}" for note in (*notes(result), *limits(result)))]
    lines += [f"- {name}: {value}" for name, value in result.facts.items()]
    return "\n".join(lines) + "\n"


def _line(values: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(value.replace('|', '/') for value in values)} |"


def check_report(path: str | Path) -> Path:
    """The path, if a report can be written there; asked before minutes of work.

    Raises UsageError for an ending that is neither .md nor .html, DestinationError for a path that cannot be
    written or that holds something else.
    """
    path = Path(path).expanduser()
    if path.suffix == ".html":
        return check_destination(path)
    if path.suffix != ".md":
        raise UsageError(
            "unknown kind of report", where="report", expected="NAME.html or NAME.md", found=str(path)
        )
    return check_destination(path, TITLE)


def write_report(result: BenchResult, path: str | Path, pictures: list[Path]) -> None:
    """Write the page whole; .html has its plots in itself, .md names `pictures`. Errors as `check_report`."""
    path = check_report(path)
    if path.suffix == ".html":
        from markupsafe import Markup

        write_page(
            path,
            "bench.html.jinja",
            report=result,
            title=heading(result),
            head=HEAD,
            rows=[cells(row) for row in result.rows],
            notes=[*notes(result), *limits(result)],
            text=EXPLAINED,
            pictures=[Markup(drawing) for drawing in plots.drawings(result)],
        )
        return
    names = [os.path.relpath(p, path.parent.resolve()) for p in map(Path.resolve, pictures)]
    write_text(path, markdown(result, names), TITLE)
