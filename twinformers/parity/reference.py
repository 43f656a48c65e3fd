"""transformers' model of the same weights, made truly float64.

Its models cast to float32 inside (norm statistics, rotary angles, softmax), so one loaded in float64 is
still a float32 oracle: measured, off by 6.7e-7. Answering every request for float32 with float64 makes it
exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint, convert
from twinformers.errors import MissingDependency
from twinformers.parity.recording import Activations, record_torch
from twinformers.weight_maps import weight_map


def float64_throughout() -> Any:
    """A context in which torch gives float64 wherever float32 is asked for."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Float64(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.float:
                function = torch.Tensor.double

            def widen(value):
                return torch.float64 if value is torch.float32 else value

            return function(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})

    return Float64()


def record_reference(
    checkpoint: Checkpoint, tokens: np.ndarray, positions: np.ndarray, dtype: str
) -> tuple[np.ndarray, Activations]:
    """Logits and activations of `transformers`, by our paths; eager attention, CPU, float64 or `dtype`."""
    import contextlib

    import torch

    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            "the reference check needs transformers", hint="pip install 'twinformers[reference]'"
        ) from None
    config = checkpoint.config
    precise = float64_throughout() if dtype == "float64" else contextlib.nullcontext()
    kind = getattr(torch, dtype)
    with precise:
        theirs = transformers.AutoConfig.for_model(**config.to_hf(), attn_implementation="eager", dtype=kind)
        model = getattr(transformers, config.hf_class)(theirs).to(kind).eval()
        state = {}
        for name, array in convert(checkpoint, "hf", "float32" if dtype != "float64" else "float64"):
            state[name] = torch.from_numpy(np.require(array, requirements=["C", "W"])).to(kind)
        tied = weight_map(config).tied("hf")
        model.load_state_dict(state | {name: state[to] for name, to in tied.items()}, strict=True)
        del state
        place = torch.from_numpy(positions).long()
        seen = (place[:, None, :] >= 0) & (place[:, None, :] <= place[:, :, None])  # [B, T, S]
        # A mask of four dimensions is used as it is; transformers' own would not know these positions.
        mask = torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, torch.finfo(kind).min)[:, None]

        def call(model):
            return model(
                input_ids=torch.from_numpy(tokens).long(),
                position_ids=place.clamp(min=0),
                attention_mask=mask,
                use_cache=False,
            ).logits

        return record_torch(model, call, weight_map(config).module_paths())
