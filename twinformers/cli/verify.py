"""`twinformers verify`"""

from __future__ import annotations

from pathlib import Path

from twinformers.checkpoints import opened
from twinformers.cli.output import console, print_json, progress
from twinformers.parity.page import check_destination, failures, is_judged, severity
from twinformers.parity.report import write_report
from twinformers.parity.verify import CHECKS, CheckResult, VerifyReport, verify


def run(
    source: str,
    *,
    dtypes: list[str],
    checks: list[str],
    against: str | None,
    attention: str,
    steps: int,
    jax_device: str | None,
    torch_device: str | None,
    report_file: Path | None,
    json: bool,
) -> int:
    if report_file:
        check_destination(report_file)  # before minutes of work, not after
    with opened(source) as checkpoint, progress("verifying", json=json) as bar:
        report = verify(
            checkpoint,
            dtypes=dtypes or ("float64", "float32"),
            checks=checks or CHECKS,
            against=against,
            attention=attention,
            steps=steps,
            jax_device=jax_device,
            torch_device=torch_device,
            on_progress=lambda text: bar.update(bar.task_ids[0], description=text),
        )
        if report_file:
            write_report(
                report,
                report_file,
                checkpoint=checkpoint,
                jax_device=jax_device,
                torch_device=torch_device,
            )
    if json:
        print_json(report.to_dict())
        return 0 if report.ok else 1
    show(report)
    if report_file:
        console().print(f"report: {report_file}", soft_wrap=True)
    return 0 if report.ok else 1


def is_silent(result: CheckResult) -> bool:
    """Whether nothing was compared, and the note says why."""
    return result.max_rel is None and not is_judged(result)


def show(report: VerifyReport) -> None:
    """A table for each dtype, with the worst figure of each comparison; then what failed, and the verdict."""
    from rich.table import Table

    groups: dict[str, dict[tuple[str, ...], list[CheckResult]]] = {}
    for r in report.checks:
        pair = f"{r.left}-{r.right}".replace("transformers", "hf")
        # The rounding model has one limit for rms and one for max; submodules share theirs.
        key = (r.check, pair, r.path if r.check == "rounding" else "")
        groups.setdefault(r.dtype, {}).setdefault(key, []).append(r)
    out = console()
    for dtype, kinds in groups.items():
        table = Table("check", "compared", title=dtype, title_justify="left", box=None)
        table.add_column("worst at", overflow="fold")  # a long path is broken, never cut
        table.add_column("max_rel", justify="right")
        table.add_column("limit", justify="right")
        table.add_column("verdict")
        for (check, pair, _), rows in kinds.items():
            worst = max(rows, key=severity)
            table.add_row(
                check,
                pair,
                worst.path or "logits",
                "" if worst.max_rel is None else f"{worst.max_rel:.1e}",
                "" if worst.limit is None else f"{worst.limit:.1e}",
                "FAILED"
                if not worst.ok
                else "ok"
                if is_judged(worst)
                else "not compared"
                if is_silent(worst)
                else "reported",
            )
        out.print(table)
    for f in failures(report.checks):
        r = f.first
        where = f"{r.check}, {r.dtype}, {r.left}-{r.right}: {f.failed} of {f.total}"
        out.print(f"FAILED {where}, first at {r.path or 'logits'}. {r.note}", soft_wrap=True)
    for note in dict.fromkeys(f"{r.check}, {r.dtype}: {r.note}" for r in report.checks if is_silent(r)):
        out.print(note, soft_wrap=True)
    if not report.ok:
        out.print("A check failed.")
    elif any(map(is_judged, report.checks)):
        out.print("The twins agree.")
    else:
        out.print("Nothing was judged: none of these figures has a limit.")
