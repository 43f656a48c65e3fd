"""The outcome of a comparison, and the comparison itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twinformers.parity.limits import limit


@dataclass(frozen=True)
class CheckResult:
    """One comparison of `left` with `right`, at the submodule `path` ("" is the logits).

    `max_rel` is max|left - right| / max|right| over the tensor. `limit` bounds `max_rel`; None means that the
    figure is reported and not judged. Results of the check "rounding" have the path "rms" or "max", for the
    root mean square or the largest difference of the logits, relative to the same max|right|. `note` says
    what figures cannot.
    """

    check: str
    dtype: str
    left: str
    right: str
    path: str
    max_abs: float | None
    max_rel: float | None
    limit: float | None
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of one source; `ok` if none failed."""

    ok: bool
    source: str
    architecture: str
    checks: list[CheckResult]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    check: str,
    dtype: str,
    left: str,
    right: str,
    path: str,
    a: np.ndarray,
    b: np.ndarray,
    floor: float = 0.0,
) -> CheckResult:
    """Relative to the largest value on the right, or to `floor` where that is larger; 0/0 is 0."""
    most = limit(check, dtype)
    if a.shape != b.shape:
        note = f"shapes {list(a.shape)} and {list(b.shape)}"
        return CheckResult(check, dtype, left, right, path, None, None, most, False, note)
    largest, finite = float(np.abs(b).max()), bool(np.isfinite(a).all() and np.isfinite(b).all())
    if not finite:  # NaN compares as neither larger nor smaller, so it must fail by name
        return CheckResult(check, dtype, left, right, path, None, None, most, False, "not finite")
    worst = float(np.abs(a - b).max())
    relative = worst / scale if (scale := max(largest, floor)) else worst
    return CheckResult(
        check, dtype, left, right, path, worst, relative, most, most is None or relative <= most
    )
