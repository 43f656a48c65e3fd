"""Mistakes that people make when they port a model, each tried on the submodule that differs.

A hypothesis makes one change to one side, runs the submodule again with the same inputs and measures what is
left of the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from twinformers.parity.diverging import operations, parameters, positions, remainders
from twinformers.parity.diverging.case import Case
from twinformers.parity.diverging.values import distance

#: In the order in which they are tried: what is quick first, what explains least last.
HYPOTHESES = (
    parameters.transposed,
    parameters.exchanged,
    parameters.norm_offset,
    parameters.rounded,
    parameters.head,
    parameters.rotary_pairs,
    parameters.grouping,
    operations.epsilon,
    operations.activation,
    operations.attention_scale,
    operations.mask,
    positions.theta,
    positions.position_offset,
    positions.embedding_scale,
    remainders.dtype,
    remainders.factor,
    remainders.bias,
)


@dataclass(frozen=True)
class Explanation:
    """A hypothesis that was tried on the cause: its change, and the difference before and after it.

    `after` is infinite where the change could not be made.
    """

    hypothesis: str
    meaning: str
    change: str
    before: float
    after: float


def explanations(case: Case) -> Iterator[Explanation]:
    """Every change that can be tried on these two sides, one at a time."""
    right = case.output("right", part=bool(case.until))
    before = distance(case.target("left", bool(case.until)), right, case.keep)
    for one in HYPOTHESES:
        if case.rewritable or not one.rewrites:
            for change, after in one.variants(case):
                yield Explanation(one.name, one.meaning, change, before, after)
