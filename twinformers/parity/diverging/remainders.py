"""What may remain when nothing else explains a difference: precision, a factor, an addend."""

from __future__ import annotations

from twinformers.parity.diverging.case import Case, Change, Variants, hypothesis
from twinformers.parity.diverging.values import distance


@hypothesis("dtype", "something inside is computed in less than float64")
def dtype(case: Case) -> Variants:
    for on in ("right", "left"):
        yield f"float64 throughout on the {on}", case.measure(on, widened=True)
    try:
        both = (
            case.output("left", change=Change(widened=True)),
            case.output("right", change=Change(widened=True)),
        )
    except Exception:  # as in `measure`
        return
    yield "float64 throughout on both", distance(*both, case.keep)


@hypothesis("constant factor", "one output is a multiple of the other")
def factor(case: Case) -> Variants:
    left, right = (case.target(on, False) for on in ("left", "right"))
    if left.shape == right.shape:
        a, b = left[case.keep(left)], right[case.keep(right)]
        if b.any():
            times = float((a * b).sum() / (b * b).sum())
            yield f"the right times {times:.10g}", distance(left, right * times, case.keep)


@hypothesis(
    "missing bias", "the difference is the same for every token: an addend is missing, or another one"
)
def bias(case: Case) -> Variants:
    left, right = (case.target(on, False) for on in ("left", "right"))
    if left.shape == right.shape and left.ndim >= 2:
        a, b = left[case.keep(left)], right[case.keep(right)]
        addend = (a - b).reshape(-1, left.shape[-1]).mean(0)
        yield "the same addend for every token", distance(left, right + addend, case.keep)
