"""Mistakes in where a token is: rotary angles, offsets, and the scale of what positions are added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from twinformers.parity.diverging.case import Case, Variants, hypothesis
from twinformers.parity.diverging.values import Leaves


@dataclass(frozen=True)
class Turning:
    """Cosines and sines found among arguments: their names, and the angle from one token to the next."""

    cos: str
    sin: str
    frequencies: np.ndarray


def turning(leaves: Leaves) -> Turning | None:
    """Two arrays whose squares add up to one are the cosine and the sine of some angles."""
    tables = [(n, x) for n, x in leaves.items() if x.dtype.kind == "f" and x.ndim >= 2 and x.shape[-2] > 1]
    for n, (a, x) in enumerate(tables):
        for b, y in tables[n + 1 :]:
            if x.shape == y.shape and np.abs(x * x + y * y - 1).max() < 1e-6:
                # The slowest angle is small: its cosine is the larger one.
                (cos, c), (sin, s) = (
                    ((a, x), (b, y)) if x[..., -1].sum() > y[..., -1].sum() else ((b, y), (a, x))
                )
                step = np.diff(np.arctan2(s, c), axis=-2)
                step = (step + np.pi) % (2 * np.pi) - np.pi
                return Turning(cos, sin, np.median(step.reshape(-1, step.shape[-1]), axis=0))
    return None


def _distinct(frequencies: np.ndarray) -> int:
    """How many there are: some write them twice, one row after the other."""
    size, half = len(frequencies), len(frequencies) // 2
    twice = size % 2 == 0 and np.allclose(frequencies[:half], frequencies[half:], rtol=1e-6)
    return half if twice else size


def _base(frequencies: np.ndarray) -> str:
    """What a row of frequencies is called: theta, or that they follow none."""
    size = _distinct(frequencies)
    frequencies = frequencies[:size]
    thetas = [abs(f) ** (-size / j) for j, f in enumerate(frequencies) if j and f]
    if thetas and np.allclose(thetas, thetas[0], rtol=1e-5):
        return f"theta {thetas[0]:.6g}"
    return f"frequencies of no one theta ({', '.join(f'{f:.3g}' for f in frequencies[:5])})"


COMMON_THETAS = (1e4, 1e5, 5e5, 1e6, 1.3e5, 2.5e5, 1e7)


@hypothesis(
    "theta",
    "rotary positions turn at other frequencies, which theta and its scaling determine",
    rewrites=True,
)
def theta(case: Case) -> Variants:
    import torch

    on = case.rewritable or ""
    other = "left" if on == "right" else "right"
    # The culprit is given its tables, or makes them and gives them to a part.
    places = [calls for calls in (case.calls, case.first) if calls]
    (ours, _), (theirs, source) = (
        next(((t, calls[side]) for calls in places if (t := turning(calls[side].leaves))), (None, None))
        for side in (on, other)
    )
    own = turning(case.calls[on].leaves)
    told = f"the {other}'s frequencies"
    if ours and theirs:
        told = f"{_base(theirs.frequencies)} where the {on} has {_base(ours.frequencies)}"
    if own and theirs and source:
        tables = {}
        for name, table in ((own.cos, theirs.cos), (own.sin, theirs.sin)):
            x, wanted = source.leaves[table], case.calls[on].leaves[name].shape
            tables[name] = np.concatenate([x] * (wanted[-1] // x.shape[-1]), -1).reshape(wanted)
        yield told, case.measure(on, values=tables)
    rows: dict[str, Any] = {told: theirs.frequencies} if theirs else {}
    rows |= {f"theta {t:g}": t for t in COMMON_THETAS}
    for text, wanted in rows.items():

        def angle(function, args, kwargs, wanted=wanted):
            step = _steps(args[0])
            if step is None:
                return function(*args, **kwargs)
            size = _distinct(step.numpy(force=True))
            if isinstance(wanted, float):
                row = wanted ** (-torch.arange(size, dtype=step.dtype) / size)
            else:
                row = torch.as_tensor(wanted[:size])
            return function(args[0] * (row.repeat(step.shape[-1] // size) / step), *args[1:], **kwargs)

        yield text, case.measure_mode({"cos": angle, "sin": angle})


def _steps(angles: Any) -> Any:
    """The usual difference between one token's angles and the next one's, or None if these are no angles."""
    if angles.ndim < 2 or angles.shape[-2] < 2:
        return None
    step = angles.diff(dim=-2).reshape(-1, angles.shape[-1]).median(0).values
    return step if (step != 0).all() else None


@hypothesis("position offset", "positions begin at another number, or padding shifts them", rewrites=True)
def position_offset(case: Case) -> Variants:
    for by in (1, -1, 2, -2):

        def angle(function, args, kwargs, by=by):
            step = _steps(args[0])
            return function(args[0] if step is None else args[0] + by * step, *args[1:], **kwargs)

        def lookup(function, args, kwargs, by=by):
            ids, table = args[0], args[1]
            if _are_positions(ids):
                ids = (ids + by).clamp(0, table.shape[0] - 1)
            return function(ids, *args[1:], **kwargs)

        rules = {"cos": angle, "sin": angle, "embedding": lookup}
        yield f"positions {by:+d}", case.measure_mode(rules)


def _are_positions(ids: Any) -> bool:
    return ids.ndim >= 1 and ids.shape[-1] > 2 and bool((ids.diff(dim=-1) == 1).double().mean() > 0.5)


@hypothesis("embedding scale", "embeddings are multiplied by sqrt(D), or they are not", rewrites=True)
def embedding_scale(case: Case) -> Variants:
    for power in (0.5, -0.5):

        def lookup(function, args, kwargs, power=power):
            found = function(*args, **kwargs)
            return found if _are_positions(args[0]) else found * found.shape[-1] ** power

        yield f"embeddings times D^{power}", case.measure_mode({"embedding": lookup})
