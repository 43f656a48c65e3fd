"""What a submodule is given: trees of arrays, their leaves by name, and which of two sides correspond."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Leaves = dict[str, np.ndarray]


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


def map_leaves(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """The tree with each array replaced by `change(name, array)`; names are dotted: "context.cos".

    Tuples, named tuples, lists and mappings are trees; all else is passed on as it is.
    """

    def below(key: Any, child: Any) -> Any:
        return map_leaves(child, change, f"{name}.{key}" if name else str(key))

    if is_array(value):
        return change(name, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(below(*pair) for pair in zip(value._fields, value, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(below(*pair) for pair in enumerate(value))
    if isinstance(value, Mapping):
        return {key: below(key, child) for key, child in value.items()}
    return value


def leaves(value: Any) -> dict[str, Any]:
    """The arrays of a tree by name, in order."""
    found: dict[str, Any] = {}
    map_leaves(value, lambda name, x: found.setdefault(name, x))
    return found


def first_array(value: Any) -> Any:
    """What a submodule is judged by: the first array that it returns, or None."""
    return next(iter(leaves(value).values()), None)


def distance(
    left: np.ndarray, right: np.ndarray, keep: Callable[[np.ndarray], Any], floor: float = 0
) -> float:
    """The largest difference, relative to the largest value on the right; infinite where nothing compares."""
    if left.shape != right.shape:
        return np.inf
    chosen = keep(right)
    a, b = np.asarray(left[chosen], np.float64), np.asarray(right[chosen], np.float64)
    if not a.size:
        return 0.0
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    worst, scale = float(np.abs(a - b).max()), max(float(np.abs(b).max()), floor)
    return worst / scale if scale else worst


def pair_leaves(left: Leaves, right: Leaves) -> dict[str, str]:
    """Which leaves of the right are given what the left was: {right name: left name}.

    Those of the same name; of the others those of the same value, and then, one after the other, the rest as
    long as shapes and kinds agree. What has no counterpart, each side keeps.
    """

    def alike(a: str, b: str) -> bool:
        kinds = [np.issubdtype(x.dtype, np.floating) for x in (left[a], right[b])]
        return left[a].shape == right[b].shape and kinds[0] == kinds[1]

    pairs = {name: name for name in right if name in left and alike(name, name)}
    for b in right:
        same = (
            a for a in left if a not in pairs.values() and alike(a, b) and np.array_equal(left[a], right[b])
        )
        if b not in pairs and (a := next(same, None)) is not None:
            pairs[b] = a
    rest = [a for a in left if a not in pairs.values()], [b for b in right if b not in pairs]
    for a, b in zip(*rest, strict=False):
        if not alike(a, b):
            break
        pairs[b] = a
    return pairs


def expand(paths: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """{left path: right path}, `{i}` standing for each number that `names`, the left's paths, have there."""
    found = {}
    for ours, theirs in paths.items():
        if "{i}" not in ours:
            found[ours] = theirs
            continue
        before, after = (re.escape(part) for part in ours.split("{i}"))
        for name in names:
            if match := re.fullmatch(rf"{before}(\d+){after}", name):
                found[name] = theirs.replace("{i}", match[1])
    return found


class Layout:
    """How an array's axes on the left become the right's: "b t d -> t b d", in einops notation.

    It holds for a submodule's output and for those of its arguments that have as many axes. Composite axes,
    as in "b t n h -> b t (n h)", are taken apart again by the sizes that the left's array has.
    """

    def __init__(self, pattern: str):
        self.left, self.right = (side.strip() for side in pattern.split("->"))

    def to_right(self, x: np.ndarray) -> np.ndarray:
        return self._move(x, self.left, self.right, {})

    def to_left(self, x: np.ndarray, like: np.ndarray) -> np.ndarray:
        sizes = dict(zip(self.left.split(), like.shape, strict=False)) if "(" in self.right else {}
        return self._move(x, self.right, self.left, sizes)

    def _move(self, x: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
        from einops import rearrange

        if x.ndim != len(re.findall(r"\([^)]*\)|\S+", source)):
            return x
        return np.ascontiguousarray(rearrange(x, f"{source} -> {target}", **sizes))
