"""The submodule that differs, and what it means to try a change on it.

Which side made a mistake cannot be known, and need not be: transposing a kernel back on the right undoes a
transposition on the left. So operations are changed where the module is PyTorch's, parameters on either side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinformers.parity.diverging.sides import Call, Side
from twinformers.parity.diverging.values import Layout, Leaves, distance

#: What a variant gives: the change in words, and the difference that it leaves.
Variants = Iterator[tuple[str, float]]


@dataclass
class Case:
    """The submodule that differs, on both sides, with the same inputs.

    `until` is the first submodule within it whose output differs, by its path on each side: up to there a
    variant needs to run before it is worth running to the end. `first` are the recorded calls of that one.
    """

    sides: dict[str, Side]
    calls: dict[str, Call]
    values: dict[str, Leaves]
    until: dict[str, str] | None
    first: dict[str, Call] | None
    keep: Callable[[np.ndarray], Any]
    layouts: Callable[[str], Layout | None]
    limit: float
    targets: dict[tuple[str, bool], np.ndarray] = field(default_factory=dict)

    @property
    def rewritable(self) -> str | None:
        """The side whose operations can be changed while it runs."""
        return next((n for n in ("right", "left") if self.sides[n].framework == "torch"), None)

    def output(self, on: str, *, part: bool = False, change: Change | None = None) -> np.ndarray:
        """What one side returns, changed or not, in the left's layout; with `part`, what `until` returns."""
        side, call, change = self.sides[on], self.calls[on], change or Change()
        values = {**self.values[on], **change.values}
        edit = side.edited(call.path, change.parameters) if change.parameters else contextlib.nullcontext()
        with edit, change.mode or contextlib.nullcontext():
            if change.widened:
                return self._aligned(on, side.widened(call, values), call.path)
            until = self.until[on] if part and self.until else None
            return self._aligned(on, side.call(call, values, until), until or call.path)

    def _aligned(self, on: str, x: np.ndarray, path: str) -> np.ndarray:
        if on == "left":
            return x
        layout = self.layouts(path)
        return layout.to_left(x, x) if layout else x

    def target(self, of: str, part: bool) -> np.ndarray:
        """What the other side returns, unchanged."""
        if (of, part) not in self.targets:
            self.targets[of, part] = self.output(of, part=part)
        return self.targets[of, part]

    def measure(self, on: str, **change: Any) -> float:
        """The difference that is left when one side is changed."""
        made, other = Change(**change), "left" if on == "right" else "right"
        try:
            if self.until and not made.widened:
                left = self._distance(on, self.output(on, part=True, change=made), self.target(other, True))
                if left > self.limit:
                    return left
            return self._distance(on, self.output(on, change=made), self.target(other, False))
        except Exception:  # a stranger's module may refuse a change in any way: then it explains nothing
            return math.inf

    def _distance(self, on: str, changed: np.ndarray, other: np.ndarray) -> float:
        left, right = (other, changed) if on == "right" else (changed, other)
        return distance(left, right, self.keep)

    def measure_mode(self, rules: Mapping[str, Any]) -> float:
        """The difference that is left when PyTorch's operations of these names go through rules."""
        from twinformers.parity.diverging.rewriting import Rewrite

        return self.measure(self.rewritable or "", mode=Rewrite(rules))

    def near(self, on: str) -> Leaves:
        """The parameters that the submodule itself or a direct child of it owns."""
        found = self.sides[on].parameters(self.calls[on].path)
        return {name: x for name, x in found.items() if name.count(".") < 2}

    def numbers(self) -> set[int]:
        """Whole numbers that the submodule knows: attributes, sizes and their divisors."""
        on = self.rewritable or ""
        module = self.sides[on].modules()[self.calls[on].path.partition("#")[0]]
        own = {v for m in module.modules() for v in vars(m).values() if type(v) is int and 1 < v < 2**16}
        sizes = {n for x in self.near(on).values() for n in x.shape}
        return own | {d for n in sizes for d in range(2, min(n, 1024) + 1) if n % d == 0}


@dataclass
class Change:
    """What a variant changes: operations, parameters, arguments, or the precision of everything."""

    mode: Any = None
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    widened: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """A kind of mistake: its name, what it means, and how to try it; whether that rewrites operations."""

    name: str
    meaning: str
    variants: Callable[[Case], Variants]
    rewrites: bool = False


def hypothesis(name: str, meaning: str, rewrites: bool = False) -> Callable[[Any], Hypothesis]:
    """Make a hypothesis of a function that tries its variants."""
    return lambda variants: Hypothesis(name, meaning, variants, rewrites)
