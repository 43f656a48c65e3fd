"""`twinformers diverge`"""

from __future__ import annotations

from twinformers.cli.output import console, print_json, progress
from twinformers.parity.diverge import DivergeReport, diverge

#: How many steps before the cause are shown.
BEFORE = 12


def run(left: str, right: str, *, gradients: bool, limit: float, json: bool) -> int:
    with progress("diverging", json=json) as bar:
        report = diverge(
            left,
            right,
            gradients=gradients,
            limit=limit,
            on_progress=lambda text: bar.update(bar.task_ids[0], description=text),
        )
    if json:
        print_json(report.to_dict())
    else:
        show(report)
    return 1 if report.diverged else 0


def show(report: DivergeReport) -> None:
    """The steps that lead to the cause, then the verdict."""
    from rich.table import Table

    out = console()
    if report.diverged:
        table = Table(box=None)
        table.add_column("submodule")
        table.add_column("as recorded", justify="right")
        table.add_column("same inputs", justify="right")
        table.add_column("verdict")
        if hidden := len(report.steps[:-BEFORE]):
            table.add_row(f"({hidden} before)", "", "", "")
        for step in report.steps[-BEFORE:]:
            figures = ("" if x is None else f"{x:.1e}" for x in (step.recorded, step.same_inputs))
            table.add_row(step.path or "the model itself", *figures, step.verdict)
        out.print(table)
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(report.verdict, soft_wrap=True)
