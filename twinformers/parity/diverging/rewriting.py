"""Single operations changed while a module runs: PyTorch's through a function mode, JAX's in its jaxpr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

#: Changes one operation: `rule(function, args, kwargs)` gives what is to be returned in its place.
Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Rewrite(TorchFunctionMode):
    """While it lasts, the operations of these names go through their rules; all others are untouched."""

    def __init__(self, rules: Mapping[str, Rule]):
        super().__init__()
        self.rules = rules

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rule = self.rules.get(getattr(function, "__name__", ""))
        return rule(function, args, kwargs or {}) if rule else function(*args, **(kwargs or {}))


class Widen(TorchFunctionMode):
    """While it lasts, float64 answers every request for a narrower float."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()

        def widen(value):
            return torch.float64 if any(value is narrow for narrow in NARROW) else value

        return function(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


def evaluate_widened(closed: Any, *values: Any) -> list[Any]:
    """What a jaxpr computes if float64 stands for every narrower float in it."""
    import jax.extend
    import jax.numpy as jnp
    import numpy as np

    def widen(x: Any) -> Any:
        return jnp.asarray(x, np.float64) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else x

    def narrow(value: Any) -> bool:
        return isinstance(value, (np.dtype, type)) and jnp.issubdtype(value, jnp.floating)

    def evaluate(jaxpr: Any, consts: Any, values: Any) -> list[Any]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], map(widen, [*consts, *values]), strict=True))

        def read(atom: Any) -> Any:
            return widen(atom.val) if isinstance(atom, jax.extend.core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
            if eqn.primitive.name == "reduce_precision":
                outputs = inputs
            elif inner is not None and eqn.primitive.name not in ("scan", "while", "cond"):
                body, own = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
                outputs = evaluate(body, own, inputs)
            else:
                params = {k: np.dtype(np.float64) if narrow(v) else v for k, v in eqn.params.items()}
                outputs = eqn.primitive.bind(*inputs, **params)
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
            known |= zip(eqn.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    return evaluate(closed.jaxpr, closed.consts, values)


@contextlib.contextmanager
def wide_names() -> Iterator[None]:
    """While it lasts, `jnp.float32` and narrower names mean float64: constants are made before any jaxpr."""
    import jax.numpy as jnp

    with contextlib.ExitStack() as stack:
        for name in ("float32", "bfloat16", "float16"):
            stack.enter_context(mock.patch.object(jnp, name, jnp.float64))
        yield
