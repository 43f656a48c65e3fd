"""Mistakes in what a module does, found by rewriting single operations while PyTorch's side runs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from twinformers.parity.diverging.case import Case, Change, Variants, hypothesis


@hypothesis("epsilon", "a norm adds another small number to the variance", rewrites=True)
def epsilon(case: Case) -> Variants:
    from twinformers.parity.diverging.rewriting import Rewrite

    on = case.rewritable or ""
    target = case.target("left" if on == "right" else "right", part=bool(case.until))

    def rules(delta: float) -> dict[str, Any]:
        def root(function, args, kwargs):
            return function(args[0] + delta, *args[1:], **kwargs)

        def power(function, args, kwargs):
            halves = len(args) > 1 and args[1] in (0.5, -0.5)
            return root(function, args, kwargs) if halves else function(*args, **kwargs)

        def norm(function, args, kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            eps = bound.arguments["eps"]
            bound.arguments["eps"] = (np.finfo(np.float64).eps if eps is None else eps) + delta
            return function(*bound.args, **bound.kwargs)

        return {"rsqrt": root, "sqrt": root, "pow": power, "layer_norm": norm, "rms_norm": norm}

    def excess(delta: float) -> float:
        """How far the output lies beyond the target: zero at the right epsilon."""
        found = case.output(on, part=bool(case.until), change=Change(mode=Rewrite(rules(delta))))
        chosen = case.keep(target)
        a, b = found[chosen], target[chosen]
        return float(((a - b) * b).sum() / (b * b).sum())

    try:
        before, delta = 0.0, 1e-7
        was, is_ = excess(before), excess(delta)
        for _ in range(20):  # the secant method
            if is_ == was or not math.isfinite(is_):
                break
            before, delta, was = delta, delta - is_ * (delta - before) / (is_ - was), is_
            is_ = excess(delta)
    except Exception:  # as in `measure`
        return
    own = _epsilon_of(case.sides[on].modules()[case.calls[on].path.partition("#")[0]])
    text = f"epsilon {own + delta:.3g} where the {on} has {own:.3g}" if own else f"epsilon {delta:+.3g}"
    yield text, case.measure_mode(rules(delta))


def _epsilon_of(module: Any) -> float | None:
    found = [v for m in module.modules() for n, v in vars(m).items() if "eps" in n and isinstance(v, float)]
    return found[0] if found else None


@hypothesis(
    "activation",
    "another non-linearity, or another form of it: GELU exact or by tanh, SiLU, ReLU",
    rewrites=True,
)
def activation(case: Case) -> Variants:
    import torch

    F = torch.nn.functional
    forms: dict[str, Callable[[Any], Any]] = {
        "exact GELU": lambda x: F.gelu(x, approximate="none"),
        "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
        "GELU by sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
        "SiLU": F.silu,
        "ReLU": F.relu,
        "squared ReLU": lambda x: F.relu(x) ** 2,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "no activation": lambda x: x,
    }
    for text, form in forms.items():

        def replaced(function, args, kwargs, form=form):
            return form(args[0])

        names = ("gelu", "silu", "relu", "mish", "leaky_relu", "elu")
        yield f"{text} in its place", case.measure_mode(dict.fromkeys(names, replaced))


@hypothesis(
    "attention scale", "scores are divided by sqrt(H), or they are not, or by another size", rewrites=True
)
def attention_scale(case: Case) -> Variants:
    import torch

    forms = {"sqrt({})": 0.5, "1/sqrt({})": -0.5, "{}": 1, "1/{}": -1}
    for form, power in forms.items():
        for number in sorted(case.numbers()):
            factor = number**power

            def softmax(function, args, kwargs, factor=factor):
                # What is masked stays the smallest number: beyond it lies -inf, and NaN after that.
                scaled = torch.clamp(args[0] * factor, min=torch.finfo(args[0].dtype).min)
                return function(scaled, *args[1:], **kwargs)

            def fused(function, args, kwargs, factor=factor):
                usual = args[0].shape[-1] ** -0.5
                scale = kwargs.get("scale")
                return function(*args, **kwargs | {"scale": (usual if scale is None else scale) * factor})

            rules = {"softmax": softmax, "scaled_dot_product_attention": fused}
            yield f"scores times {form.format(number)}", case.measure_mode(rules)


@hypothesis(
    "mask",
    "which keys a query sees is off by one, or padding is seen, or the causal rule is missing",
    rewrites=True,
)
def mask(case: Case) -> Variants:
    import torch

    on = case.rewritable or ""
    known = (case.first or case.calls)["left" if on == "right" else "right"].leaves.values()
    masks = (np.nonzero(x)[-2:] for x in known if x.dtype == bool and x.ndim >= 3)
    widths = {int((rows - columns).max()) + 1 for rows, columns in masks if len(rows)}

    def changes() -> dict[str, Callable[[Any], Any]]:
        def grid(seen):
            rows, columns = (torch.arange(n, device=seen.device) for n in seen.shape[-2:])
            return rows[:, None], columns[None, :]

        def real(seen):  # a key that nobody sees is padding
            return seen.any(-2, keepdim=True)

        def reach(seen):  # how far back the farthest key lies that is seen
            i, j = grid(seen)
            return int(torch.where(seen, i - j, 0).max())

        def window(seen, width):
            i, j = grid(seen)
            return (seen | ((j <= i) & real(seen))) & (i - j < width)

        def given(seen):
            """Without the keys that the inputs mark as padding."""
            known = case.keep(np.zeros((seen.shape[0], seen.shape[-1])))
            known = torch.as_tensor(known, device=seen.device)
            return seen & known.reshape(known.shape[0], *[1] * (seen.ndim - 2), known.shape[-1])

        return {
            "a token does not see itself": lambda s: s & (grid(s)[0] != grid(s)[1]),
            "a token sees itself too": lambda s: s | (grid(s)[0] == grid(s)[1]),
            "one key further": lambda s: (s | (grid(s)[1] == grid(s)[0] + 1)) & real(s),
            "causal": lambda s: s & (grid(s)[1] <= grid(s)[0]),
            "not causal": lambda s: real(s).expand(s.shape),
            "a window shorter by one": lambda s: window(s, reach(s)),
            "a window longer by one": lambda s: window(s, reach(s) + 2),
            **{f"a window of {w}": functools.partial(window, width=w) for w in widths},
            "padding is seen": lambda s: s | ~real(s),
            "padding is seen, if it lies before": lambda s: s | (~real(s) & (grid(s)[1] <= grid(s)[0])),
            "padding is hidden": given,
            "everything is seen": torch.ones_like,
        }

    def values(change: Callable[[Any], Any]) -> dict[str, np.ndarray]:
        """Additive masks among the arguments: zero where a key is seen, very small where it is not."""
        found = {}
        for name, x in {**case.calls[on].leaves, **case.values[on]}.items():
            if x.ndim >= 3 and x.dtype.kind == "f" and ((x == 0) | (x < -1e4)).all() and (x < -1e4).any():
                found[name] = np.where(change(torch.from_numpy(x == 0)).numpy(), 0.0, x.min())
        return found

    def is_mask(x: Any) -> bool:
        return torch.is_tensor(x) and x.dtype is torch.bool and x.ndim >= 2

    for text, change in changes().items():

        def where(function, args, kwargs, change=change):
            return function(change(args[0]) if is_mask(args[0]) else args[0], *args[1:], **kwargs)

        def fill(function, args, kwargs, change=change):
            hidden = ~change(~args[1]) if is_mask(args[1]) else args[1]
            return function(args[0], hidden, *args[2:], **kwargs)

        def fused(function, args, kwargs, change=change):
            q, k, v, *rest = args
            given = rest[0] if rest else kwargs.pop("attn_mask", None)
            seen = torch.ones(*q.shape[:-1], k.shape[-2], dtype=torch.bool, device=q.device)
            if kwargs.pop("is_causal", False):
                seen = seen.tril()
            elif given is not None:
                seen = seen & (given if given.dtype is torch.bool else given > -1e4)
            return function(q, k, v, attn_mask=change(seen), **kwargs)

        rules = {
            "where": where,
            "masked_fill": fill,
            "masked_fill_": fill,
            "scaled_dot_product_attention": fused,
        }
        yield text, case.measure_mode(rules)
        if changed := values(change):
            yield text, case.measure(on, values=changed)
