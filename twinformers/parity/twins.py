"""Both twins on the same inputs: logits, activations, cached decoding and generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint
from twinformers.loading import find_device, load
from twinformers.parity.kinds import Inputs, kind
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


def run_jax(checkpoint: Checkpoint, dtype: str, device: Any, inputs: Inputs, checks: Sequence[str]) -> Run:
    import jax

    from jax_models import functional

    calls, steps = kind(checkpoint.config), {}
    with jax_precision(dtype):
        place = find_device("jax", device)
        model = load(checkpoint, "jax", dtype, place)
        logits, activations = record_jax(model, *(jax.device_put(x, place) for x in inputs))
        run = Run(
            widened(logits),
            {p: widened(x) for p, x in activations.items()},
            {p: x.dtype.name for p, x in {"": logits, **activations}.items()},
        )

        def call(method: str, *args: Any) -> Any:
            if method not in steps:
                apply, params = functional(model, method)
                steps[method] = jax.jit(apply), params
            step, params = steps[method]
            return step(params, *args)

        if "cache" in checks:
            parts = calls.cached(call, model.empty_cache, inputs)
            run.cached = np.concatenate([widened(np.asarray(p)) for p in parts], 1)
        if "generation" in checks:
            run.generated = calls.generate("jax_models", model, inputs)
    return run


def run_torch(checkpoint: Checkpoint, dtype: str, device: Any, inputs: Inputs, checks: Sequence[str]) -> Run:
    import torch

    calls, place = kind(checkpoint.config), find_device("torch", device)
    model = load(checkpoint, "torch", dtype, place)
    dtypes: dict[str, str] = {}

    def put(x: Any) -> Any:
        return torch.from_numpy(x.copy()).to(place) if isinstance(x, np.ndarray) else x

    logits, activations = record_torch(model, lambda m: m(*map(put, inputs))[0], dtypes=dtypes)
    run = Run(logits, activations, dtypes)

    def call(method: str, *args: Any) -> Any:
        return (model if method == "__call__" else getattr(model, method))(*map(put, args))

    if "cache" in checks:
        with torch.inference_mode():
            parts = calls.cached(call, model.empty_cache, inputs)
        run.cached = np.concatenate([to_numpy(p)[1] for p in parts], 1)
    if "generation" in checks:
        run.generated = calls.generate("torch_models", model, inputs)
    return run
