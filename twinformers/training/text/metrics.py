"""What a run says of itself: a line of JSON for each update, and a plot of the losses."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinformers.checkpoints.files import read_file
from twinformers.errors import FormatError
from twinformers.training.text.settings import write_whole

METRICS, PLOT = "metrics.jsonl", "loss.png"
#: The fields that a resumed run repeats to the last bit; the others are times.
EXACT = ("step", "loss", "norm", "rate", "eval_loss")


class MetricsLog:
    """`metrics.jsonl`, cut after the update that a run goes on from: `rows` are its lines.

    Where several processes train together, the first one alone reads and writes them.
    """

    def __init__(self, folder: Path, step: int, first: bool = True):
        self.rows: list[dict[str, Any]] = []
        self._file: Any = None
        if first:
            self._open(folder / METRICS, step)

    def _open(self, path: Path, step: int) -> None:
        self.rows = read_metrics(path)[:step] if path.exists() else []
        if [row.get("step") for row in self.rows] != list(range(1, step + 1)):
            raise FormatError(
                "the metrics and the checkpoint disagree",
                where=str(path),
                expected=f"a line for each update from 1 to {step}",
                found=f"{len(self.rows)} lines that fit",
                hint="the file was changed by hand; restore it, or start a new run",
            )
        write_whole(path, b"".join(map(_line, self.rows)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (as long as the run)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))

    def settle(self) -> None:
        """Return when the lines have reached the disk: a checkpoint relies on those before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first that is not whole."""
    rows = []
    for line in read_file(path, limit=1 << 34).splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def plot(runs: Mapping[str, Sequence[Mapping[str, Any]]], size: tuple[float, float] = (7, 4)) -> bytes:
    """The losses of runs by name as a PNG: a line over the updates, points for what was held out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    for n, (name, rows) in enumerate(runs.items()):
        # Dashes above a broad line: two curves that agree can both be seen.
        style: dict[str, Any] = {"linestyle": "--" if n else "-", "linewidth": 1.0 if n else 2.5}
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=name, color=f"C{n}", **style)
        held = [r for r in rows if "eval_loss" in r]
        if held:
            marker: dict[str, Any] = {"marker": "x" if n else "o", "markersize": 5 if n else 7}
            axes.plot(
                [r["step"] for r in held],
                [r["eval_loss"] for r in held],
                label=f"{name}, held out",
                color=f"C{n}",
                linestyle="none",
                markeredgecolor="black",
                **marker,
            )
    axes.set(xlabel="update", ylabel="cross-entropy per token")
    axes.grid(alpha=0.3)
    if runs:
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
