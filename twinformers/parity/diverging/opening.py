"""From what a user gives to a side: a source with a framework before it, or a module from elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from twinformers.checkpoints import opened
from twinformers.errors import UsageError
from twinformers.loading import load
from twinformers.parity.diverging.jax_side import JaxSide
from twinformers.parity.diverging.sides import Invoke, Side
from twinformers.parity.diverging.torch_side import TorchSide
from twinformers.parity.kinds import kind
from twinformers.parity.reference import precise, reference_model
from twinformers.parity.twins import jax_precision
from twinformers.weight_maps import weight_map


def stranger(model: Any, name: str, invoke: Invoke | None, inputs: tuple[np.ndarray, ...]) -> Side:
    """The side of a module from elsewhere: a copy of it in float64. Raises UsageError for anything else."""
    call: Invoke = invoke or (lambda model, *inputs: model(*inputs))
    families = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "torch" in families:
        import torch

        if isinstance(model, torch.nn.Module):
            return TorchSide(copy.deepcopy(model).double().eval(), name, call, inputs)
    if "flax" in families:
        from flax import nnx

        if isinstance(model, nnx.Module):
            return JaxSide(_widened(model), name, call, inputs)
    raise UsageError(
        "cannot be compared",
        where=name,
        expected="jax:SOURCE, torch:SOURCE, hf:FOLDER, an nnx.Module or a torch.nn.Module",
        found=f"{type(model).__module__}.{type(model).__name__}",
    )


def _widened(model: Any) -> Any:
    """A copy of a Flax module in float64 that drops nothing and takes no statistics."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    def widen(x: Any) -> Any:
        return x.astype("float64") if jnp.issubdtype(x.dtype, jnp.floating) else jnp.array(x)

    with jax_precision("float64"):
        graphdef, state = nnx.split(model)
        copied = nnx.merge(graphdef, jax.tree.map(widen, state))
    copied.eval()
    return copied


def from_source(text: str) -> tuple[Side, Any]:
    """The side that "jax:SOURCE", "torch:SOURCE" or "hf:FOLDER" names, and its configuration."""

    side, _, source = text.partition(":")
    if side not in ("jax", "torch", "hf") or not source:
        raise UsageError(
            "no such side", where=text, expected="jax:SOURCE, torch:SOURCE or hf:FOLDER", found=repr(text)
        )
    with opened(source) as checkpoint:
        config = checkpoint.config
        calls = kind(config)
        inputs = calls.inputs(config)
        if side == "hf":
            import torch

            with precise("float64"):
                model = reference_model(checkpoint, "float64")
            names = weight_map(config).module_paths()

            def reference(model: Any, *inputs: Any) -> Any:
                return calls.reference(model, tuple(x.numpy() for x in inputs), torch.float64)

            return TorchSide(model, text, reference, inputs, names, float64_inside=True), config

        def twin(model: Any, *inputs: Any) -> Any:
            return model(*inputs)[0]

        if side == "torch":
            return TorchSide(load(checkpoint, "torch", "float64"), text, twin, inputs), config
        with jax_precision("float64"):
            return JaxSide(load(checkpoint, "jax", "float64"), text, twin, inputs), config
