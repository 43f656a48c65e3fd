"""What every submodule returns, in the order of execution, in either framework and in transformers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Activations = dict[str, np.ndarray]


def _first(output: Any) -> Any:
    """A module that returns (x, cache) is judged by x."""
    return output[0] if isinstance(output, tuple) else output


def _numbered(path: str, seen: Mapping[str, Any]) -> str:
    """The path, with the number of the call from the second one on: a shared module runs more than once."""
    calls = itertools.count(2)
    name = path
    while name in seen:
        name = f"{path}#{next(calls)}"
    return name


def record_jax(model: Any, *inputs: Any) -> tuple[np.ndarray, Activations]:
    """Logits [B, T, V] and each submodule's output by path, from one compiled call."""
    import jax
    from flax import nnx

    graphdef, state = nnx.split(model)
    order: list[str] = []

    @jax.jit
    def run(params, inputs):
        merged = nnx.merge(graphdef, params)
        with patched_jax(merged) as seen:
            logits, _ = merged(*inputs)
        order[:] = seen  # jit sorts the keys of a dictionary
        return logits, seen

    logits, outputs = run(nnx.to_pure_dict(state), inputs)
    return np.asarray(logits), {path: np.asarray(outputs[path]) for path in order}


@contextlib.contextmanager
def patched_jax(
    model: Any, change: Callable[[str, Any], Any] = lambda path, x: x
) -> Iterator[dict[str, Any]]:
    """While it lasts, every submodule's output passes through `change(path, output)` and is noted by path.

    Object identities exist only inside a trace: enter it after `nnx.merge`, in the function that is traced.
    """
    from flax import nnx

    modules = [(".".join(map(str, path)), m) for path, m in nnx.iter_modules(model)]
    paths = {id(m): path for path, m in modules if path}
    seen: dict[str, Any] = {}
    originals = {c: vars(c)["__call__"] for c in {type(m) for _, m in modules} if "__call__" in vars(c)}

    def wrap(original):
        def call(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            if id(self) not in paths:
                return output
            path = _numbered(paths[id(self)], seen)
            seen[path] = x = change(path, _first(output))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return call

    for cls, original in originals.items():
        cls.__call__ = wrap(original)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for cls, original in originals.items():
            cls.__call__ = original  # type: ignore[method-assign]


def record_torch(
    model: Any,
    call: Any,
    names: Mapping[str, str] | None = None,
    dtypes: dict[str, str] | None = None,
) -> tuple[np.ndarray, Activations]:
    """Logits and outputs by our path; `call(model)` makes the forward pass and returns the logits.

    `names` maps our paths to the model's own, for a model that is not a twin. `dtypes` receives the dtype of
    each output, which numpy's float32 for the half precisions would hide.
    """
    import torch

    with torch.inference_mode(), hooked_torch(model, names) as seen:
        outputs = {"": call(model), **seen}
    arrays = {path: to_numpy(x) for path, x in outputs.items()}
    if dtypes is not None:
        dtypes |= {path: dtype for path, (dtype, _) in arrays.items()}
    return arrays.pop("")[1], {path: x for path, (_, x) in arrays.items()}


@contextlib.contextmanager
def hooked_torch(model: Any, names: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """While it lasts, every submodule's output (of those in `names`, if given) is noted by our path."""
    modules = dict(model.named_modules())
    wanted = names if names is not None else {name: name for name in modules if name}
    seen: dict[str, Any] = {}

    def hook(path: str):
        def keep(module, args, output):
            seen[_numbered(path, seen)] = _first(output)

        return keep

    handles = [
        modules[theirs].register_forward_hook(hook(ours))
        for ours, theirs in wanted.items()
        if theirs in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def to_numpy(x: Any) -> tuple[str, np.ndarray]:
    """The name of the dtype, and the values in float64 or float32."""
    import torch

    wide = x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))
    return str(x.dtype).removeprefix("torch."), wide.numpy()
