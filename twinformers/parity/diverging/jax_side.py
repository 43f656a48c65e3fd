"""A Flax NNX module as one of the two sides."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from twinformers.parity.diverging.sides import Call, Pullback, Side, placed
from twinformers.parity.diverging.values import Leaves, first_array
from twinformers.parity.recording import patched_jax
from twinformers.parity.twins import jax_precision


class JaxSide(Side):
    """A Flax NNX module."""

    framework = "jax"

    def modules(self) -> dict[str, Any]:
        from flax import nnx

        return {".".join(map(str, path)): module for path, module in nnx.iter_modules(self.model)}

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return jax_precision("float64")

    def watched(self, begin: Callable[..., None], end: Callable[[str, Any], None]) -> Any:
        def change(path: str, output: Any) -> Any:
            end(path, output)
            return output

        return patched_jax(self.model, change, begin)

    def numpy(self, x: Any) -> np.ndarray | None:
        import jax

        value = x[...] if hasattr(x, "get_value") else x  # a Variable holds its array
        return None if isinstance(value, jax.core.Tracer) else np.asarray(value)

    def native(self, x: np.ndarray, like: Any = None) -> Any:
        import jax.numpy as jnp

        keep = like is None or jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(x, x.dtype if keep else like.dtype)

    def _variables(self, path: str) -> Iterator[tuple[str, Any]]:
        """Each variable under a submodule with PyTorch's name for it."""
        from flax import nnx

        base = self.modules()[path.partition("#")[0]]
        for where, module in nnx.iter_modules(base):
            for name, variable in vars(module).items():
                if isinstance(variable, nnx.Variable) and hasattr(variable[...], "dtype"):
                    yield _torch_name((*where, name)), (name, variable)

    def parameters(self, path: str = "") -> Leaves:
        with self.scope():
            return {
                name: _torch_layout(kind, np.asarray(variable[...]))
                for name, (kind, variable) in self._variables(path)
            }

    @contextlib.contextmanager
    def edited(self, path: str, parameters: Mapping[str, np.ndarray]) -> Iterator[None]:
        import jax.numpy as jnp

        changed = {n: pair for n, pair in self._variables(path) if n in parameters}
        before = {n: variable[...] for n, (_, variable) in changed.items()}
        with self.scope():
            for n, (kind, variable) in changed.items():
                variable.set_value(jnp.asarray(_jax_layout(kind, parameters[n])))
        try:
            yield
        finally:
            for n, (_, variable) in changed.items():
                variable.set_value(before[n])

    def widened(self, call: Call, values: Mapping[str, np.ndarray]) -> np.ndarray:
        import jax

        from twinformers.parity.diverging.rewriting import evaluate_widened, wide_names

        with self.scope():
            arrays = self._arrays(call, values)

            def run(arrays: dict[str, Any]) -> Any:
                return first_array(self.perform(call, *placed(call, arrays)))

            with wide_names():
                closed = jax.make_jaxpr(run)(arrays)
            return np.asarray(evaluate_widened(closed, *jax.tree.leaves(arrays))[0])

    def _arrays(self, call: Call, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {name: self.native(x) for name, x in {**call.leaves, **values}.items()}

    def pullback(self, call: Call, values: Mapping[str, np.ndarray], cotangent: np.ndarray) -> Pullback:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        path = call.path.partition("#")[0]
        with self.scope():
            arrays = self._arrays(call, values)
            graphdef, state = nnx.split(self.modules()[path])
            flat = dict(nnx.to_flat_state(state))
            learned = {w: v[...] for w, v in flat.items() if isinstance(v, nnx.Param)}
            floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

            def run(floats: dict[str, Any], learned: dict[Any, Any]) -> Any:
                filled = [(w, v.replace(learned[w]) if w in learned else v) for w, v in flat.items()]
                module = nnx.merge(graphdef, nnx.from_flat_state(filled))
                args, kwargs = placed(call, {**arrays, **floats})
                return first_array(module(*args, **kwargs) if path else self.invoke(module, *args))

            _, pull = jax.vjp(run, floats, learned)
            of_floats, of_learned = pull(jnp.asarray(cotangent))
            names = {where: _torch_name(where) for where in learned}
            return Pullback(
                {name: np.asarray(x) for name, x in of_floats.items()},
                {names[w]: _torch_layout(str(w[-1]), np.asarray(x)) for w, x in of_learned.items()},
            )

    def signature(self, path: str) -> inspect.Signature:
        whole = inspect.signature(type(self.modules()[path]).__call__)
        return whole.replace(parameters=list(whole.parameters.values())[1:])


def _torch_name(where: tuple[Any, ...]) -> str:
    """What PyTorch calls a Flax module's variable."""
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return ".".join(map(str, (*where[:-1], names.get(where[-1], where[-1]))))


def _torch_layout(kind: str, x: np.ndarray) -> np.ndarray:
    """A kernel [..., in, out] as PyTorch keeps it: [out, in, ...]."""
    return np.moveaxis(x, (-1, -2), (0, 1)) if kind == "kernel" and x.ndim > 1 else x


def _jax_layout(kind: str, x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, (0, 1), (-1, -2)) if kind == "kernel" and x.ndim > 1 else x
