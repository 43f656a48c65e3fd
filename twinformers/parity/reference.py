"""transformers' model of the same weights, made truly float64.

Its models cast to float32 inside (norm statistics, rotary angles, softmax), so one loaded in float64 is
still a float32 oracle: measured, off by 6.7e-7. Answering every request for float32 with float64 makes it
exact.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint, convert
from twinformers.configs import Config
from twinformers.errors import MissingDependency
from twinformers.parity.kinds import Inputs, kind
from twinformers.parity.recording import Activations, record_torch
from twinformers.weight_maps import weight_map


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """A context in which torch gives float64 wherever float32 is asked for, or nothing is said."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Float64(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.float:
                function = torch.Tensor.double

            def widen(value):
                return torch.float64 if value is torch.float32 else value

            return function(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})

    default, legacy = torch.get_default_dtype(), torch.FloatTensor
    torch.set_default_dtype(torch.float64)
    torch.FloatTensor = torch.DoubleTensor  # type: ignore[assignment,misc]  # Marian makes its table with it
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(default)
        torch.FloatTensor = legacy  # type: ignore[misc]


def has_reference(config: Config) -> bool:
    """Whether there is a model of transformers to compare with: a class of it, and transformers itself."""
    return config.hf_class is not None and importlib.util.find_spec("transformers") is not None


def reference_model(checkpoint: Checkpoint, dtype: str) -> Any:
    """The `transformers` model, eager attention, on the CPU; build and call it in `precise(dtype)`."""
    import torch

    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            "the reference check needs transformers", hint="pip install 'twinformers[reference]'"
        ) from None
    config, table = checkpoint.config, weight_map(checkpoint.config)
    type_ = getattr(torch, dtype)
    theirs = transformers.AutoConfig.for_model(**config.to_hf(), attn_implementation="eager", dtype=type_)
    model = getattr(transformers, str(config.hf_class))(theirs, **config.hf_options).to(type_).eval()
    state = {}
    for name, array in convert(checkpoint, "hf", "float64" if dtype == "float64" else "float32"):
        state[name] = torch.from_numpy(np.require(array, requirements=["C", "W"])).to(type_)
    # What the configuration determines (tables of positions and the like) stays as transformers made it.
    state = {name: x for name, x in state.items() if name not in table.buffers("hf")}
    state |= {name: state[to] for name, to in table.tied("hf").items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - table.buffers("hf"):
        raise AssertionError(f"transformers' model lacks {unexpected} and has {missing} besides")
    return model


def precise(dtype: str) -> Any:
    """A context in which `transformers` computes in `dtype` and, where that is float64, in nothing less."""
    return float64_throughout() if dtype == "float64" else contextlib.nullcontext()


def record_reference(checkpoint: Checkpoint, inputs: Inputs, dtype: str) -> tuple[np.ndarray, Activations]:
    """Logits and activations of `transformers`, by our paths; eager attention, CPU, float64 or `dtype`."""
    import torch

    with precise(dtype):
        model = reference_model(checkpoint, dtype)
        calls = kind(checkpoint.config)
        logits, activations = record_torch(
            model,
            lambda m: calls.reference(m, inputs, getattr(torch, dtype)),
            weight_map(checkpoint.config).module_paths(),
        )
    return logits, {path: batch_first(x, inputs) for path, x in activations.items()}


def batch_first(x: np.ndarray, inputs: Inputs) -> np.ndarray:
    """[B, T, ...], also of what FSMT's layers return, which is [T, B, ...]."""
    shapes = [positions.shape for positions in inputs[1::2]]
    return x.swapaxes(0, 1) if x.shape[:2] not in shapes and x.shape[1::-1] in shapes else x
