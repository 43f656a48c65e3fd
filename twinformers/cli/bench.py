"""`twinformers bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twinformers.benchmarks.cases import TASKS, cases, swept
from twinformers.benchmarks.page import HEAD, cells, check_report, heading, limits, notes, write_report
from twinformers.benchmarks.plots import check_plots, write_plots
from twinformers.benchmarks.results import BenchResult
from twinformers.benchmarks.running import bench
from twinformers.checkpoints import opened
from twinformers.cli.output import console, print_json, progress


def run(
    source: str,
    *,
    tasks: list[str],
    sizes: dict[str, Any],
    sweep: str | None,
    options: dict[str, Any],
    report_file: Path | None,
    plots: Path | None,
    json: bool,
) -> None:
    every = SWEPT if sweep else TASKS
    # What is rounded is not trained: by default it is not tried either.
    chosen = cases(tasks or [t for t in every if t != "train" or not options["quantize"]], **sizes)
    if report_file:
        check_report(report_file)  # before minutes of work, not after
    if plots:
        check_plots(plots)
    with opened(source) as checkpoint, progress("measuring", json=json) as bar:
        if sweep:
            # The batches of a sweep are its own.
            first = {case.task: case for case in reversed(chosen)}
            chosen = [c for case in reversed(first.values()) for c in swept(case, sweep, checkpoint.config)]
        result = bench(
            checkpoint,
            chosen,
            **options,
            on_progress=lambda text: bar.update(bar.task_ids[0], description=text),
        )
    pictures = write_plots(result, plots) if plots else []
    if report_file:
        write_report(result, report_file, pictures)
    if json:
        print_json(result.to_dict())
        return
    show(result)
    for path in [*([report_file] if report_file else []), *pictures]:
        console().print(f"written: {path}", soft_wrap=True)


SWEPT = ("decode", "prefill", "train")


def show(result: BenchResult) -> None:
    """A table for each case, then what was not measured, and the limits."""
    from rich.table import Table

    out = console()
    out.print(heading(result), soft_wrap=True)
    for case in dict.fromkeys(row.case for row in result.rows):
        table = Table(title=case.label, title_justify="left", box=None)
        for n, name in enumerate(HEAD[1:]):
            table.add_column(name, justify="right" if n else "left", no_wrap=True)
        for row in result.rows:
            if row.case == case:
                table.add_row(*cells(row)[1:])
        out.print(table)
    for note in (*notes(result), *limits(result)):
        out.print(note, soft_wrap=True)
