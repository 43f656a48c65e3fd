"""The gradient of a loss with respect to every parameter and every submodule's output, in each framework.

The loss is the mean cross-entropy of the real tokens' successors; `kinds` says which those are. A gradient
with respect to an intermediate is taken by adding a zero to the submodule's output and differentiating with
respect to that zero; PyTorch keeps the outputs themselves. Parameters carry PyTorch's names and layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint
from twinformers.parity.kinds import Inputs, kind
from twinformers.parity.recording import Activations, patched_jax, to_numpy, widened
from twinformers.weight_maps import weight_map


@dataclass(frozen=True)
class Gradients:
    """A loss, its gradients by the parameter's name in the PyTorch twin, and by the submodule's path."""

    loss: float
    parameters: Activations
    outputs: Activations


def loss_jax(logits: Any, targets: Any, weights: Any) -> Any:
    """Weighted mean cross-entropy. [B, T, V], [B, T], [B, T] -> []"""
    import jax
    import jax.numpy as jnp

    wide = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]  # [B, T]
    return -(chosen * weights).sum() / weights.sum()


def loss_torch(logits: Any, targets: Any, weights: Any) -> Any:
    """Weighted mean cross-entropy. [B, T, V], [B, T], [B, T] -> []"""
    import torch

    wide = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    chosen = torch.take_along_dim(wide, targets[..., None].long(), dim=-1)[..., 0]  # [B, T]
    return -(chosen * weights).sum() / weights.sum()


def gradients_jax(model: Any, checkpoint: Checkpoint, inputs: Inputs, **options: Any) -> Gradients:
    """The Flax twin's gradients, from one compiled call; `options` go to the model."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graphdef, state = nnx.split(model)
    targets, weights = kind(checkpoint.config).targets(inputs)
    order: list[str] = []

    def run(params, zeros):
        merged = nnx.merge(graphdef, params)
        with patched_jax(merged, lambda path, x: x + zeros[path] if path in zeros else x) as seen:
            logits, _ = merged(*inputs, **options)
        order[:] = [path for path in seen if path]
        return loss_jax(logits, targets, jnp.asarray(weights, logits.dtype)), seen

    params = nnx.to_pure_dict(state)
    shapes = jax.eval_shape(run, params, {})[1]
    zeros = {path: jnp.zeros(shapes[path].shape, shapes[path].dtype) for path in order}
    grad = jax.jit(jax.value_and_grad(lambda p, z: run(p, z)[0], argnums=(0, 1)))
    loss, (of_params, of_outputs) = grad(params, zeros)
    leaves = weight_map(checkpoint.config).leaves("jax")
    flat = flat_jax(of_params)
    return Gradients(
        float(loss),
        {
            leaf.name("torch"): leaf.move(widened(np.asarray(flat[name])), "jax", "torch")
            for name, leaf in leaves.items()
        },
        {path: widened(np.asarray(of_outputs[path])) for path in order},
    )


def flat_jax(tree: Any) -> dict[str, Any]:
    """The leaves of nested dictionaries by their dotted names, which are those of the weight map."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): x for path, x in leaves}


def gradients_torch(
    model: Any,
    checkpoint: Checkpoint,
    inputs: Inputs,
    call: Callable[[Any], Any],
    names: Mapping[str, str] | None = None,
) -> Gradients:
    """The gradients of a PyTorch model, a twin or (with `names` from our paths to its own) another one.

    `call(model)` gives the logits. Parameters are named and laid out as the model itself has them.
    """
    import torch

    from twinformers.parity.recording import hooked_torch

    targets, weights = kind(checkpoint.config).targets(inputs)
    # A tied parameter goes by all of its names: which one is first is the model's affair.
    named = model.named_parameters(remove_duplicate=False)
    parameters = {n: p for n, p in named if p.requires_grad}
    with torch.enable_grad(), hooked_torch(model, names) as seen:
        logits = call(model)
        put = {"device": logits.device}
        loss = loss_torch(
            logits, torch.tensor(targets, **put), torch.tensor(weights, dtype=logits.dtype, **put)
        )
        wanted = [*parameters.values(), *seen.values()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    # What the loss does not depend on has the gradient zero.
    arrays = [
        to_numpy(torch.zeros_like(w) if g is None else g)[1] for w, g in zip(wanted, found, strict=True)
    ]
    return Gradients(
        loss.item(),
        dict(zip(parameters, arrays, strict=False)),
        dict(zip(seen, arrays[len(parameters) :], strict=True)),
    )


def in_torch_names(gradients: Mapping[str, np.ndarray], checkpoint: Checkpoint, side: str) -> Activations:
    """Gradients of another side's tensors by the PyTorch twin's names and in its layout.

    What does not train has no gradient there and none here; of tied tensors only the one that is a weight.
    """
    table = weight_map(checkpoint.config)
    return {
        name: table.produce(name, "torch", gradients.__getitem__, side)
        for name, leaf in table.leaves("torch").items()
        if leaf.trains
    }
