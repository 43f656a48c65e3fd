"""The Flax NNX twins, and the functional face that `jit`, `grad`, `vmap`, optax and Orbax see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax import nnx

__all__ = ["functional", "skeleton"]


def functional(model: nnx.Module, method: str = "__call__") -> tuple[Callable[..., Any], dict[str, Any]]:
    """Split a model once into a pure function and its parameters: `apply, params = functional(model)`.

    `apply(params, *args, **kwargs)` calls `method`; `params` is a nested dictionary of arrays. The static
    part is closed over, so that a jitted `apply` flattens nothing but arrays: on a 30-layer model that
    is 0.2 to 0.5 ms per call against 2 ms for `jax.jit` over the module and 26 ms for `nnx.jit`.
    """
    from flax import nnx

    graphdef, state = nnx.split(model)

    def apply(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return getattr(nnx.merge(graphdef, params), method)(*args, **kwargs)

    return apply, nnx.to_pure_dict(state)


def skeleton(build: Callable[..., nnx.Module], *args: Any, **kwargs: Any) -> Any:
    """`build(*args, rngs=..., **kwargs)` with shapes and dtypes for parameters, of which none is computed.

    It is `nnx.eval_shape` with one random key for all parameters: `nnx.Rngs` counts those that it gives, and
    to trace the counting takes four times as long as the model itself, for shapes that no key can change.
    """
    import jax
    from flax import nnx

    class OneKey(nnx.Rngs):
        def __init__(self) -> None:
            pass

        def params(self) -> jax.Array:  # type: ignore[override]
            return jax.random.key(0)

    return nnx.eval_shape(lambda: build(*args, rngs=OneKey(), **kwargs))
