"""The figures: a row for each case and implementation, with its ratio and its distance from the limits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from twinformers.benchmarks.cases import Case

Peaks = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Row:
    """What one implementation needed for one case. `seconds` is the median of `runs`.

    `tokens_per_second` is the case's tokens over it. `ratio` is how many times faster it is than the fastest
    of transformers' variants; `fraction` the part of the machine's `bound` ("bandwidth" or "matrix") that the
    work amounts to: of `limit`, in bytes/s or FLOP/s, as measured between the runs. `compile_seconds` is by
    how much the first run took longer. Memory is the peak of the process, and of an accelerator. `error` says
    why there are no figures.
    """

    case: Case
    framework: str
    variant: str
    runs: list[float]
    seconds: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    bound: str = ""
    limit: float | None = None
    fraction: float | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """The implementation: "jax", "transformers sdpa"."""
        return f"{self.framework} {self.variant}".rstrip()


def row(
    case: Case,
    framework: str,
    variant: str,
    measured: Sequence[Mapping[str, Any]],
    first: float | None,
    error: str = "",
) -> Row:
    """The row of what was measured; `first` is the first run's seconds."""
    runs = [m["seconds"] for m in measured]
    empty = Row(case, framework, variant, runs, error=error)
    if error or not runs:
        return empty
    seconds = statistics.median(runs)
    if seconds <= 0:
        return replace(empty, error="too short to be measured: ask for more new tokens")
    steady = statistics.median(m.get("total", m["seconds"]) for m in measured)
    return replace(
        empty,
        seconds=seconds,
        tokens_per_second=case.produced / seconds if case.produced else None,
        compile_seconds=None if first is None else max(0.0, first - steady),
        peak_bytes=max(m["peak_bytes"] for m in measured),
        device_bytes=max((m["device_bytes"] for m in measured if m.get("device_bytes")), default=None),
    )


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of one case with their ratio to the fastest of transformers' own."""
    theirs = [r.seconds for r in rows if r.framework == "transformers" and r.seconds]
    return [replace(r, ratio=min(theirs) / r.seconds) if theirs and r.seconds else r for r in rows]


def limited(row: Row, work: tuple[str, float] | None, rounds: Sequence[Peaks], platform: str) -> Row:
    """The row with its part of the limit: `work` is what `cost` says, `rounds` what each round measured."""
    limit = steady(rounds, platform, work[0]) if work else None
    if not work or not limit or not row.seconds:
        return row
    return replace(row, bound=work[0], limit=limit, fraction=work[1] / row.seconds / limit)


def steady(rounds: Sequence[Peaks], platform: str, what: str) -> float | None:
    """The best on a platform of those that measured it in each round, by their medians."""
    measured: dict[str, list[float]] = {}
    for peaks in rounds:
        for by, value in peaks.get(platform, {}).get(what, {}).items():
            measured.setdefault(by, []).append(value)
    return max((statistics.median(values) for values in measured.values()), default=None)


@dataclass(frozen=True)
class BenchResult:
    """Everything that was measured, and where. `peaks`: the best of all rounds, by platform and kind."""

    source: str
    architecture: str
    parameters: int
    dtype: str
    repeats: int
    facts: dict[str, str]
    peaks: Peaks
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def seconds(value: float) -> str:
    """A time for people: 1.24 s, 83.1 ms."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def rate(value: float) -> str:
    """Tokens per second for people: 38.1, 12,410."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
