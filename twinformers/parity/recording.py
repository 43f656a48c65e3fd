"""What every submodule returns, in the order of execution, in either framework and in transformers."""

from __future__ import annotations

import contextlib
import functools
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
    model: Any,
    change: Callable[[str, Any], Any] = lambda path, x: x,
    begin: Callable[[str, tuple[Any, ...], dict[str, Any]], None] = lambda path, args, kwargs: None,
) -> Iterator[dict[str, Any]]:
    """While it lasts, every submodule's output passes through `change(path, output)` and is noted by path.

    `begin(path, args, kwargs)` is told of each call before it is made. Object identities exist only inside
    a trace: enter it after `nnx.merge`, in the function that is traced.
    """
    from flax import nnx

    modules = [(".".join(map(str, path)), m) for path, m in nnx.iter_modules(model)]
    paths = {id(m): path for path, m in modules if path}
    seen: dict[str, Any] = {}
    originals = {}
    for cls in {type(m) for _, m in modules}:
        # A class may inherit its call; asking the class for it would find its metaclass's.
        defined = [vars(c)["__call__"] for c in cls.__mro__ if "__call__" in vars(c)]
        if defined:
            originals[cls] = defined[0], "__call__" in vars(cls)
    running: set[int] = set()

    def wrap(original):
        @functools.wraps(original)
        def call(self, *args, **kwargs):
            if id(self) not in paths or id(self) in running:  # the latter: a call of its base class's
                return original(self, *args, **kwargs)
            begin(paths[id(self)], args, kwargs)
            running.add(id(self))
            try:
                output = original(self, *args, **kwargs)
            finally:
                running.discard(id(self))
            path = _numbered(paths[id(self)], seen)
            seen[path] = x = change(path, _first(output))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return call

    for cls, (original, _) in originals.items():
        cls.__call__ = wrap(original)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for cls, (original, own) in originals.items():
            if own:
                cls.__call__ = original  # type: ignore[method-assign]
            else:
                del cls.__call__


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
def hooked_torch(
    model: Any,
    names: Mapping[str, str] | None = None,
    end: Callable[[str, Any], None] = lambda path, x: None,
    begin: Callable[[str, tuple[Any, ...], dict[str, Any]], None] = lambda path, args, kwargs: None,
) -> Iterator[dict[str, Any]]:
    """While it lasts, every submodule's output (of those in `names`, if given) is noted by our path.

    `begin(path, args, kwargs)` is told of each call before it is made, `end(path, output)` after it.
    """
    modules = dict(model.named_modules())
    wanted = names if names is not None else {name: name for name in modules if name}
    seen: dict[str, Any] = {}

    def hooks(path: str):
        def before(module, args, kwargs):
            begin(path, args, kwargs)

        def after(module, args, output):
            number = _numbered(path, seen)
            seen[number] = _first(output)
            end(number, seen[number])

        return before, after

    handles = []
    for ours, theirs in wanted.items():
        if theirs in modules:
            before, after = hooks(ours)
            handles.append(modules[theirs].register_forward_pre_hook(before, with_kwargs=True))
            handles.append(modules[theirs].register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def widened(x: np.ndarray) -> np.ndarray:
    """The values in float64 or float32, which everything that compares understands."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def to_numpy(x: Any) -> tuple[str, np.ndarray]:
    """The name of the dtype, and the values in float64 or float32."""
    import torch

    wide = x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))
    return str(x.dtype).removeprefix("torch."), wide.numpy()
