"""`twinformers compare`"""

from __future__ import annotations

from pathlib import Path

from twinformers.checkpoints import opened
from twinformers.cli.output import console, print_json, progress
from twinformers.parity.compare import CompareResult, compare
from twinformers.parity.comparing.page import speed_rows, write_comparison
from twinformers.parity.page import NAMES, check_destination, failures


def run(
    source: str,
    *,
    report_file: Path | None,
    dtypes: list[str],
    prompt: str | None,
    max_new_tokens: int,
    timing: bool,
    jax_device: str | None,
    torch_device: str | None,
    json: bool,
) -> int:
    if report_file:
        check_destination(report_file)  # before minutes of work, not after
    with opened(source) as checkpoint, progress("comparing", json=json) as bar:
        result = compare(
            checkpoint,
            dtypes=dtypes or ("float64", "float32"),
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            timing=timing,
            jax_device=jax_device,
            torch_device=torch_device,
            on_progress=lambda text: bar.update(bar.task_ids[0], description=text),
        )
    if report_file:
        write_comparison(result, report_file)
    if json:
        print_json(result.to_dict())
    else:
        show(result)
        if report_file:
            console().print(f"report: {report_file}", soft_wrap=True)
    return 0 if result.ok else 1


def show(result: CompareResult) -> None:
    """Tokens and speed in a table each; then what failed, and the verdict."""
    from rich.table import Table

    out = console()
    table = Table("dtype", "compared", "same choice", "largest divergence", box=None)
    for t in result.tokens:
        for pair, share in t.agreement.items():
            worst = t.max_divergence[pair]
            table.add_row(t.dtype, pair, f"{share:.1%}", "not finite" if worst is None else f"{worst:.1e}")
    out.print(table)
    if result.speed:
        table = Table("", *(NAMES.get(s.framework, s.framework) for s in result.speed), box=None)
        for row in speed_rows(result.speed):
            table.add_row(row.label, *(text for text, _ in row.cells))
        out.print(table)
        for s in result.speed:
            if s.error:
                out.print(f"{s.framework} was not measured: {s.error}", soft_wrap=True)
    for file in result.sources:
        out.print(f"{file.name}.py: {file.different} of {file.statements} statements really differ")
    for f in failures(result.report.checks):
        r = f.first
        where = f"{r.check}, {r.dtype}, {r.left}-{r.right}: {f.failed} of {f.total}"
        out.print(f"FAILED {where}, first at {r.path or 'logits'}. {r.note}", soft_wrap=True)
    for t in result.tokens:
        if not t.ok:
            out.print(f"FAILED tokens, {t.dtype}, jax-torch. {t.note}", soft_wrap=True)
    out.print("The twins agree." if result.ok else "A check failed.")
