"""Both twins on the same inputs: logits, activations, cached decoding and generation."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint
from twinformers.loading import find_device, load
from twinformers.parity.kinds import Call, Inputs, kind
from twinformers.parity.recording import Activations, record_jax, record_torch, to_numpy, widened


@dataclass
class Run:
    """What one twin did: dtypes are those that its framework reported, the values are float64 or float32."""

    logits: np.ndarray
    activations: Activations
    dtypes: dict[str, str]
    cached: np.ndarray | None = None
    generated: list[list[int | None]] | None = None


@contextlib.contextmanager
def jax_precision(dtype: str) -> Iterator[None]:
    """64-bit types where `dtype` is one and nowhere else, and products in full precision on any device."""
    import jax

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


def jax_caller(model: Any, consumed: Collection[str] = ()) -> Call:
    """Call a Flax twin's methods by name, each compiled once; those `consumed` donate their last argument."""
    import jax

    from jax_models import functional

    compiled: dict[str, Any] = {}

    def call(method: str, *args: Any) -> Any:
        if method not in compiled:
            apply, params = functional(model, method)
            donated = len(args) if method in consumed else ()
            compiled[method] = partial(jax.jit(apply, donate_argnums=donated), params)
        return compiled[method](*args)

    return call


def torch_caller(model: Any, device: Any) -> Call:
    """Call a PyTorch twin's methods by name; numpy arrays are put on the device."""
    import torch

    def put(x: Any) -> Any:
        return torch.from_numpy(x.copy()).to(device) if isinstance(x, np.ndarray) else x

    def call(method: str, *args: Any) -> Any:
        return (model if method == "__call__" else getattr(model, method))(*map(put, args))

    return call


def run_jax(
    checkpoint: Checkpoint,
    dtype: str,
    device: Any,
    inputs: Inputs,
    checks: Sequence[str],
    attention: str = "einsum",
) -> Run:
    import jax

    calls = kind(checkpoint.config)
    with jax_precision(dtype):
        place = find_device("jax", device)
        model = load(checkpoint, "jax", dtype, place, attention=attention)
        logits, activations = record_jax(model, *(jax.device_put(x, place) for x in inputs))
        run = Run(
            widened(logits),
            {p: widened(x) for p, x in activations.items()},
            {p: x.dtype.name for p, x in {"": logits, **activations}.items()},
        )

        call = jax_caller(model)
        if "cache" in checks:
            parts = calls.cached(call, model.empty_cache, inputs)
            run.cached = np.concatenate([widened(np.asarray(p)) for p in parts], 1)
        if "generation" in checks:
            run.generated = calls.generate("jax_models", model, inputs)
    return run


def run_torch(
    checkpoint: Checkpoint,
    dtype: str,
    device: Any,
    inputs: Inputs,
    checks: Sequence[str],
    attention: str = "einsum",
) -> Run:
    import torch

    calls, place = kind(checkpoint.config), find_device("torch", device)
    model = load(checkpoint, "torch", dtype, place, attention=attention)
    dtypes: dict[str, str] = {}
    call = torch_caller(model, place)
    logits, activations = record_torch(model, lambda m: call("__call__", *inputs)[0], dtypes=dtypes)
    run = Run(logits, activations, dtypes)
    if "cache" in checks:
        with torch.inference_mode():
            parts = calls.cached(call, model.empty_cache, inputs)
        run.cached = np.concatenate([to_numpy(p)[1] for p in parts], 1)
    if "generation" in checks:
        run.generated = calls.generate("torch_models", model, inputs)
    return run
