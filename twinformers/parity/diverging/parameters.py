"""Mistakes in what a module holds: the same code, with other numbers or with the same ones elsewhere."""

from __future__ import annotations

import math
import re

import numpy as np

from twinformers.parity.diverging.case import Case, Variants, hypothesis
from twinformers.parity.diverging.values import Leaves


@hypothesis(
    "transposed kernel", "PyTorch keeps a matrix as [out, in], Flax as [in, out]; one is the wrong way round"
)
def transposed(case: Case) -> Variants:
    for name, x in case.near("right").items():
        if x.ndim == 2:
            turned = x.T if x.shape[0] == x.shape[1] else x.reshape(x.shape[::-1]).T
            yield f"{name} transposed", case.measure("right", parameters={name: turned})
            if x.shape[0] != x.shape[1]:
                reshaped = x.T.reshape(x.shape)
                yield f"{name} reshaped, not transposed", case.measure("right", parameters={name: reshaped})


@hypothesis("exchanged weights", "two parameters of one shape stand in each other's place")
def exchanged(case: Case) -> Variants:
    side, near = case.sides["right"], case.near("right")
    path = side.own_path(case.calls["right"].path.partition("#")[0])
    names = list(near)
    for n, a in enumerate(names):
        for b in names[n + 1 :]:
            if near[a].shape == near[b].shape and not np.array_equal(near[a], near[b]):
                yield f"{a} and {b} exchanged", case.measure("right", parameters={a: near[b], b: near[a]})
    if all("." not in name for name in near):  # nothing below: the other one lies elsewhere in the model
        everywhere = side.parameters()
        for name, x in near.items():
            for other, y in everywhere.items():
                if x.shape == y.shape and other != f"{path}.{name}":
                    yield f"{name} taken from {other}", case.measure("right", parameters={name: y})


@hypothesis("norm offset", "some norms multiply by their weight, some (Gemma's) by 1 + weight")
def norm_offset(case: Case) -> Variants:
    vectors = {
        n: x for n, x in case.near("right").items() if x.ndim == 1 and n.rpartition(".")[2] == "weight"
    }
    for sign in (1, -1):
        for name, x in vectors.items():
            yield f"{name} {sign:+d}", case.measure("right", parameters={name: x + sign})
        if len(vectors) > 1:
            moved = {name: x + sign for name, x in vectors.items()}
            yield f"every norm weight {sign:+d}", case.measure("right", parameters=moved)


@hypothesis("rounded weights", "one side's parameters went through a narrower type")
def rounded(case: Case) -> Variants:
    import ml_dtypes

    for on in ("right", "left"):
        near = case.near(on)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            narrow = {name: x.astype(dtype).astype(np.float64) for name, x in near.items()}
            if any(not np.array_equal(x, narrow[name]) for name, x in near.items()):
                text = f"the {on} side's parameters rounded to {np.dtype(dtype).name}"
                yield text, case.measure(on, parameters=narrow)


@hypothesis("tied or untied head", "one side's head reads the embedding, the other's a matrix of its own")
def head(case: Case) -> Variants:
    for on in ("right", "left"):
        near = {name: x for name, x in case.near(on).items() if x.ndim == 2}
        for a, x in near.items():
            for b, y in near.items():
                if a != b and x.shape == y.shape:
                    yield f"{a} is {b} on the {on}", case.measure(on, parameters={a: y})


ROLES = {
    "q": ("q", "query", "queries"),
    "k": ("k", "key", "keys"),
    "o": ("o", "out", "output", "dense", "c", ""),
}


def _role(near: Leaves, role: str) -> Leaves:
    """The parameters of the submodules that are named for a part of attention: q_proj, wq, to_q, query."""
    found = {}
    for name, x in near.items():
        owner = name.lower().split(".")[-2:-1]
        short = re.sub(r"^(to_|in_|w)|_?(proj(ection)?|linear|weight)_?", "", owner[0]) if owner else None
        if short in ROLES[role]:
            found[name] = x
    return found


def _rows(x: np.ndarray, order: np.ndarray, axis: int = 0) -> np.ndarray:
    return np.take(x, order, axis)


@hypothesis("rotary pairs", "rotary positions turn dimension j with j + H/2, or 2j with 2j + 1 (Meta, GGUF)")
def rotary_pairs(case: Case) -> Variants:
    for on in ("right", "left"):
        near = case.near(on)
        q, k = _role(near, "q"), _role(near, "k")
        if not q or not k:
            continue
        common = math.gcd(*(x.shape[0] for x in (*q.values(), *k.values())))
        for size in (d for d in range(4, min(common, 512) + 1, 2) if common % d == 0):
            for text, inner in (("halves", (2, size // 2)), ("neighbours", (size // 2, 2))):
                changed = {}
                for name, x in {**q, **k}.items():
                    order = np.arange(x.shape[0]).reshape(-1, *inner).swapaxes(1, 2).reshape(-1)
                    changed[name] = _rows(x, order)
                what = f"the {on}'s q and k rows, {text} of each head of {size} set apart"
                yield what, case.measure(on, parameters=changed)
        return  # what one side shows, the other shows too


@hypothesis("repeat against tile", "query head n reads key-value head n // G (repeat) or n % K (tile)")
def grouping(case: Case) -> Variants:
    near = case.near("right")
    q, k, o = (_role(near, role) for role in "qko")
    if not q or not k or not o:
        return
    wide, narrow = next(iter(q.values())).shape[0], next(iter(k.values())).shape[0]
    if wide == narrow or wide % narrow:
        return
    groups = wide // narrow
    for size in (d for d in range(1, narrow) if narrow % d == 0):
        for shape in ((narrow // size, groups, size), (groups, narrow // size, size)):
            order = np.arange(wide).reshape(shape).swapaxes(0, 1).reshape(-1)
            changed = {name: _rows(x, order) for name, x in q.items()}
            changed |= {name: _rows(x, order, 1) for name, x in o.items() if x.ndim == 2}
            text = f"query heads of {size} regrouped, {shape[0]} x {shape[1]}"
            yield text, case.measure("right", parameters=changed)
