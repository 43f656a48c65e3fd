"""What every submodule returns, in the order of execution, in either framework and in transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Activations = dict[str, np.ndarray]


def _first(output: Any) -> Any:
    """A module that returns (x, cache) is judged by x."""
    return output[0] if isinstance(output, tuple) else output


def record_jax(model: Any, tokens: Any, positions: Any) -> tuple[np.ndarray, Activations]:
    """Logits [B, T, V] and each submodule's output by path, from one compiled call."""
    import jax
    from flax import nnx

    graphdef, state = nnx.split(model)
    order: list[str] = []

    @jax.jit
    def run(params, tokens, positions):
        merged = nnx.merge(graphdef, params)
        # Object identities exist only inside the trace, so the paths are taken after merging.
        paths = {id(m): ".".join(map(str, p)) for p, m in nnx.iter_modules(merged)}
        seen: dict[str, Any] = {}
        with _patched({type(m) for _, m in nnx.iter_modules(merged)}, paths, seen):
            logits, _ = merged(tokens, positions)
        order[:] = [p for p in seen if p]
        return logits, {p: x for p, x in seen.items() if p}

    logits, outputs = run(nnx.to_pure_dict(state), tokens, positions)
    return np.asarray(logits), {path: np.asarray(outputs[path]) for path in order}


@contextlib.contextmanager
def _patched(classes: set[type], paths: Mapping[int, str], seen: dict[str, Any]) -> Iterator[None]:
    originals = {cls: vars(cls)["__call__"] for cls in classes if "__call__" in vars(cls)}

    def wrap(original):
        def call(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            if id(self) in paths:
                seen[paths[id(self)]] = _first(output)
            return output

        return call

    for cls, original in originals.items():
        cls.__call__ = wrap(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original  # type: ignore[method-assign]


def record_torch(
    model: Any, call: Any, names: Mapping[str, str] | None = None
) -> tuple[np.ndarray, Activations]:
    """Logits and outputs by our path; `call(model)` makes the forward pass and returns the logits.

    `names` maps our paths to the model's own, for a model that is not a twin.
    """
    import torch

    modules = dict(model.named_modules())
    wanted = names if names is not None else {name: name for name in modules if name}
    seen: Activations = {}

    def hook(path: str):
        def keep(module, args, output):
            x = _first(output).detach().cpu()
            seen[path] = (x if x.dtype == torch.float64 else x.float()).numpy()

        return keep

    handles = [
        modules[theirs].register_forward_hook(hook(ours))
        for ours, theirs in wanted.items()
        if theirs in modules
    ]
    try:
        with torch.inference_mode():
            logits = call(model).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return (logits if logits.dtype == torch.float64 else logits.float()).numpy(), seen
