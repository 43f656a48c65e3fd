"""The backward pass, piece by piece: the same inputs and the same gradient of the output on both sides.

What a submodule gives back, for its arguments and for its parameters, must agree. Pieces are taken in reverse
order of execution, the parts of a piece before the piece: the first that fails is to blame by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinformers.parity.diverging.sides import Call, Pullback, Side
from twinformers.parity.diverging.values import Layout, Leaves, distance, pair_leaves
from twinformers.parity.limits import SMALL_GRADIENT


@dataclass(frozen=True)
class Gap:
    """One gradient that differs: of an argument or a parameter, by its name on the left, and why."""

    name: str
    difference: float
    reason: str
    note: str


@dataclass
class Backward:
    """Compares what the two sides give back. `names` maps the left's submodules to the right's."""

    left: Side
    right: Side
    names: dict[str, str]
    keep: Callable[[np.ndarray], Any]
    layouts: Callable[[str], Layout | None]
    given: Callable[[Call, Call], Leaves]

    def gaps(self, ours: Call, theirs: Call, limit: float) -> tuple[dict[str, float], list[Gap]]:
        """Every gradient's difference by the left's name, and those beyond the limit."""
        layout = self.layouts(ours.path)
        cotangent = np.random.default_rng(0).standard_normal(ours.output.shape)
        cotangent = np.where(_rows(self.keep(cotangent), cotangent), cotangent, 0)  # padding means nothing
        left = self.left.pullback(ours, {}, cotangent)
        values = self.given(ours, theirs)
        right = self.right.pullback(theirs, values, layout.to_right(cotangent) if layout else cotangent)
        pairs = self._pairs(ours, theirs, left, right)
        floor = SMALL_GRADIENT * max(
            (float(np.abs(b).max()) for _, b in pairs.values() if b.size), default=0.0
        )
        differences, gaps = {}, []
        for name, (a, b) in pairs.items():
            differences[name] = distance(a, b, lambda x: ..., floor)
            if differences[name] > limit:
                gaps.append(Gap(name, differences[name], *_reason(name, a, b, limit)))
        return differences, gaps

    def _pairs(
        self, ours: Call, theirs: Call, left: Pullback, right: Pullback
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Gradients that correspond. What is a parameter on one side alone counts as zero on the other."""
        layout, found = self.layouts(ours.path), {}
        moved = {n: layout.to_right(x) if layout else x for n, x in ours.leaves.items()}
        for b, a in pair_leaves(moved, theirs.leaves).items():
            if a in left.arguments and b in right.arguments:
                x = right.arguments[b]
                found[f"argument {a}"] = left.arguments[a], layout.to_left(x, ours.leaves[a]) if layout else x
        base, other = ours.path.partition("#")[0], theirs.path.partition("#")[0]
        have = {"left": self.left.parameters(base), "right": self.right.parameters(other)}
        for name, x in have["left"].items():
            there = self._there(base, other, name)
            if there in have["right"] and (name in left.parameters or there in right.parameters):
                y = have["right"][there]
                found[f"parameter {name}"] = (
                    left.parameters.get(name, np.zeros(x.shape)),
                    right.parameters.get(there, np.zeros(y.shape)),
                )
        return found

    def _there(self, base: str, other: str, name: str) -> str:
        """The right's name, relative to its submodule, of a parameter of the left's."""
        owner, _, leaf = name.rpartition(".")
        whole = ".".join(part for part in (self.left.own_path(base), owner) if part)
        pairs = {self.left.own_path(a): self.right.own_path(b) for a, b in self.names.items()}
        above = self.right.own_path(other)
        relative = pairs.get(whole, whole).removeprefix(above).lstrip(".")
        return f"{relative}.{leaf}" if relative else leaf


def _rows(chosen: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A choice among the first axes, for all of the others."""
    return np.asarray(chosen).reshape(np.shape(chosen) + (1,) * (x.ndim - np.ndim(chosen)))


def _reason(name: str, left: np.ndarray, right: np.ndarray, limit: float) -> tuple[str, str]:
    """Why two gradients differ, as far as they tell: the name of the reason, and a sentence."""
    for side, x, other in (("left", left, right), ("right", right, left)):
        if not x.any() and other.any():
            note = f"{name} gets no gradient on the {side}: stopped, detached, or no parameter there"
            return "no gradient", note
    if left.shape == right.shape and right.any():
        times = float((left * right).sum() / (right * right).sum())
        if distance(left, right * times, lambda x: ...) <= limit:
            return "constant factor", f"the left's gradient of {name} is {times:.10g} times the right's"
    return "", f"the gradient of {name} differs"
