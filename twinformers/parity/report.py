"""One HTML page of what `verify` found: the verdict, every figure, and how the difference grows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from twinformers.checkpoints import Checkpoint
from twinformers.parity.page import PAIRS, by_submodule, facts, failures, growth, is_judged, write_page
from twinformers.parity.results import VerifyReport


def write_report(
    report: VerifyReport,
    path: str | Path,
    *,
    checkpoint: Checkpoint | None = None,
    jax_device: Any = None,
    torch_device: Any = None,
) -> None:
    """Write one self-contained HTML file; it appears whole or not at all, in place of an earlier report.

    `checkpoint` adds the configuration and the number of parameters; the devices are those that `verify`
    was given. Raises DestinationError for a path that cannot be written or holds something else.
    """
    table = by_submodule(report.checks)
    cells, blocks, dtypes, others = table
    paths = [path for _, members in blocks for path in members]
    columns = [(d, p) for d in dtypes for p in PAIRS if any((path, d, p) in cells for path in paths)]
    referred = any("transformers" in (r.left, r.right) for r in report.checks)
    write_page(
        path,
        "report.html.jinja",
        report=report,
        judged=sum(is_judged(r) for r in report.checks),
        failures=failures(report.checks),
        facts=facts(report, checkpoint, referred, jax_device, torch_device),
        config=checkpoint.config.to_dict() if checkpoint else {},
        columns=columns,
        dtypes=[(d, len(list(group))) for d, group in itertools.groupby(columns, lambda column: column[0])],
        blocks=blocks,
        cells=cells,
        plot=growth(table),
        others=others,
    )
