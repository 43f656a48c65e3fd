"""`twinformers verify`"""

from __future__ import annotations

from twinformers.cli.output import console, print_json, progress
from twinformers.parity.verify import CHECKS, verify


def run(
    source: str,
    *,
    dtypes: list[str],
    checks: list[str],
    jax_device: str | None,
    torch_device: str | None,
    json: bool,
) -> int:
    with progress("verifying", json=json) as bar:
        report = verify(
            source,
            dtypes=dtypes or ("float64", "float32"),
            checks=checks or CHECKS,
            jax_device=jax_device,
            torch_device=torch_device,
            on_progress=lambda text: bar.update(bar.task_ids[0], description=text),
        )
    if json:
        print_json(report.to_dict())
        return 0 if report.ok else 1
    from rich.table import Table

    table = Table("check", "dtype", "left", "right", "worst at", "max_rel", "limit", "ok")
    groups: dict[tuple[str, ...], list] = {}
    for r in report.checks:
        groups.setdefault((r.check, r.dtype, r.left, r.right), []).append(r)
    for key, rows in groups.items():
        worst = max(rows, key=lambda r: (not r.ok, r.max_rel or 0.0))
        figure = "" if worst.max_rel is None else f"{worst.max_rel:.1e}"
        limit = "reported" if worst.limit is None and worst.max_rel is not None else worst.limit
        verdict = "ok" if all(r.ok for r in rows) else "FAILED"
        table.add_row(*key, worst.path or "logits", figure, str(limit or "equal"), verdict)
    console().print(table)
    console().print("The twins agree." if report.ok else "A check failed.")
    return 0 if report.ok else 1
